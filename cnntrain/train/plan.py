"""What a training follows from its first step to its last."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingPlan:
    """How a training runs: plain numbers, resolved from the settings and the data.

    `batch_size` is that of all processes together, whatever their number.
    """

    seed: int
    batch_size: int
    batches_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    accumulate: int = 1
    clip_grad_norm: float | None = None
    early_stopping: int | None = None
    read_every_steps: int = 20
    save_every_steps: int | None = None
    limit_batches: int | None = None
    drop_last: bool = False
    unfreeze_epoch: int | None = None  # counted from 1, as users see it
    processes: int = 1

    @property
    def sums_losses(self) -> bool:
        """Whether what a step's gradients are divided by is known only when all of its batches have been seen."""
        return self.accumulate > 1 or self.processes > 1
