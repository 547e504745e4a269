"""Learning rate range test: train a copy of the network while the learning rate grows, and record the loss.

Source: Smith, Cyclical Learning Rates for Training Neural Networks, 2017, section 3.3; with exponential growth and a
smoothed loss as in Gugger, How Do You Find A Good Learning Rate, 2018.
"""

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import nn
from torch.optim import Optimizer

from cnntrain.config.schema import LrFindSettings
from cnntrain.errors import DivergedError, UserError
from cnntrain.randomness import fork_generators
from cnntrain.train.loop import Logger, Trainer, train_epoch
from cnntrain.train.nonfinite import NonFiniteGuard
from cnntrain.train.schedule import Schedule
from cnntrain.train.signals import StopFlag
from cnntrain.train.state import TrainState

log = logging.getLogger("cnntrain")
SMOOTHING = 0.8  # weight of the past in the smoothed loss
BASELINE_STEPS = 10  # first steps, whose losses show only the variation between batches
DIVERGED_SHARE = 0.25  # share of its decrease that the loss must lose again to count as diverged
MIN_DECREASE = 0.05  # relative decrease of the loss below which the test is inconclusive


@dataclass(frozen=True)
class RangeTest:
    """Results of a range test.

    Attributes:
        rates: learning rate of each step, increasing.
        losses: loss of each mini-batch before its step; NaN, always the last value, if it was not finite.
        complete: False if the deadline ended the test before the highest rate and before divergence.
    """

    rates: list[float]
    losses: list[float]
    complete: bool = True

    @property
    def smoothed(self) -> list[float]:
        """Exponential moving average of the losses with bias correction (Kingma and Ba 2015, section 3)."""
        average, result = 0.0, []
        for step, loss in enumerate(self.losses):
            average = SMOOTHING * average + (1 - SMOOTHING) * loss
            result.append(average / (1 - SMOOTHING ** (step + 1)))
        return result

    @property
    def initial_loss(self) -> float:
        """Mean loss at the lowest rates."""
        return float(np.mean(self.losses[:BASELINE_STEPS]))

    @property
    def diverged_at(self) -> float | None:
        """First rate at which the loss was not finite or had lost a quarter of its decrease, beyond noise."""
        noise = 3 * self._baseline_std + 0.02 * abs(self.initial_loss)
        lowest = self.initial_loss
        for rate, loss in list(zip(self.rates, self.smoothed, strict=True))[BASELINE_STEPS:]:
            lowest = min(lowest, loss)
            if not loss <= lowest + max(noise, DIVERGED_SHARE * (self.initial_loss - lowest)):
                return rate
        return None

    @property
    def lowest_step(self) -> int:
        """Step with the lowest smoothed loss before divergence."""
        diverged_at = self.diverged_at
        end = self.rates.index(diverged_at) if diverged_at else len(self.rates)
        if end <= BASELINE_STEPS:
            return 0
        return BASELINE_STEPS + int(np.argmin(self.smoothed[BASELINE_STEPS:end]))

    @property
    def decrease(self) -> float:
        """Relative decrease from the initial to the lowest smoothed loss."""
        return (self.initial_loss - self.smoothed[self.lowest_step]) / max(abs(self.initial_loss), 1e-12)

    @property
    def decreases_from(self) -> float | None:
        """First rate at which the loss had decreased noticeably; None if it never did."""
        step = self._decreases_at
        return None if step is None else self.rates[step]

    @property
    def rate_sum_to_decrease(self) -> float | None:
        """Sum of the learning rates of all steps until the loss had decreased noticeably; None if it never did."""
        step = self._decreases_at
        return None if step is None else sum(self.rates[:step])

    @property
    def _decreases_at(self) -> int | None:
        threshold = self.initial_loss - self._noticeable_decrease
        return next((step for step, loss in enumerate(self.smoothed) if loss < threshold), None)

    @property
    def suggestion(self) -> float | None:
        """A tenth of the rate of divergence, or of the highest rate; None if the loss did not decrease."""
        return (self.diverged_at or self.rates[-1]) / 10 if self._has_learned else None

    @property
    def steepest(self) -> float | None:
        """Rate at which the loss decreases most per relative growth of the rate; None if it did not decrease.

        The loss is smoothed forwards and backwards to avoid a lag.
        """
        if not self._has_learned:
            return None
        end = self.lowest_step + 1
        twice_smoothed = RangeTest(self.rates[:end], self.smoothed[:end][::-1]).smoothed[::-1]
        slopes = np.gradient(twice_smoothed, np.log(self.rates[:end]))
        first = BASELINE_STEPS // 2
        return self.rates[first + int(np.argmin(slopes[first:]))]

    @property
    def _baseline_std(self) -> float:
        return float(np.std(self.losses[:BASELINE_STEPS]))

    @property
    def _noticeable_decrease(self) -> float:
        """Decrease of the loss that exceeds its variation between batches."""
        return max(2 * self._baseline_std, MIN_DECREASE * abs(self.initial_loss))

    @property
    def _has_learned(self) -> bool:
        return self.initial_loss - self.smoothed[self.lowest_step] >= self._noticeable_decrease  # False for NaN


