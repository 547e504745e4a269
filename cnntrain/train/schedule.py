"""Learning rate schedules as functions of the step: `multiplier(step)` times the peak learning rate.

All but `Plateau` are stateless, so a resumed run needs only its step. The fields are the keys of the config group
`schedule`, checked against their annotations; `total_steps` and `steps_per_epoch` are passed in addition.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from cnntrain.config.schema import Within

Fraction = Annotated[float, Within(0, 1)]
NonNegative = Annotated[float, Within(0)]


@dataclass(kw_only=True)
class Schedule:
    """Base class: linear warm-up, then `after_warmup`.

    Args:
        total_steps: number of optimizer steps of the whole training.
        steps_per_epoch: number of optimizer steps per epoch.
        warmup_epochs: epochs over which the multiplier grows linearly from near 0 to 1; fractions are allowed.
    """

    total_steps: int
    steps_per_epoch: int
    warmup_epochs: NonNegative = 0

    def __post_init__(self) -> None:
        self.total_steps = max(self.total_steps, 1)
        self.warmup_steps = min(round(self.warmup_epochs * self.steps_per_epoch), self.total_steps)

    def multiplier(self, step: int) -> float:
        """Return the factor of the learning rate at step 0, 1, ..., total_steps - 1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        remaining = max(self.total_steps - self.warmup_steps, 1)
        return self.after_warmup(min((step - self.warmup_steps) / remaining, 1.0))

    def after_warmup(self, progress: float) -> float:
        """Return the multiplier at `progress` in [0, 1), the completed fraction of the steps after the warm-up."""
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


@dataclass(kw_only=True)
class Step(Schedule):
    """Multiply by `factor` at each milestone (fractions of the training)."""

    milestones: Sequence[Fraction]
    factor: Fraction

    def multiplier(self, step: int) -> float:
        passed = sum(step >= round(milestone * self.total_steps) for milestone in self.milestones)
        warmup = (step + 1) / self.warmup_steps if step < self.warmup_steps else 1.0
        return warmup * self.factor**passed


@dataclass(kw_only=True)
class Cosine(Schedule):
    """Half a cosine from 1 to `final` (Loshchilov and Hutter, SGDR, 2017, equation 5, one period)."""

    final: Fraction

    def after_warmup(self, progress: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(kw_only=True)
class OneCycle(Schedule):
    """Anneal from `start` up to 1 and down to `start * final`; the momentum goes from 0.95 to 0.85 and back.

    Source: Smith and Topin, Super-Convergence, 2018; two phases as in torch's OneCycleLR.
    """

    warmup_epochs: NonNegative = field(default=0, init=False)
    warmup: Fraction
    start: Fraction
    final: Fraction
    shape: Literal["cosine", "linear"]

    def _anneal(self, step: int, first: float, peak: float, last: float) -> float:
        """Interpolate between `first`, `peak` at the peak step, and `last` at the last step."""
        peak_step = max(self.warmup * self.total_steps - 1, 0)
        if step < peak_step:
            before, after, part = first, peak, step / peak_step
        else:
            before, after = peak, last
            part = min((step - peak_step) / max(self.total_steps - 1 - peak_step, 1), 1.0)
        if self.shape == "cosine":
            part = 0.5 * (1 - math.cos(math.pi * part))
        return before + (after - before) * part

    def multiplier(self, step: int) -> float:
        return self._anneal(step, self.start, 1.0, self.start * self.final)

    def momentum(self, step: int) -> float | None:
        return self._anneal(step, 0.95, 0.85, 0.95)


@dataclass(kw_only=True)
class Plateau(Schedule):
    """Multiply by `factor` when the validation loss has not decreased for more than `patience` epochs.

    Args:
        threshold: relative decrease of the loss that counts as an improvement.
        minimum: smallest multiplier.
    """

    factor: Fraction
    patience: Annotated[int, Within(0)]
    threshold: Fraction
    minimum: Fraction

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scale, self.best, self.bad_epochs = 1.0, math.inf, 0

    def after_warmup(self, progress: float) -> float:
        return self.scale

    def observe(self, val_loss: float) -> None:
        if val_loss < self.best * (1 - self.threshold):
            self.best, self.bad_epochs = val_loss, 0
            return
        self.bad_epochs += 1
        if self.bad_epochs > self.patience:
            self.scale, self.bad_epochs = max(self.scale * self.factor, self.minimum), 0

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "best": self.best, "bad_epochs": self.bad_epochs}

    def load_state(self, state: dict[str, float]) -> None:
        self.scale, self.best, self.bad_epochs = state["scale"], state["best"], int(state["bad_epochs"])
