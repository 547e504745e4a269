"""The learning-rate range test: how the loss answers while the rate grows from far too small to far too large.

Source: Smith, Cyclical Learning Rates for Training Neural Networks, 2017, section 3.3, with the rate growing
exponentially and a smoothed loss, as Gugger (How Do You Find A Good Learning Rate, 2018) made it known.
"""

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from cnntrain.augment.pipeline import Pipeline
from cnntrain.data.loader import Loader
from cnntrain.errors import DivergedError, UserError
from cnntrain.randomness import fork_generators
from cnntrain.tasks.task import Task
from cnntrain.train.device import Compute
from cnntrain.train.loop import NullLogger, Trainer, train_epoch
from cnntrain.train.nonfinite import NonFiniteGuard
from cnntrain.train.schedule import Schedule
from cnntrain.train.signals import StopFlag
from cnntrain.train.state import TrainingPlan, TrainState

log = logging.getLogger("cnntrain")
SMOOTHING = 0.8  # weight of the past in the smoothed loss
QUIET_STEPS = 10  # at the lowest rates, where the loss only shows how much batches differ
LOST = 0.25  # share of the loss's fall whose loss counts as divergence
LEAST_FALL = 0.05  # of the loss, below which the test tells nothing


@dataclass(frozen=True)
class RangeTest:
    """The loss of each mini-batch before its step, and the learning rate of that step, growing.

    Attributes:
        losses: NaN where not finite, which is then the last.
        complete: whether the test came to its highest rate or to a divergence before its time was over.
    """

    rates: list[float]
    losses: list[float]
    complete: bool = True

    @property
    def smoothed(self) -> list[float]:
        """Exponential moving average with its start corrected (Kingma and Ba 2015, section 3)."""
        average, result = 0.0, []
        for step, loss in enumerate(self.losses):
            average = SMOOTHING * average + (1 - SMOOTHING) * loss
            result.append(average / (1 - SMOOTHING ** (step + 1)))
        return result

    @property
    def start(self) -> float:
        """Mean loss at the lowest rates."""
        return float(np.mean(self.losses[:QUIET_STEPS]))

    @property
    def diverged_at(self) -> float | None:
        """The rate at which the loss was not finite, or had lost a quarter of what it had gained, beyond noise."""
        noise = 3 * float(np.std(self.losses[:QUIET_STEPS])) + 0.02 * abs(self.start)
        lowest = self.start
        for rate, loss in list(zip(self.rates, self.smoothed, strict=True))[QUIET_STEPS:]:
            lowest = min(lowest, loss)
            if not loss <= lowest + max(noise, LOST * (self.start - lowest)):
                return rate
        return None

    @property
    def lowest_at(self) -> int:
        """The step of the lowest smoothed loss before divergence."""
        end = self.rates.index(self.diverged_at) if self.diverged_at else len(self.rates)
        return QUIET_STEPS + int(np.argmin(self.smoothed[QUIET_STEPS:end])) if end > QUIET_STEPS else 0

    @property
    def fall(self) -> float:
        """Share of the starting loss that was gone at the lowest."""
        return (self.start - self.smoothed[self.lowest_at]) / max(abs(self.start), 1e-12)

    @property
    def _noticeable(self) -> float:
        """A fall of the loss that is more than its noise between batches."""
        return max(2 * float(np.std(self.losses[:QUIET_STEPS])), LEAST_FALL * abs(self.start))

    @property
    def _learned(self) -> bool:
        return self.start - self.smoothed[self.lowest_at] >= self._noticeable  # False for NaN

    @property
    def begins_at(self) -> float | None:
        """The rate at which the loss had fallen noticeably; None where it never did."""
        threshold = self.start - self._noticeable
        return next((r for r, loss in zip(self.rates, self.smoothed, strict=True) if loss < threshold), None)

    @property
    def first_way(self) -> float | None:
        """Sum of the rates of all steps until the loss had fallen noticeably: how far learning has to go to begin."""
        way = 0.0
        for rate, loss in zip(self.rates, self.smoothed, strict=True):
            if loss < self.start - self._noticeable:
                return way
            way += rate
        return None

    @property
    def suggestion(self) -> float | None:
        """A tenth of the rate of divergence, or of the highest; None where nothing was learned."""
        if not self._learned:
            return None
        return (self.diverged_at or self.rates[-1]) / 10

    @property
    def steepest(self) -> float | None:
        """The rate at which the loss falls most for a growth of the rate; None where nothing was learned.

        Smoothed forwards and backwards, so that it does not lag.
        """
        if not self._learned:
            return None
        end = self.lowest_at + 1
        back = RangeTest(self.rates[:end], self.smoothed[:end][::-1]).smoothed[::-1]
        slopes = np.gradient(back, np.log(self.rates[:end]))
        first = QUIET_STEPS // 2
        return self.rates[first + int(np.argmin(slopes[first:]))]


