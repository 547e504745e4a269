"""Which setting won, and how sure that is: means over repeats, their intervals, and the winner beside the others.

Repeats of a setting differ in the seed, and in cross-validation also in the split. Runs of one split are averaged
first; the intervals are of the mean over the splits. Training sets of different splits overlap, so the mean over splits
varies more than independent runs would: Nadeau and Bengio 2003 (Inference for the generalization error, Machine
Learning 52) add (validation examples / training examples) to 1 / n in its variance.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cnntrain.sweep.plan import Repeat
from cnntrain.sweep.study import Trial, mean_value

CONFIDENCE = 0.95
Range = tuple[float, float]
UNLIMITED: Range = (-math.inf, math.inf)


@dataclass(frozen=True)
class Standing:
    """A trial's place.

    Attributes:
        mean: of the metric over its runs.
        std: standard deviation over the runs (n - 1); None for one run.
        low, high: 95 % interval of the mean (see `interval`); None where the runs do not differ. It covers what the
            repeats change: initial weights, order of images, augmentation, and the split where that varies. Where it
            does not, the validation images are the same throughout.
        values: metric by repeat.
    """

    trial: Trial
    mean: float
    std: float | None
    low: float | None
    high: float | None
    values: dict[Repeat, float]


@dataclass(frozen=True)
class Contest:
    """The winner beside the runner-up.

    Attributes:
        difference: how much better the winner is, > 0 or 0.
        low, high: interval of the difference by Student's t, paired over the repeats that both have; None where there
            are fewer than two. It holds for the winner against every other setting at once with a confidence of 95 %.
        repeats: those that both have.
        rival: the setting that the winner is not shown to be better than, as its place; None where there is none.
        settings: how many the winner was chosen from.
    """

    difference: float
    low: float | None
    high: float | None
    repeats: list[Repeat]
    rival: int | None
    settings: int

    @property
    def clear(self) -> bool | None:
        """Whether the winner's lead over every other setting is more than the spread over repeats; None where one
        repeat can't tell."""
        return None if self.low is None else self.rival is None


def rank(
    trials: Sequence[Trial], better: str, limits: Range = UNLIMITED, overlap: float = 0.0
) -> list[Standing]:
    """Trials whose runs are all done, the best first; ties in the order in which they were tried.

    Args:
        better: `max` or `min`.
        limits: the lowest and highest value of the metric.
        overlap: validation examples per training example, where repeats differ in their split.
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
        values = {repeat: o.value for repeat, o in sorted(trial.outcomes.items()) if o.value is not None}
        std = statistics.stdev(values.values()) if len(values) > 1 else None
        low, high = (interval(_by_split(values), limits, overlap) if std else None) or (None, None)
        standings.append(Standing(trial, mean, std, low, high, values))
    sign = -1 if better == "max" else 1
    return sorted(standings, key=lambda s: (sign * s.mean, s.trial.number))


def contest(
    standings: Sequence[Standing], better: str, limits: Range = UNLIMITED, overlap: float = 0.0
) -> Contest:
    """The winner against all others, paired over the repeats that both have: a seed's luck counts for both alike.

    The winner is the best of many on the very data that it is compared on. The intervals are therefore corrected after
    Bonferroni: with K settings, each has an error of 5 % / (K - 1). A setting that is not the best is then declared to
    be it with a probability of at most 2.5 %: there are at most K - 1 such settings, and for each the comparison with
    the one that is truly the best must go wrong.

    Args:
        standings: the best first; at least two.
    """
    winner, *others = standings
    sign = 1 if better == "max" else -1
    confidence = 1 - (1 - CONFIDENCE) / len(others)
    span = limits[1] - limits[0]
    found: list[tuple[list[Repeat], Range | None]] = []
    for other in others:
        both = [repeat for repeat in winner.values if repeat in other.values]
        differences = {repeat: sign * (winner.values[repeat] - other.values[repeat]) for repeat in both}
        limit = interval(_by_split(differences), overlap=overlap, confidence=confidence)
        found.append((both, limit and (max(limit[0], -span), min(limit[1], span))))
    low, high = found[0][1] or (None, None)
    rival = next((place for place, (_, limit) in enumerate(found, 2) if limit is None or limit[0] <= 0), None)
    return Contest(sign * (winner.mean - others[0].mean), low, high, found[0][0], rival, len(standings))


def _by_split(values: Mapping[Repeat, float]) -> list[float]:
    """What varies independently: runs of different seeds on one split; with several splits, each one's mean."""
    splits: dict[object, list[float]] = {}
    for repeat, value in values.items():
        splits.setdefault(repeat.split, []).append(value)
    return list(values.values()) if len(splits) == 1 else [statistics.fmean(each) for each in splits.values()]


def interval(
    values: Sequence[float], limits: Range = UNLIMITED, overlap: float = 0.0, confidence: float = CONFIDENCE
) -> Range | None:
    """The interval of a mean by Student's t; None for fewer than two values.

    A metric with limits is treated on a scale without: logarithm of the odds between two limits, logarithm above one,
    with the standard error carried over by the derivative (delta method), so that the interval stays inside. For the
    mean of 3 values from a beta distribution (mean 0.97, standard deviation 0.03) it covers 94 % (40,000 draws); the
    plain interval, cut off at 1, covers 88 %.

    Args:
        limits: the lowest and highest value that there can be.
        overlap: see the module.
        confidence: of the interval.
    """
    from scipy.special import stdtrit

    n = len(values)
    if n < 2:
        return None
    mean, (low, high) = statistics.fmean(values), limits
    error = statistics.stdev(values) * math.sqrt(1 / n + overlap)
    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * error
    if math.isinf(low) or half == 0 or not low < mean < high:
        return mean - half, mean + half
    if math.isinf(high):
        factor = math.exp(half / (mean - low))
        return low + (mean - low) / factor, low + (mean - low) * factor
    share = (mean - low) / (high - low)
    odds, factor = share / (1 - share), math.exp(half / (high - low) / (share * (1 - share)))
    ends = odds / factor, odds * factor
    return tuple(low + (high - low) * each / (1 + each) for each in ends)  # pyright: ignore[reportReturnType]
