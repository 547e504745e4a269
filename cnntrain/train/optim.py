"""Optimizers: parameter groups by weight decay and by depth, and learning rates set per step."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cnntrain.errors import UserError, suggest
from cnntrain.models.pretrained import in_head
from cnntrain.train.schedule import Schedule

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, torch.fx.GraphModule)


def by_name(
    params: Any, name: str, lr: float, weight_decay: float, options: Mapping[str, Any] | None
) -> Optimizer:
    """Any optimizer of torch.optim by its class name.

    Raises:
        UserError: no such optimizer, or it does not take one of the options.
    """
    known = [
        n
        for n, c in vars(torch.optim).items()
        if inspect.isclass(c) and issubclass(c, Optimizer) and c is not Optimizer
    ]
    if name not in known:
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


def check_that_it_steps(factory: Callable[..., Optimizer]) -> None:
    """Let it do one step on a matrix of its own.

    Raises:
        ValueError: it can't, as one that wants the loss anew (LBFGS) or sparse gradients (SparseAdam).
    """
    matrix = nn.Parameter(torch.ones(2, 2))
    optimizer = factory([{"params": [matrix]}])
    matrix.grad = torch.ones(2, 2)
    try:
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        wants_loss = "closure" in str(error)
        why = "it computes the loss itself, several times a step (closure)" if wants_loss else str(error)
        raise ValueError(f"it can't do a step from gradients alone: {why}") from error


def build_optimizer(
    factory: Callable[..., Optimizer],
    model: nn.Module,
    weight_decay: float,
    decay_norms_and_biases: bool,
    layer_decay: float | None = None,
) -> Optimizer:
    """The optimizer over all of the model's parameters, in groups with and without weight decay.

    Norms and biases are told by their shape: one dimension or none (as in Goyal et al. 2017, section 5.3). A frozen
    parameter gets no gradient, and is passed over until it is set free (`model.unfreeze`).

    Args:
        layer_decay: the learning rate of a layer is this to the power of its distance from the last layer, times the
            last one's (Bao et al. 2022, BEiT); None: the same for all. Each group says its `lr_scale`.

    Raises:
        UserError: nothing is trainable.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("model: no parameter is trainable; unfreeze some (model.freeze=null)")
    layers = [list(model.parameters())] if layer_decay is None else layers_of(model)
    split = bool(weight_decay) and not decay_norms_and_biases
    groups: list[dict[str, Any]] = []
    for distance, layer in enumerate(
        reversed(layers)
    ):  # the head first: its learning rate is the one reported
        scale = {} if layer_decay is None else {"lr_scale": layer_decay**distance}
        matrices, vectors = [p for p in layer if p.ndim > 1], [p for p in layer if p.ndim <= 1]
        if split:
            groups += [{"params": matrices, **scale}, {"params": vectors, "weight_decay": 0.0, **scale}]
        else:
            groups.append({"params": layer, **scale})
    optimizer = factory([group for group in groups if group["params"]])
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] = float(group["lr"]) * group.get("lr_scale", 1.0)
    return optimizer


def layers_of(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters layer by layer, from the images to the head, each in one layer.

    A layer is a child of the network, in the order in which they were made. A list of modules (Sequential, ModuleList,
    ModuleDict), a traced network and what merely wraps the whole are opened, so that each block of a stage is a layer.
    What has vectors alone (a norm after its convolution) belongs to the layer before it. The head, where the network
    names it (`head_names`), is the last layer.
    """
    heads = getattr(model, "head_names", ())
    found: dict[str, list[nn.Parameter]] = {}
    head: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        layer = head if in_head(name, heads) else found.setdefault(_layer_name(model, name), [])
        layer.append(parameter)
    layers: list[list[nn.Parameter]] = []
    for layer in found.values():
        if layers and all(p.ndim <= 1 for p in layer):
            layers[-1] += layer
        else:
            layers.append(layer)
    return [*layers, head] if head else layers


def _layer_name(model: nn.Module, parameter: str) -> str:
    """The first module on the way down to a parameter that is not opened."""
    module, path, count = model, [], len(list(model.parameters()))
    for part in parameter.split(".")[:-1]:
        module = module.get_submodule(part)
        path.append(part)
        # A traced network (torch.fx) holds its parts in plain Modules.
        opened = isinstance(module, _LISTS) or type(module) is nn.Module
        if not opened and len(list(module.parameters())) < count:
            break
    return ".".join(path)


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


def learning_rate_at(optimizer: Optimizer, schedule: Schedule, step: int) -> float:
    """Return the learning rate that `set_learning_rate` would set for the first group."""
    return optimizer.param_groups[0]["peak_lr"] * schedule.factor(step)


def supports_fused(device: torch.device) -> bool:
    """Whether torch's fused optimizer kernels run on this device."""
    return device.type in ("cuda", "cpu")
