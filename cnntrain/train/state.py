"""The state of a training run, its plan, and the moving average of its weights.

Fused optimizer kernels do not check shapes and strides. A moment with another shape, or with overlapping elements (a
stride of 0), would cause out-of-bounds memory access. `validate_optimizer_state` therefore checks and copies all
tensors from a file; they are never used directly.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.train.schedule import Schedule

TEMPLATE_SIDE = 2  # side length of the dummy parameter in `_state_template`


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

    epoch: int = 0
    batch: int = 0
    step: int = 0
    images: int = 0
    wall_s: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    epochs_since_best: int = 0
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
        self._load_optimizer(state["optimizer"], state["progress"]["step"])
        if state["schedule"].keys() == self.schedule.state().keys():  # otherwise a new schedule, which starts afresh
            self.schedule.load_state(state["schedule"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(_validate_scaler_state(state["scaler"], self.scaler.state_dict()))
        self.progress = Progress(**state["progress"])
        # Copy, because tensors from a file may share memory.
        self.meter = {name: _clone(value) for name, value in state["meter"].items()}

    def _load_optimizer(self, saved: Mapping[str, Any], step: int) -> None:
        configured = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(validate_optimizer_state(self.optimizer, saved))
        # With fp16 the first steps may all have been skipped.
        if step and not (self.optimizer.state or self.scaler) and _has_state_after_a_step(self.optimizer):
            raise TypeError("the optimizer's moments are missing")
        schedules_momentum = self.schedule.momentum(0) is not None
        for group, own in zip(self.optimizer.param_groups, configured, strict=True):
            last_step: dict[str, Any] = {"lr": float(group["lr"])}
            if schedules_momentum and own.get("momentum"):
                last_step["momentum"] = float(group["momentum"])
            elif schedules_momentum and "betas" in own:
                last_step["betas"] = (float(group["betas"][0]), own["betas"][1])
            group.update({**own, **last_step})


def validate_optimizer_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict for `optimizer.load_state_dict` with validated copies of the tensors in `saved`.

    Tensors get the shape, dtype and memory format that the optimizer expects. Settings that its parameter groups do
    not have are dropped.

    Raises:
        ValueError: the parameter groups do not match.
        TypeError: a moment is missing, has another shape or type, or is not finite.
    """
    groups = _validate_groups(optimizer, saved["param_groups"])
    if not isinstance(saved["state"], Mapping):
        raise TypeError("the optimizer's state is not a mapping")
    parameter_of = {  # (group, parameter) by key in the saved state
        key: (group, parameter)
        for theirs, group in zip(groups, optimizer.param_groups, strict=True)
        for key, parameter in zip(theirs["params"], group["params"], strict=True)
    }
    templates: dict[tuple[int, int, torch.dtype], dict[str, Any] | None] = {}
    state: dict[Any, dict[str, Any]] = {}
    for key, values in saved["state"].items():
        if key not in parameter_of or not isinstance(values, Mapping):
            raise TypeError(f"the state has a parameter {key!r} that the optimizer does not have")
        group, parameter = parameter_of[key]
        kind = (id(group), parameter.ndim, parameter.dtype)
        if kind not in templates:
            templates[kind] = _state_template(optimizer, group, parameter)
        template = templates[kind]
        if template is None:
            state[key] = {n: _clone(v) if isinstance(v, Tensor) else v for n, v in values.items()}
        else:
            state[key] = _validate_moments(values, template, parameter)
    return {"state": state, "param_groups": groups}


def _validate_groups(optimizer: Optimizer, saved: Any) -> list[dict[str, Any]]:
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
        settings = {n: _validate_setting(n, theirs[n], v) for n, v in own.items() if n in theirs and n != "params"}
        groups.append({**settings, "params": keys})
    return groups


