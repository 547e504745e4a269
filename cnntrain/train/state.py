"""The state of a training run, its plan, and the moving average of its weights.

Fused optimizer kernels do not check shapes and strides. A moment with another shape, or with overlapping elements (a
stride of 0), would cause out-of-bounds memory access. `validate_optimizer_state` therefore checks and copies all
tensors from a file; they are never used directly.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.config.schema import Within
from cnntrain.train.schedule import Schedule

MAX_COUNT = 2**53  # upper bound of counters in a checkpoint
Count = Annotated[int, Within(0, MAX_COUNT)]


@dataclass(frozen=True)
class TrainingPlan:
    """Length and batching of a training run, resolved from the settings and the size of the dataset.

    Attributes:
        batch_size: images per batch, summed over all ranks.
        accumulate: batches per optimizer step.
        early_stopping: patience in epochs; None to disable it.
        log_every_steps: number of steps between two readings of the loss, each of which is a host sync.
        unfreeze_epoch: first epoch in which frozen layers are trained, counted from 1; None for never.
        processes: number of ranks.
    """

    seed: int
    batch_size: int
    batches_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    accumulate: int = 1
    clip_grad_norm: float | None = None
    early_stopping: int | None = None
    log_every_steps: int = 20
    save_every_steps: int | None = None
    limit_batches: int | None = None
    drop_last: bool = False
    unfreeze_epoch: int | None = None
    processes: int = 1

    @property
    def sums_losses(self) -> bool:
        """Whether the divisor of a step's gradients is known only after all of its batches."""
        return self.accumulate > 1 or self.processes > 1


@dataclass
class Progress:
    """Position and best result of a training run.

    Attributes:
        epoch: index of the current epoch, which equals the number of finished epochs.
        batch: number of finished batches in the current epoch.
        step: number of optimizer steps.
        images: number of training images seen.
        wall_s: training time in seconds, summed over all resumed runs.
        best: metrics of the best epoch, with `epoch` and `step`; empty before the first validation.
        epochs_since_best: number of epochs since the best one, for early stopping.
        finished: whether training is complete.
    """

    epoch: Count = 0
    batch: Count = 0
    step: Count = 0
    images: Count = 0
    wall_s: Annotated[float, Within(0, MAX_COUNT)] = 0.0
    best: dict[str, float] = field(default_factory=dict)
    epochs_since_best: Count = 0
    finished: bool = False


