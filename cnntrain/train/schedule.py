"""Learning-rate schedules as functions of the step: `factor(step)` is what the peak learning rate is multiplied by.

All but `Plateau` have no state, so a resumed run needs nothing but its step. Each is built with two facts beside its
own settings: `total_steps` and `steps_per_epoch`.
"""

import math
from collections.abc import Sequence

from cnntrain.errors import UserError


class Schedule:
    """A learning rate over time.

    Args:
        total_steps: optimizer steps of the whole training.
        steps_per_epoch: optimizer steps of one epoch.
        warmup_epochs: epochs over which the factor grows linearly from near 0 to 1; fractions allowed.
    """

    watches_validation = False

    def __init__(self, *, total_steps: int, steps_per_epoch: int, warmup_epochs: float = 0) -> None:
        if warmup_epochs < 0 or not math.isfinite(warmup_epochs):
            raise UserError(f"schedule.warmup_epochs: must be >= 0, got {warmup_epochs}")
        self.total_steps = max(total_steps, 1)
        self.warmup_steps = min(round(warmup_epochs * steps_per_epoch), self.total_steps)

    def factor(self, step: int) -> float:
        """What to multiply the learning rate by at step 0, 1, ..., total_steps - 1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        remaining = max(self.total_steps - self.warmup_steps, 1)
        return self.shape(min((step - self.warmup_steps) / remaining, 1.0))

    def shape(self, progress: float) -> float:
        """The factor once warm-up is over; `progress` in [0, 1) is the part of the rest that lies behind."""
        return 1.0

    def momentum(self, step: int) -> float | None:
        """The momentum (SGD) or first beta (Adam) at this step; None leaves it as configured."""
        return None

    def observe(self, val_loss: float) -> None:
        """Told once per epoch."""
        return None

    def state(self) -> dict[str, float]:
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        return None


class Constant(Schedule):
    """The learning rate as configured, from first step to last."""


class Step(Schedule):
    """Multiplied by `factor` at each milestone (fractions of the training)."""

    def __init__(
        self,
        *,
        milestones: Sequence[float],
        factor: float,
        total_steps: int,
        steps_per_epoch: int,
        warmup_epochs: float = 0,
    ) -> None:
        super().__init__(
            total_steps=total_steps, steps_per_epoch=steps_per_epoch, warmup_epochs=warmup_epochs
        )
        _in_unit("schedule.factor", factor)
        for milestone in milestones:
            _in_unit("schedule.milestones", milestone)
        self.milestones, self.gamma = sorted(milestones), factor

    def factor(self, step: int) -> float:
        passed = sum(step >= round(milestone * self.total_steps) for milestone in self.milestones)
        warmup = (step + 1) / self.warmup_steps if step < self.warmup_steps else 1.0
        return warmup * self.gamma**passed


class Cosine(Schedule):
    """Half a cosine from 1 to `final` (Loshchilov and Hutter, SGDR, 2017, equation 5, one period)."""

    def __init__(
        self, *, final: float, total_steps: int, steps_per_epoch: int, warmup_epochs: float = 0
    ) -> None:
        super().__init__(
            total_steps=total_steps, steps_per_epoch=steps_per_epoch, warmup_epochs=warmup_epochs
        )
        _in_unit("schedule.final", final)
        self.final = final

    def shape(self, progress: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


class OneCycle(Schedule):
    """From `start` up to 1 and down to `start * final`, the momentum between 0.95 and 0.85 the other way round.

    Source: Smith and Topin, Super-Convergence, 2018; two phases as in torch's OneCycleLR.
    """

    def __init__(
        self, *, warmup: float, start: float, final: float, shape: str, total_steps: int, steps_per_epoch: int
    ) -> None:
        super().__init__(total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        for key, value in (("warmup", warmup), ("start", start), ("final", final)):
            _in_unit(f"schedule.{key}", value)
        if shape not in ("cosine", "linear"):
            raise UserError(f"schedule.shape: {shape!r} is not one of cosine, linear")
        self.peak_step = max(warmup * self.total_steps - 1, 0)
        self.start, self.last, self.kind = start, start * final, shape

    def _anneal(self, step: int, ends: tuple[float, float, float]) -> float:
        """From ends[0] over ends[1] at the peak to ends[2] at the last step."""
        if step < self.peak_step:
            before, after, part = ends[0], ends[1], step / self.peak_step
        else:
            before, after = ends[1], ends[2]
            part = min((step - self.peak_step) / max(self.total_steps - 1 - self.peak_step, 1), 1.0)
        if self.kind == "cosine":
            part = 0.5 * (1 - math.cos(math.pi * part))
        return before + (after - before) * part

    def factor(self, step: int) -> float:
        return self._anneal(step, (self.start, 1.0, self.last))

    def momentum(self, step: int) -> float | None:
        return self._anneal(step, (0.95, 0.85, 0.95))


class Plateau(Schedule):
    """Multiplied by `factor` once the validation loss has not fallen for more than `patience` epochs."""

    watches_validation = True

    def __init__(
        self,
        *,
        factor: float,
        patience: int,
        threshold: float,
        minimum: float,
        total_steps: int,
        steps_per_epoch: int,
        warmup_epochs: float = 0,
    ) -> None:
        super().__init__(
            total_steps=total_steps, steps_per_epoch=steps_per_epoch, warmup_epochs=warmup_epochs
        )
        _in_unit("schedule.factor", factor)
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


def _in_unit(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{key}: must be >= 0 and <= 1, got {value}")
