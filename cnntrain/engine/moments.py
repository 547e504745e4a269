"""Bring an optimizer's saved state into the shape, type and layout that the optimizer itself would give it.

A fused kernel trusts shape and strides: a moment of another shape, or one whose elements share memory (a stride of 0),
lets it read and write beyond what is its own. So nothing of a file is used in place: what fits is copied.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

TEMPLATE_SIDE = 2  # of the tensors that an optimizer is tried on


def fit_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict for `optimizer.load_state_dict` with the values of `saved`, every tensor of it a new one.

    Settings that this optimizer's groups don't have are left out.

    Raises:
        ValueError: other parameter groups.
        TypeError: a moment is missing, of another shape or kind, or not finite.
    """
    groups = _fit_groups(optimizer, saved["param_groups"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number_of = {key: index for index, key in enumerate(key for group in groups for key in group["params"])}
    templates: dict[tuple[int, int, torch.dtype], dict[str, Any] | None] = {}
    state: dict[Any, dict[str, Any]] = {}
    if not isinstance(saved["state"], Mapping):
        raise TypeError("the optimizer's state is no mapping")
    group_of = [number for number, group in enumerate(groups) for _ in group["params"]]
    for key, values in saved["state"].items():
        if key not in number_of or not isinstance(values, Mapping):
            raise TypeError(f"there is state for a parameter {key!r} that the optimizer does not have")
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
        raise TypeError("its parameter groups are no list")
    if len(saved) != len(optimizer.param_groups):
        raise ValueError("another number of parameter groups")
    found, seen = [], set()
    for theirs, mine in zip(saved, optimizer.param_groups, strict=True):
        keys = theirs["params"]
        if not isinstance(keys, list) or not all(type(key) is int for key in keys):
            raise TypeError("the parameters of a group are no list of numbers")
        if len(keys) != len(mine["params"]) or seen & set(keys) or len(set(keys)) < len(keys):
            raise ValueError("other parameters in a group")
        seen |= set(keys)
        settings = {name: _like(name, theirs[name], value) for name, value in mine.items() if name in theirs}
        found.append({**settings, "params": keys})
    return found


def _like(name: str, saved: Any, mine: Any) -> Any:
    """A setting of a group, of the type that the optimizer's own has; its own where the kinds differ."""
    if name == "params":
        return saved
    if isinstance(mine, bool) or mine is None:
        return mine
    if isinstance(mine, int | float):
        number = isinstance(saved, int | float) and not isinstance(saved, bool)
        if not number or not math.isfinite(saved):
            raise TypeError(f"{name} must be a finite number, and is {saved!r}")
        return saved
    if isinstance(mine, tuple) and all(isinstance(each, int | float) for each in mine):
        if not isinstance(saved, list | tuple) or len(saved) != len(mine):
            raise TypeError(f"{name} must be {len(mine)} numbers, and is {saved!r}")
        return tuple(_like(name, theirs, own) for theirs, own in zip(saved, mine, strict=True))
    return mine


def _template(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any] | None:
    """What the optimizer keeps of a tiny parameter of the same kind after a step; None for one of the user's own,
    which may keep something else at every step."""
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
            value = torch.tensor(float(value))  # as older versions of torch keep the number of steps
        # A side of 2 is the parameter's, another one (1 of Adafactor's rows and columns) is as it is.
        shape = tuple(
            length if side == TEMPLATE_SIDE else side
            for side, length in zip(expected.shape, parameter.shape, strict=bool(expected.ndim))
        )
        if not isinstance(value, Tensor) or value.shape != shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a tensor of shape {shape}, and is {found}")
        fitted[name] = _copy_as(name, value, expected, parameter)
    return fitted


def _copy_as(name: str, value: Tensor, expected: Tensor, parameter: Tensor) -> Tensor:
    """A copy with the expected type, in the parameter's memory layout where it has its shape."""
    if value.is_complex() or value.is_floating_point() != expected.is_floating_point():
        raise TypeError(f"{name} must be of {expected.dtype}, and is of {value.dtype}")
    if not bool(value.isfinite().all()) or (name == "step" and float(value) < 0):
        raise TypeError(f"{name} must be finite" + " and not negative" * (name == "step"))
    like = parameter if value.shape == parameter.shape and expected.ndim else value
    memory_format = torch.preserve_format if like is parameter else torch.contiguous_format
    copied = torch.empty_like(like, dtype=expected.dtype, device=expected.device, memory_format=memory_format)
    return copied.detach().copy_(value)


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimizer of the user's own, which knows what it keeps: every tensor a new one."""
    return {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(value, Tensor)
        else value
        for name, value in values.items()
    }
