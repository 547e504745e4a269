"""Build the configured optimizer, with parameter groups by weight decay and depth; set learning rates per step."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import torch
from torch import nn
from torch.optim import Optimizer

from cnntrain.config.instantiate import resolve
from cnntrain.config.schema import Node, OptimizerSettings, Settings, Within, check_value, parse, split_common
from cnntrain.errors import UserError, suggest
from cnntrain.models.pretrained import is_inside
from cnntrain.train.device import Compute
from cnntrain.train.schedule import Schedule

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, torch.fx.GraphModule)


def make_optimizer(settings: Settings, model: nn.Module, compute: Compute) -> Optimizer:
    """Build the configured optimizer for the parameters of `model`."""
    node, common = split_common(settings.optimizer, OptimizerSettings)
    chosen = parse(OptimizerSettings, common, "optimizer.")
    with _resolved(settings, node, compute) as factory:
        return build_optimizer(
            factory, model, node.get("weight_decay", 0.0), chosen.decay_norms_and_biases, chosen.layer_decay
        )


def check_optimizer(settings: Settings, compute: Compute) -> None:
    """Check all keys of `optimizer` without a model, by one step on a small matrix. `lr=auto` is accepted."""
    node, common = split_common(settings.optimizer, OptimizerSettings)
    parse(OptimizerSettings, common, "optimizer.")
    if node.get("lr") == "auto":
        node["lr"] = 1.0
    with _resolved(settings, node, compute) as factory:
        check_single_step(factory)


@contextlib.contextmanager
def _resolved(settings: Settings, node: Node, compute: Compute) -> Iterator[Callable[..., Optimizer]]:
    """Yield the factory of the configured optimizer; explain its errors."""
    for key in ("lr", "weight_decay"):
        check_value(node.get(key, 0.0), Annotated[float, Within(0)], f"optimizer.{key}")
    fused = True if compute.device.type in ("cuda", "cpu") else None  # torch has fused kernels for these
    factory = resolve(node, "optimizer", "optimizer", settings.trusted_packages, fused=fused)
    try:
        yield factory
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        name = node.get("name", node["_target_"])
        raise UserError(f"optimizer: {name} refused its arguments: {error}") from error


def by_name(params: Any, name: str, lr: float, weight_decay: float, options: Mapping[str, Any] | None) -> Optimizer:
    """Build any optimizer of torch.optim by its class name."""
    classes = {
        key: cls
        for key, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
    if name not in classes:
        raise UserError(f"optimizer.name: torch.optim has no {name!r}{suggest(name, list(classes))}")
    cls = classes[name]
    accepted = list(inspect.signature(cls).parameters)
    decay = {"weight_decay": weight_decay} if "weight_decay" in accepted else {}
    arguments = {"lr": lr, **decay, **(options or {})}
    for option in arguments:
        if option not in accepted:
            raise UserError(f"optimizer.options.{option}: {name} takes no such argument{suggest(option, accepted)}")
    return cls(params, **arguments)


def check_single_step(factory: Callable[..., Optimizer]) -> None:
    """Check that an optimizer can take a step from dense gradients alone (LBFGS and SparseAdam cannot)."""
    matrix = nn.Parameter(torch.ones(2, 2))
    optimizer = factory([{"params": [matrix]}])
    matrix.grad = torch.ones(2, 2)
    try:
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        why = "it recomputes the loss several times per step (closure)" if "closure" in str(error) else str(error)
        raise ValueError(f"it cannot take a step from gradients alone: {why}") from error


def build_optimizer(
    factory: Callable[..., Optimizer],
    model: nn.Module,
    weight_decay: float,
    decay_norms_and_biases: bool,
    layer_decay: float | None = None,
) -> Optimizer:
    """Build an optimizer for all parameters of a model, in groups with and without weight decay.

    Parameters with at most one dimension count as norms and biases (as in Goyal et al. 2017, section 5.3). Frozen
    parameters are included; they are skipped because they have no gradient, until they are unfrozen
    (`model.unfreeze`).

    Args:
        factory: makes the optimizer from a list of parameter groups.
        layer_decay: factor of the learning rate from each layer to the one before it (Bao et al. 2022, BEiT); None:
            one learning rate for all layers. Groups store their factor as `lr_scale`.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("model: no parameter is trainable; unfreeze some (model.freeze=null)")
    layers = [list(model.parameters())] if layer_decay is None else layers_of(model)
    split = bool(weight_decay) and not decay_norms_and_biases
    groups: list[dict[str, Any]] = []
    # The head comes first, because the learning rate of the first group is the one that is logged.
    for distance, layer in enumerate(reversed(layers)):
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
    """Group the parameters by layer, from the input to the head; each parameter is in exactly one layer.

    A layer is a child module, in order of registration. Containers (Sequential, ModuleList, ModuleDict), traced
    networks and wrappers of the whole network are replaced by their children, so that each block of a stage is a layer.
    A module with vectors only (a norm after its convolution) belongs to the layer before it. The head, where the
    network names it (`head_names`), is the last layer.
    """
    heads = getattr(model, "head_names", ())
    parameters_of: dict[str, list[nn.Parameter]] = {}
    head: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        layer = head if is_inside(name, heads) else parameters_of.setdefault(_layer_name(model, name), [])
        layer.append(parameter)
    layers: list[list[nn.Parameter]] = []
    for layer in parameters_of.values():
        if layers and all(p.ndim <= 1 for p in layer):
            layers[-1] += layer
        else:
            layers.append(layer)
    return [*layers, head] if head else layers


def _layer_name(model: nn.Module, parameter: str) -> str:
    """Return the name of the outermost module with this parameter that is not a container."""
    module, path, count = model, [], len(list(model.parameters()))
    for part in parameter.split(".")[:-1]:
        module = module.get_submodule(part)
        path.append(part)
        # A traced network (torch.fx) keeps its children in plain Modules.
        is_container = isinstance(module, _CONTAINERS) or type(module) is nn.Module
        if not is_container and len(list(module.parameters())) < count:
            break
    return ".".join(path)


def set_learning_rate(optimizer: Optimizer, schedule: Schedule, step: int) -> float:
    """Set the learning rate of every group for this step, and the momentum if the schedule changes it."""
    factor, momentum = schedule.multiplier(step), schedule.momentum(step)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        if momentum is not None and group.get("momentum"):
            group["momentum"] = momentum
        elif momentum is not None and "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
    return optimizer.param_groups[0]["lr"]


def learning_rate_at(optimizer: Optimizer, schedule: Schedule, step: int) -> float:
    """Return the learning rate that `set_learning_rate` would set for the first group."""
    return optimizer.param_groups[0]["peak_lr"] * schedule.multiplier(step)
