"""Learning rate schedules as functions of the step: `factor(step)` multiplies the peak learning rate.

All but `Plateau` are stateless, so a resumed run needs only its step. `total_steps` and `steps_per_epoch` are passed in
addition to the configured arguments. The annotations are checked when a schedule is built from a config.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from cnntrain.config.schema import Within

Fraction = Annotated[float, Within(0, 1)]
NonNegative = Annotated[float, Within(0)]


class Schedule:
    """Base class: linear warm-up, then `shape`.

    Args:
        total_steps: number of optimizer steps of the whole training.
        steps_per_epoch: number of optimizer steps per epoch.
        warmup_epochs: epochs over which the factor grows linearly from near 0 to 1; fractions are allowed.
    """

    watches_validation = False

    def __init__(self, *, total_steps: int, steps_per_epoch: int, warmup_epochs: NonNegative = 0) -> None:
        self.total_steps = max(total_steps, 1)
        self.warmup_steps = min(round(warmup_epochs * steps_per_epoch), self.total_steps)

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate at step 0, 1, ..., total_steps - 1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        remaining = max(self.total_steps - self.warmup_steps, 1)
        return self.shape(min((step - self.warmup_steps) / remaining, 1.0))

    def shape(self, progress: float) -> float:
        """Return the factor after warm-up; `progress` in [0, 1) is the completed fraction of the remaining steps."""
        return 1.0

    def momentum(self, step: int) -> float | None:
        """Return the momentum (SGD) or the first beta (Adam) at this step; None keeps the configured value."""
        return None

    def observe(self, val_loss: float) -> None:
        """Update the schedule after an epoch."""
        return None

    def state(self) -> dict[str, float]:
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        return None


class Constant(Schedule):
    """Keep the configured learning rate."""


class Step(Schedule):
    """Multiply by `factor` at each milestone (fractions of the training)."""

    def __init__(
        self,
        *,
        milestones: Sequence[Fraction],
        factor: Fraction,
        total_steps: int,
        steps_per_epoch: int,
        warmup_epochs: NonNegative = 0,
    ) -> None:
        super().__init__(total_steps=total_steps, steps_per_epoch=steps_per_epoch, warmup_epochs=warmup_epochs)
        self.milestones, self.gamma = sorted(milestones), factor

    def factor(self, step: int) -> float:
        passed = sum(step >= round(milestone * self.total_steps) for milestone in self.milestones)
        warmup = (step + 1) / self.warmup_steps if step < self.warmup_steps else 1.0
        return warmup * self.gamma**passed


class Cosine(Schedule):
    """Half a cosine from 1 to `final` (Loshchilov and Hutter, SGDR, 2017, equation 5, one period)."""

    def __init__(
        self, *, final: Fraction, total_steps: int, steps_per_epoch: int, warmup_epochs: NonNegative = 0
    ) -> None:
        super().__init__(total_steps=total_steps, steps_per_epoch=steps_per_epoch, warmup_epochs=warmup_epochs)
        self.final = final

    def shape(self, progress: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


class OneCycle(Schedule):
    """Anneal from `start` up to 1 and down to `start * final`; the momentum goes from 0.95 to 0.85 and back.

    Source: Smith and Topin, Super-Convergence, 2018; two phases as in torch's OneCycleLR.
    """

    def __init__(
        self,
        *,
        warmup: Fraction,
        start: Fraction,
        final: Fraction,
        shape: Literal["cosine", "linear"],
        total_steps: int,
        steps_per_epoch: int,
    ) -> None:
        super().__init__(total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        self.peak_step = max(warmup * self.total_steps - 1, 0)
        self.start, self.last, self.kind = start, start * final, shape

    def _anneal(self, step: int, first: float, peak: float, last: float) -> float:
        """Interpolate between `first`, `peak` at the peak step, and `last` at the last step."""
        if step < self.peak_step:
            before, after, part = first, peak, step / self.peak_step
        else:
            before, after = peak, last
            part = min((step - self.peak_step) / max(self.total_steps - 1 - self.peak_step, 1), 1.0)
        if self.kind == "cosine":
            part = 0.5 * (1 - math.cos(math.pi * part))
        return before + (after - before) * part

    def factor(self, step: int) -> float:
        return self._anneal(step, self.start, 1.0, self.last)

    def momentum(self, step: int) -> float | None:
        return self._anneal(step, 0.95, 0.85, 0.95)


class Plateau(Schedule):
    """Multiply by `factor` when the validation loss has not decreased for more than `patience` epochs.

    Args:
        threshold: relative decrease of the loss that counts as an improvement.
        minimum: smallest factor.
    """

    watches_validation = True

    def __init__(
        self,
        *,
        factor: Fraction,
        patience: Annotated[int, Within(0)],
        threshold: Fraction,
        minimum: Fraction,
        total_steps: int,
        steps_per_epoch: int,
        warmup_epochs: NonNegative = 0,
    ) -> None:
        super().__init__(total_steps=total_steps, steps_per_epoch=steps_per_epoch, warmup_epochs=warmup_epochs)
        self.gamma, self.patience, self.threshold, self.minimum = factor, patience, threshold, minimum
        self.scale, self.best, self.bad_epochs = 1.0, math.inf, 0

    def shape(self, progress: float) -> float:
        return self.scale

    def observe(self, val_loss: float) -> None:
        if val_loss < self.best * (1 - self.threshold):
            self.best, self.bad_epochs = val_loss, 0
            return
        self.bad_epochs += 1
        if self.bad_epochs > self.patience:
            self.scale, self.bad_epochs = max(self.scale * self.gamma, self.minimum), 0

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "best": self.best, "bad_epochs": self.bad_epochs}

    def load_state(self, state: dict[str, float]) -> None:
        self.scale, self.best, self.bad_epochs = state["scale"], state["best"], int(state["bad_epochs"])