class _Growing(Schedule):
    """From `lowest` to `highest` by the same factor each step; the optimizer's own rate is 1."""

    def __init__(self, lowest: float, highest: float, steps: int) -> None:
        super().__init__(total_steps=steps, steps_per_epoch=steps)
        self.lowest, self.ratio = lowest, highest / lowest

    def factor(self, step: int) -> float:
        return self.lowest * self.ratio ** (step / max(self.total_steps - 1, 1))


class _Enough(Exception):
    """The test has seen what it needs."""


class _Readings(NullLogger):
    """A journal that keeps the loss of every step, and ends the test at divergence or when time is over."""

    def __init__(self, ends_at: float) -> None:
        self.ends_at = ends_at
        self.test = RangeTest([], [])

    def log_step(self, step: int, epoch: int, batch: int, values: dict[str, float]) -> None:
        self.test.rates.append(values["lr"])
        self.test.losses.append(values["loss"])
        if len(self.test.rates) > QUIET_STEPS and self.test.diverged_at:
            raise _Enough
        if time.monotonic() > self.ends_at:
            self.test = replace(self.test, complete=False)
            raise _Enough


def range_test(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], Optimizer],
    training: Loader,
    pipeline: Pipeline,
    task: Task,
    compute: Compute,
    plan: TrainingPlan,
    stop: StopFlag,
    lowest: float = 1e-7,
    highest: float = 10.0,
    steps: int = 100,
    ends_at: float = math.inf,
) -> RangeTest:
    """Train a copy of `model` for `steps` steps with the training's own step; weights, statistics and RNG stay.

    Args:
        make_optimizer: the optimizer as configured; its learning rate does not matter, a layer's share of it does.
        lowest, highest: learning rates between which it grows.
        ends_at: time.monotonic() at which to stop before the end.
    """
    model = copy.deepcopy(model).to(memory_format=compute.memory_format)
    optimizer = make_optimizer(model)
    for group in optimizer.param_groups:
        group["peak_lr"] = group.get("lr_scale", 1.0)
    scaler = torch.amp.GradScaler(compute.device.type) if compute.precision == "fp16" else None
    state = TrainState(model, optimizer, _Growing(lowest, highest, steps), scaler)
    plan = replace(plan, total_steps=steps, log_every_steps=1, save_every_steps=None)
    trainer = Trainer(task, pipeline, compute, plan, training)
    journal, progress = _Readings(ends_at), state.progress
    finite = NonFiniteGuard(compute.device, scaler is not None, lambda batch: DivergedError(""))
    with fork_generators(compute.device):
        try:
            while progress.step < steps:
                train_epoch(trainer, state, task.meter(), journal, finite, stop)
                progress.epoch, progress.batch = progress.epoch + 1, 0
        except DivergedError:
            journal.test.rates.append(optimizer.param_groups[0]["lr"])
            journal.test.losses.append(math.nan)
        except _Enough:
            pass
    return journal.test


def settle(test: RangeTest) -> float:
    """What `optimizer.lr=auto` comes to, in two digits; the log says why.

    Raises:
        UserError: the loss fell at no rate.
    """
    if test.suggestion is None:
        raise UserError(
            f"optimizer.lr=auto: the loss falls at no learning rate from {test.rates[0]:.1g} to {test.rates[-1]:.1g}; "
            "set a number; `cnntrain overfit` and `cnntrain check` find what keeps a network from learning"
        )
    rate = float(f"{test.suggestion:.2g}")
    reason = (
        f"the loss diverges at {test.diverged_at:.2g}" if test.diverged_at else "the loss diverges nowhere"
    )
    log.info("optimizer.lr=auto: %g, a tenth of the highest that is of use: %s in a range test", rate, reason)
    return rate