def _validate_setting(name: str, saved: Any, own: Any) -> Any:
    """Check the type of a parameter group's setting; return the optimizer's own value unless it is numeric."""
    if isinstance(own, bool):
        return own
    if isinstance(own, int | float):
        if isinstance(saved, bool) or not isinstance(saved, int | float) or not math.isfinite(saved):
            raise TypeError(f"{name} must be a finite number, got {saved!r}")
        return saved
    if isinstance(own, tuple) and all(isinstance(value, int | float) for value in own):
        if not isinstance(saved, list | tuple) or len(saved) != len(own):
            raise TypeError(f"{name} must be {len(own)} numbers, got {saved!r}")
        return tuple(_validate_setting(name, theirs, value) for theirs, value in zip(saved, own, strict=True))
    return own


def _state_template(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any] | None:
    """Return the optimizer's state for a small dummy parameter after one step.

    None for a user-defined optimizer, whose state may change from step to step.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    dummy = torch.ones((TEMPLATE_SIDE,) * parameter.ndim, dtype=parameter.dtype, device=parameter.device)
    dummy = dummy.requires_grad_()
    settings = {name: value for name, value in group.items() if name != "params"}
    twin = cast("Any", type(optimizer))([{**settings, "params": [dummy]}])
    dummy.grad = torch.ones_like(dummy)
    twin.step()
    return dict(twin.state[dummy])


def _validate_moments(values: Mapping[str, Any], template: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    moments: dict[str, Any] = {}
    for name, expected in template.items():
        if name not in values:
            if values:
                raise TypeError(f"{name} is missing")
            continue
        value = values[name]
        if not isinstance(expected, Tensor):
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            moments[name] = _validate_setting(name, value, expected) if isinstance(expected, int | float) else expected
            continue
        if isinstance(value, int | float) and not isinstance(value, bool) and not expected.ndim:
            value = torch.tensor(float(value))  # older versions of torch store `step` as a number
        # A side of TEMPLATE_SIDE follows the parameter's shape. Other sides (1 in Adafactor's factors) are fixed.
        shape = tuple(
            length if side == TEMPLATE_SIDE else side
            for side, length in zip(expected.shape, parameter.shape, strict=bool(expected.ndim))
        )
        if not isinstance(value, Tensor) or value.shape != shape:
            actual = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a tensor of shape {shape}, got {actual}")
        moments[name] = _copy_as(name, value, expected, parameter)
    return moments


def _copy_as(name: str, value: Tensor, expected: Tensor, parameter: Tensor) -> Tensor:
    """Copy with the expected dtype; use the parameter's memory format if the shapes are equal."""
    if value.is_complex() or value.is_floating_point() != expected.is_floating_point():
        raise TypeError(f"{name} must have dtype {expected.dtype}, got {value.dtype}")
    if not bool(value.isfinite().all()) or (name == "step" and float(value) < 0):
        raise TypeError(f"{name} must be finite" + " and not negative" * (name == "step"))
    like = parameter if value.shape == parameter.shape and expected.ndim else value
    memory_format = torch.preserve_format if like is parameter else torch.contiguous_format
    copied = torch.empty_like(like, dtype=expected.dtype, device=expected.device, memory_format=memory_format)
    return copied.detach().copy_(value)


def _clone(value: Tensor) -> Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format)


def _validate_scaler_state(values: Mapping[str, Any], own: Mapping[str, float]) -> dict[str, Any]:
    """Return the numbers of a loss scaler's state.

    Raises:
        TypeError: a number is not finite or out of range.
    """
    for name in own:
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2.0**127:
            raise TypeError(f"scaler.{name} must be a number from 0 to 2**127, got {value!r}")
    return {name: values[name] for name in own}


def _has_state_after_a_step(optimizer: Optimizer) -> bool:
    """Return True for an optimizer of torch that has state for every parameter after its first step."""
    without_momentum = isinstance(optimizer, torch.optim.SGD) and not any(
        group["momentum"] for group in optimizer.param_groups
    )
    return type(optimizer).__module__.startswith("torch.optim") and not without_momentum
