"""All that a training is at an instant: weights, optimizer, position, best score. Saved and loaded as one."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.train.ema import MovingAverage
from cnntrain.train.moments import fit_state
from cnntrain.train.schedule import Schedule


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        epoch: index of the current epoch, which equals the number of finished epochs.
        batch: number of batches done in the current epoch.
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
        """Load weights, moments and position from `state`; the optimizer's settings stay as configured.

        Learning rate and momentum keep the values of the last step until the schedule sets them for the next step.

        Raises:
            ValueError, TypeError, LookupError, AttributeError, RuntimeError: the state is not one of such a training.
        """
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["average"] or state["model"])
        configured = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(fit_state(self.optimizer, state["optimizer"]))
        # With fp16 the first steps may all have been skipped.
        if (
            state["progress"]["step"]
            and not (self.optimizer.state or self.scaler)
            and _keeps_moments(self.optimizer)
        ):
            raise TypeError("the optimizer's moments are missing")
        moves_momentum = self.schedule.momentum(0) is not None
        for group, own in zip(self.optimizer.param_groups, configured, strict=True):
            of_last_step: dict[str, Any] = {"lr": float(group["lr"])}
            if moves_momentum and own.get("momentum"):
                of_last_step["momentum"] = float(group["momentum"])
            elif moves_momentum and "betas" in own:
                of_last_step["betas"] = (float(group["betas"][0]), own["betas"][1])
            group.update({**own, **of_last_step})
        if (
            state["schedule"].keys() == self.schedule.state().keys()
        ):  # else another schedule, which begins afresh
            self.schedule.load_state(state["schedule"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(_numbers(state["scaler"], self.scaler.state_dict()))
        self.progress = Progress(**state["progress"])
        # Copy, because tensors from a file may share memory.
        self.meter = {
            name: value.clone(memory_format=torch.contiguous_format) for name, value in state["meter"].items()
        }


def _numbers(values: Mapping[str, Any], own: Mapping[str, float]) -> dict[str, Any]:
    """Validate the numbers of a loss scaler's state.

    Raises:
        TypeError: a number is not finite or out of range.
    """
    for name in own:
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2.0**127:
            raise TypeError(f"scaler.{name} must be a number from 0 to 2**127, got {value!r}")
    return {name: values[name] for name in own}


def _keeps_moments(optimizer: Optimizer) -> bool:
    """Whether it is one of torch's that keeps something of each parameter from its first step on."""
    plain_sgd = isinstance(optimizer, torch.optim.SGD) and not any(
        g["momentum"] for g in optimizer.param_groups
    )
    return type(optimizer).__module__.startswith("torch.optim") and not plain_sgd
