"""Which setting won, and how sure that is: means over seeds, their intervals, and the winner beside the runner-up."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cnntrain.sweep.study import Trial, mean_value

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Standing:
    """A trial's place.

    Attributes:
        mean: of the metric over its seeds.
        std: standard deviation over the seeds (n - 1); None for one seed.
        low, high: 95 % interval of the mean, by Student's t; None for one seed. It covers what the seed changes:
            weights' start, order of images, augmentation. The validation images are the same throughout.
        values: metric by seed.
    """

    trial: Trial
    mean: float
    std: float | None
    low: float | None
    high: float | None
    values: dict[int, float]


@dataclass(frozen=True)
class Contest:
    """The winner beside the runner-up.

    Attributes:
        difference: how much better the winner is, > 0 or 0.
        low, high: 95 % interval of the difference, by Student's t over the seeds that both have, seed by seed; None
            where there are fewer than two.
        seeds: how many that are.
    """

    difference: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def clear(self) -> bool | None:
        """Whether the difference is more than the seeds' spread; None where one seed can't tell."""
        return None if self.low is None else self.low > 0


def rank(trials: Sequence[Trial], better: str) -> list[Standing]:
    """Trials whose runs are all done, the best first; ties in the order in which they were tried.

    Args:
        better: `max` or `min`.
    """
    standings = []
    for trial in trials:
        mean = mean_value(trial)
        if (
            trial.state == "running"
            or mean is None
            or {o.status for o in trial.outcomes.values()} != {"done"}
        ):
            continue
        values = {seed: o.value for seed, o in sorted(trial.outcomes.items()) if o.value is not None}
        std = statistics.stdev(values.values()) if len(values) > 1 else None
        low, high = interval(list(values.values())) or (None, None)
        standings.append(Standing(trial, mean, std, low, high, values))
    sign = -1 if better == "max" else 1
    return sorted(standings, key=lambda s: (sign * s.mean, s.trial.number))


def contest(winner: Standing, runner_up: Standing, better: str) -> Contest:
    """Winner against runner-up, paired over the seeds that both have: a seed's luck counts for both alike."""
    sign = 1 if better == "max" else -1
    both = [seed for seed in winner.values if seed in runner_up.values]
    differences = [sign * (winner.values[seed] - runner_up.values[seed]) for seed in both]
    low, high = interval(differences) or (None, None)
    return Contest(sign * (winner.mean - runner_up.mean), low, high, len(both))


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of normally distributed values (Student's t); None for fewer than two."""
    from scipy.special import stdtrit

    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = float(stdtrit(len(values) - 1, 0.5 + CONFIDENCE / 2)) * statistics.stdev(values)
    half /= math.sqrt(len(values))
    return mean - half, mean + half