class ModelEMA:
    """An exponential moving average of a model's weights (Polyak and Juditsky 1992).

    `average += (1 - decay) * (weights - average)`. The decay is at most (1 + step) / (10 + step), so that the initial
    weights are forgotten soon. Buffers (BatchNorm's running statistics) are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for own, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            copies, buffers = by_dtype.setdefault(own.dtype, ([], []))
            copies.append(own)
            buffers.append(buffer)
        for copies, buffers in by_dtype.values():  # one kernel per dtype on CUDA
            torch._foreach_copy_(copies, buffers)  # pyright: ignore[reportPrivateImportUsage]


@dataclass
class TrainState:
    """The mutable state of a training run, saved to and loaded from checkpoints.

    Attributes:
        scaler: loss scaler; only with fp16.
        ema: only with `ema_decay`.
        meter: sums of the training metrics over the finished part of the current epoch.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler | None = None
    ema: ModelEMA | None = None
    progress: Progress = field(default_factory=Progress)
    meter: dict[str, Tensor] = field(default_factory=dict)

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated and tested: the moving average if there is one."""
        return self.ema.model if self.ema else self.model

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "progress": asdict(self.progress),
            "meter": self.meter,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load weights, optimizer state and progress; the optimizer's settings stay as configured.

        Learning rate and momentum keep the values of the last step until the schedule sets them for the next step.

        Raises:
            ValueError, TypeError, LookupError, AttributeError, RuntimeError: the state does not fit this run.
        """
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.model.load_state_dict(state["ema"] or state["model"])
        has_trained = state["progress"]["step"] > 0 and not self.scaler  # with fp16 all steps may have been skipped
        moves_momentum = self.schedule.momentum(0) is not None
        optimizer_state = validate_optimizer_state(self.optimizer, state["optimizer"], has_trained, moves_momentum)
        self.optimizer.load_state_dict(optimizer_state)
        if state["schedule"].keys() == self.schedule.state().keys():  # otherwise a new schedule, which starts afresh
            self.schedule.load_state(state["schedule"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(_validate_scaler_state(state["scaler"], self.scaler.state_dict()))
        self.progress = Progress(**state["progress"])
        # Copy, because tensors from a file may share memory.
        self.meter = {name: _clone(value) for name, value in state["meter"].items()}


def validate_optimizer_state(
    optimizer: Optimizer, saved: Mapping[str, Any], has_trained: bool = False, moves_momentum: bool = True
) -> dict[str, Any]:
    """Return a state dict for `optimizer.load_state_dict` with validated copies of the tensors in `saved`.

    The settings are those of `optimizer`, except for the learning rate of the last step.

    Args:
        has_trained: the saved optimizer has made a step, so it has the moments of at least one parameter.
        moves_momentum: the schedule changes the momentum (the first of `betas`), so it is that of the last step too.

    Raises:
        ValueError: the parameter groups do not match.
        TypeError: a moment is missing, has another shape or type, or is not finite.
    """
    groups = _validate_groups(optimizer, saved["param_groups"], moves_momentum)
    if not isinstance(saved["state"], Mapping):
        raise TypeError("the optimizer's state is not a mapping")
    keys = [key for group in groups for key in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameter_of = dict(zip(keys, parameters, strict=True))
    expected = _state_after_a_step(optimizer)
    if has_trained and not saved["state"] and any((expected or {}).values()):
        raise TypeError("the optimizer's moments are missing")
    state: dict[Any, dict[str, Any]] = {}
    for key, values in saved["state"].items():
        if key not in parameter_of or not isinstance(values, Mapping):
            raise TypeError(f"the state has a parameter {key!r} that the optimizer does not have")
        if expected is None:
            state[key] = {n: _clone(v) if isinstance(v, Tensor) else v for n, v in values.items()}
        else:
            state[key] = _fill(expected.get(parameter_of[key], {}), values) if values else {}
    return {"state": state, "param_groups": groups}


def _validate_groups(optimizer: Optimizer, saved: Any, moves_momentum: bool) -> list[dict[str, Any]]:
    if not isinstance(saved, Sequence) or not all(isinstance(group, Mapping) for group in saved):
        raise TypeError("the parameter groups are not a list")
    if len(saved) != len(optimizer.param_groups):
        raise ValueError("the number of parameter groups does not match")
    groups, seen = [], set()
    for theirs, own in zip(saved, optimizer.param_groups, strict=True):
        keys = theirs["params"]
        if not isinstance(keys, list) or not all(type(key) is int for key in keys):
            raise TypeError("the parameters of a group are not a list of integers")
        if len(keys) != len(own["params"]) or seen & set(keys) or len(set(keys)) < len(keys):
            raise ValueError("the parameters of a group do not match")
        seen |= set(keys)
        group = {**own, "params": keys, "lr": _number("lr", theirs["lr"])}
        if moves_momentum and own.get("momentum"):
            group["momentum"] = _number("momentum", theirs["momentum"])
        elif moves_momentum and "betas" in own:
            betas = theirs["betas"]
            if not isinstance(betas, list | tuple) or len(betas) != 2:
                raise TypeError(f"betas must be two numbers, got {betas!r}")
            group["betas"] = (_number("betas", betas[0]), own["betas"][1])
        groups.append(group)
    return groups


def _state_after_a_step(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]] | None:
    """Return the state that a copy of the optimizer has for each parameter after a step with gradients of zero.

    None for a user-defined optimizer, whose state may change from step to step.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    twin_of = {
        parameter: torch.zeros_like(parameter, requires_grad=True)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    groups = [{**group, "params": [twin_of[p] for p in group["params"]]} for group in optimizer.param_groups]
    twin_optimizer = cast("Any", type(optimizer))(groups)
    for twin in twin_of.values():
        twin.grad = torch.zeros_like(twin)
    twin_optimizer.step()
    return {parameter: dict(twin_optimizer.state.get(twin, {})) for parameter, twin in twin_of.items()}


def _fill(expected: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Copy saved moments into the tensors of `expected`, which keep their shape, dtype and memory format."""
    for name, own in expected.items():
        if not isinstance(own, Tensor):
            continue
        value = saved.get(name)
        if not isinstance(value, Tensor) or value.shape != own.shape:
            actual = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a tensor of shape {tuple(own.shape)}, got {actual}")
        if value.is_complex() or value.is_floating_point() != own.is_floating_point():
            raise TypeError(f"{name} must have dtype {own.dtype}, got {value.dtype}")
        if not bool(value.isfinite().all()) or (name == "step" and float(value) < 0):
            raise TypeError(f"{name} must be finite" + " and not negative" * (name == "step"))
        own.detach().copy_(value)
    return expected


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{name} must be a finite number, got {value!r}")
    return value


def _clone(value: Tensor) -> Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format)


def _validate_scaler_state(values: Mapping[str, Any], own: Mapping[str, float]) -> dict[str, Any]:
    """Return the numbers of a loss scaler's state."""
    for name in own:
        if not 0 <= _number(name, values[name]) < 2.0**127:
            raise TypeError(f"scaler.{name} must be a number from 0 to 2**127, got {values[name]!r}")
    return {name: values[name] for name in own}
