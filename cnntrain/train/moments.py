"""Validate a saved optimizer state and copy it to the shape, dtype and memory layout that the optimizer expects.

Fused kernels do not check shapes and strides. A moment with another shape, or with overlapping elements (a stride of
0), would cause out-of-bounds memory access. Tensors from a file are therefore checked and copied, never used directly.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

TEMPLATE_SIDE = 2  # side length of the dummy parameter for `_template`


def fit_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict for `optimizer.load_state_dict` with validated copies of the tensors in `saved`.

    Settings that this optimizer's groups do not have are dropped.

    Raises:
        ValueError: the parameter groups do not match.
        TypeError: a moment is missing, has another shape or type, or is not finite.
    """
    groups = _fit_groups(optimizer, saved["param_groups"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number_of = {key: index for index, key in enumerate(key for group in groups for key in group["params"])}
    templates: dict[tuple[int, int, torch.dtype], dict[str, Any] | None] = {}
    state: dict[Any, dict[str, Any]] = {}
    if not isinstance(saved["state"], Mapping):
        raise TypeError("the optimizer's state is not a mapping")
    group_of = [number for number, group in enumerate(groups) for _ in group["params"]]
    for key, values in saved["state"].items():
        if key not in number_of or not isinstance(values, Mapping):
            raise TypeError(f"the state has a parameter {key!r} that the optimizer does not have")
        index = number_of[key]
        parameter = parameters[index]
        kind = (group_of[index], parameter.ndim, parameter.dtype)
        if kind not in templates:
            templates[kind] = _template(optimizer, optimizer.param_groups[kind[0]], parameter)
        template = templates[kind]
        state[key] = _copy(values) if template is None else _fit_values(values, template, parameter)
    return {"state": state, "param_groups": groups}


def _fit_groups(optimizer: Optimizer, saved: Any) -> list[dict[str, Any]]:
    if not isinstance(saved, Sequence) or not all(isinstance(group, Mapping) for group in saved):
        raise TypeError("the parameter groups are not a list")
    if len(saved) != len(optimizer.param_groups):
        raise ValueError("the number of parameter groups does not match")
    found, seen = [], set()
    for theirs, mine in zip(saved, optimizer.param_groups, strict=True):
        keys = theirs["params"]
        if not isinstance(keys, list) or not all(type(key) is int for key in keys):
            raise TypeError("the parameters of a group are not a list of integers")
        if len(keys) != len(mine["params"]) or seen & set(keys) or len(set(keys)) < len(keys):
            raise ValueError("the parameters of a group do not match")
        seen |= set(keys)
        settings = {name: _like(name, theirs[name], value) for name, value in mine.items() if name in theirs}
        found.append({**settings, "params": keys})
    return found


def _like(name: str, saved: Any, mine: Any) -> Any:
    """Convert a group's setting to the type of the optimizer's own value; return the own value if types differ."""
    if name == "params":
        return saved
    if isinstance(mine, bool) or mine is None:
        return mine
    if isinstance(mine, int | float):
        number = isinstance(saved, int | float) and not isinstance(saved, bool)
        if not number or not math.isfinite(saved):
            raise TypeError(f"{name} must be a finite number, got {saved!r}")
        return saved
    if isinstance(mine, tuple) and all(isinstance(each, int | float) for each in mine):
        if not isinstance(saved, list | tuple) or len(saved) != len(mine):
            raise TypeError(f"{name} must be {len(mine)} numbers, got {saved!r}")
        return tuple(_like(name, theirs, own) for theirs, own in zip(saved, mine, strict=True))
    return mine


def _template(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any] | None:
    """Return the optimizer's state for a small dummy parameter after one step, as a template.

    None for a user-defined optimizer, whose state may change from step to step.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    tiny = torch.ones((TEMPLATE_SIDE,) * parameter.ndim, dtype=parameter.dtype, device=parameter.device)
    tiny = tiny.requires_grad_()
    settings = {name: value for name, value in group.items() if name != "params"}
    tried = cast("Any", type(optimizer))([{**settings, "params": [tiny]}])
    tiny.grad = torch.ones_like(tiny)
    tried.step()
    return dict(tried.state[tiny])


def _fit_values(values: Mapping[str, Any], template: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    fitted: dict[str, Any] = {}
    for name, expected in template.items():
        if name not in values:
            if values:
                raise TypeError(f"{name} is missing")
            continue
        value = values[name]
        if not isinstance(expected, Tensor):
            if isinstance(expected, int | float) and not isinstance(expected, bool):
                value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
                fitted[name] = _like(name, value, expected)
            else:
                fitted[name] = expected
            continue
        if isinstance(value, int | float) and not isinstance(value, bool) and not expected.ndim:
            value = torch.tensor(float(value))  # older versions of torch store `step` as a number
        # A side of TEMPLATE_SIDE follows the parameter's shape. Other sides (1 in Adafactor's factors) are fixed.
        shape = tuple(
            length if side == TEMPLATE_SIDE else side
            for side, length in zip(expected.shape, parameter.shape, strict=bool(expected.ndim))
        )
        if not isinstance(value, Tensor) or value.shape != shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a tensor of shape {shape}, got {found}")
        fitted[name] = _copy_as(name, value, expected, parameter)
    return fitted


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


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the state of a user-defined optimizer without a template; clone every tensor."""
    return {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(value, Tensor)
        else value
        for name, value in values.items()
    }
