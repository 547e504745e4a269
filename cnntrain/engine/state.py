"""All that a training is at an instant: weights, optimizer, position, best score. Saved and loaded as one."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.engine.ema import MovingAverage
from cnntrain.engine.schedule import Schedule


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        epoch: the epoch under way, from 0; `batch`: how many of its batches have been seen.
        step: optimizer steps done.
        images: training images seen in all.
        wall_s: seconds spent, over all sittings.
        best: metrics of the best epoch, with `epoch`; empty before the first validation.
        epochs_since_best: for early stopping.
        finished: the training has come to its end.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    images: int = 0
    wall_s: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    epochs_since_best: int = 0
    finished: bool = False


@dataclass
class TrainState:
    """The mutable parts of a training."""

    model: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler | None = None  # only for fp16
    average: MovingAverage | None = None
    progress: Progress = field(default_factory=Progress)
    meter: dict[str, Tensor] = field(
        default_factory=dict
    )  # sums over the part of the epoch that has been seen

    @property
    def judged(self) -> nn.Module:
        """The model that is validated and kept: the average where there is one."""
        return self.average.model if self.average else self.model

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "progress": asdict(self.progress),
            "meter": self.meter,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take weights, moments and position from `state`; learning rate and the like stay as configured."""
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["average"] or state["model"])
        configured = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, configured, strict=True):
            group.update({**own, "lr": group["lr"]})  # settings stay as configured; `lr` is the last step's
        if (
            state["schedule"].keys() == self.schedule.state().keys()
        ):  # else another schedule, which begins afresh
            self.schedule.load_state(state["schedule"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.meter = state["meter"]