class _ExponentialGrowth(Schedule):
    """Grow from `lowest` to `highest` by a constant factor per step; the peak learning rate is 1."""

    def __init__(self, lowest: float, highest: float, steps: int) -> None:
        super().__init__(total_steps=steps, steps_per_epoch=steps)
        self.lowest, self.ratio = lowest, highest / lowest

    def multiplier(self, step: int) -> float:
        return self.lowest * self.ratio ** (step / max(self.total_steps - 1, 1))


class _EndTest(Exception):
    """Ends the range test early."""


class _LossRecorder(Logger):
    """Record the loss of every step; end the test at divergence or at the deadline."""

    def __init__(self, ends_at: float) -> None:
        self.ends_at = ends_at
        self.test = RangeTest([], [])

    def log_step(self, step: int, epoch: int, values: dict[str, float]) -> None:
        self.test.rates.append(values["lr"])
        self.test.losses.append(values["loss"])
        if len(self.test.rates) > BASELINE_STEPS and self.test.diverged_at:
            raise _EndTest
        if time.monotonic() > self.ends_at:
            self.test = replace(self.test, complete=False)
            raise _EndTest


def range_test(
    trainer: Trainer,
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], Optimizer],
    limits: LrFindSettings,
    stop: StopFlag,
    ends_at: float = math.inf,
) -> RangeTest:
    """Run the range test on a copy of `model`; the model and the random generators are not changed.

    Args:
        make_optimizer: builds the configured optimizer. Its learning rate is ignored, except for the ratio between
            layers.
        limits: lowest and highest learning rate, and the number of steps.
        ends_at: deadline in `time.monotonic()` seconds.
    """
    compute, steps = trainer.compute, limits.steps
    model = copy.deepcopy(model).to(memory_format=compute.memory_format)
    optimizer = make_optimizer(model)
    for group in optimizer.param_groups:
        group["peak_lr"] = group.get("lr_scale", 1.0)
    scaler = compute.loss_scaler()
    schedule = _ExponentialGrowth(limits.lowest, limits.highest, steps)
    state = TrainState(model, optimizer, schedule, scaler)
    plan = replace(trainer.plan, total_steps=steps, log_every_steps=1, save_every_steps=None)
    trainer = replace(trainer, plan=plan)
    recorder, progress = _LossRecorder(ends_at), state.progress
    guard = NonFiniteGuard(compute.device, scaler is not None, lambda batch: DivergedError(""))
    with fork_generators(compute.device):
        try:
            while progress.step < steps:
                train_epoch(trainer, state, trainer.task.meter(), recorder, guard, stop)
                progress.epoch, progress.batch = progress.epoch + 1, 0
        except DivergedError:
            recorder.test.rates.append(optimizer.param_groups[0]["lr"])
            recorder.test.losses.append(math.nan)
        except _EndTest:
            pass
    return recorder.test


def choose_learning_rate(test: RangeTest) -> float:
    """Return the learning rate for `optimizer.lr=auto`, rounded to two digits; log the reason."""
    if test.suggestion is None:
        raise UserError(
            f"optimizer.lr=auto: the loss does not decrease at any learning rate from {test.rates[0]:.1g} to "
            f"{test.rates[-1]:.1g}; set a number; `cnntrain overfit` and `cnntrain check` find out why a network does "
            "not learn"
        )
    rate = float(f"{test.suggestion:.2g}")
    end = f"{test.diverged_at:.2g}, where the loss diverges" if test.diverged_at else f"{test.rates[-1]:.2g}"
    log.info("optimizer.lr=auto: using optimizer.lr=%g (a tenth of %s)", rate, end)
    return rate
