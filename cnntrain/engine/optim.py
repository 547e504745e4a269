"""Optimizers: parameter groups without weight decay on norms and biases, and learning rates set per step."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cnntrain.engine.schedule import Schedule
from cnntrain.errors import UserError, suggest


def by_name(
    params: Any, name: str, lr: float, weight_decay: float, options: Mapping[str, Any] | None
) -> Optimizer:
    """Any optimizer of torch.optim by its class name.

    Raises:
        UserError: no such optimizer, or it does not take one of the options.
    """
    known = [n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, Optimizer)]
    if name not in known or name == "Optimizer":
        raise UserError(f"optimizer.name: torch.optim has no {name!r}{suggest(name, known)}")
    cls = getattr(torch.optim, name)
    accepted = list(inspect.signature(cls).parameters)
    arguments = {
        "lr": lr,
        **({"weight_decay": weight_decay} if "weight_decay" in accepted else {}),
        **(options or {}),
    }
    for option in arguments:
        if option not in accepted:
            raise UserError(
                f"optimizer.options.{option}: {name} takes no such argument{suggest(option, accepted)}"
            )
    return cls(params, **arguments)


def build_optimizer(
    factory: Callable[..., Optimizer], model: nn.Module, weight_decay: float, decay_norms_and_biases: bool
) -> Optimizer:
    """The optimizer over the model's trainable parameters, in groups with and without weight decay.

    Norms and biases are told by their shape: one dimension or none (as in Goyal et al. 2017, section 5.3).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UserError("model: no parameter is trainable; unfreeze some (model.freeze=null)")
    if decay_norms_and_biases or not weight_decay:
        groups = [{"params": trainable}]
    else:
        groups = [
            {"params": [p for p in trainable if p.ndim > 1]},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]
    optimizer = factory([group for group in groups if group["params"]])
    for group in optimizer.param_groups:
        group["peak_lr"] = float(group["lr"])
    return optimizer


def set_learning_rate(optimizer: Optimizer, schedule: Schedule, step: int) -> float:
    """Give every group its learning rate (and momentum, where the schedule moves it) for this step."""
    factor, momentum = schedule.factor(step), schedule.momentum(step)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        if momentum is not None and group.get("momentum"):
            group["momentum"] = momentum
        elif momentum is not None and "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
    return optimizer.param_groups[0]["lr"]


def supports_fused(device: torch.device) -> bool:
    """Whether torch's fused optimizer kernels run on this device."""
    return device.type in ("cuda", "cpu")
