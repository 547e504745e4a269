"""Check that every parameter is registered, trainable, once in the optimizer, and updated by training steps."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.checks.context import CheckContext, failed, join_names, passed, trainable_parameters, warned
from cnntrain.checks.watch import Weighted, gradient_cut, never_called
from cnntrain.types import Finding

STEPS = 4  # a zero head, zero norms before it and the layers before them need one step each to pass gradients on
MAX_DEPTH = 3  # of nested lists that are searched for modules
MIN_CHANGE = 1e-6  # relative change that is visible in float32
MODE_LAYERS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
LAYERS = (Weighted, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.Embedding, nn.RNNBase)


def registered(context: CheckContext) -> Finding:
    """Check that no layer or parameter is stored in a plain list, tuple or dict, where `parameters()` misses it."""
    model = context.model
    registered_ids = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    hidden: dict[str, bool] = {}  # path -> whether it is trainable, or depends on the mode
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            for path, part in _contents(value, f"{name}.{attribute}".lstrip("."), MAX_DEPTH):
                if id(part) in registered_ids:
                    continue
                if isinstance(part, Tensor):
                    if part.requires_grad and part.is_leaf:
                        hidden[path] = True
                elif any(id(p) not in registered_ids for p in part.parameters()):
                    hidden[path] = any(p.requires_grad for p in part.parameters())
                elif any(isinstance(m, MODE_LAYERS) for m in part.modules()):
                    hidden[path] = True
    if not hidden:
        return passed(f"{len(list(model.parameters()))} parameter tensors; none in a plain list or dict")
    trainable = [path for path, is_trainable in hidden.items() if is_trainable]
    evidence = f"{len(hidden)} modules or parameters are missing from model.parameters()"
    remedy = "use nn.ModuleList, nn.ModuleDict or nn.Parameter, or assign them to attributes"
    if trainable:
        cause = f"not registered: {join_names(trainable)}; these are not trained, moved to the GPU or saved"
        return failed(evidence, cause, remedy, "model")
    return warned(evidence, f"not registered, but frozen: {join_names(list(hidden))}", remedy, "model")


def _contents(value: Any, path: str, depth: int) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """Yield the modules and tensors in nested lists and dicts, with their paths."""
    if isinstance(value, (nn.Module, Tensor)):
        yield path, value
    elif isinstance(value, dict) and depth:
        for key, part in value.items():
            yield from _contents(part, f"{path}[{key!r}]", depth - 1)
    elif isinstance(value, (list, tuple, set)) and depth:
        for number, part in enumerate(value):
            yield from _contents(part, f"{path}[{number}]", depth - 1)


def shared_weights(context: CheckContext) -> Finding:
    """Check that every parameter has a single name."""
    names: dict[int, list[str]] = {}
    for name, parameter in context.model.named_parameters(remove_duplicate=False):
        if parameter.numel() and parameter.device.type != "meta":
            names.setdefault(parameter.data_ptr(), []).append(name)
    groups = [" = ".join(group[:3]) for group in names.values() if len(group) > 1]
    if not groups:
        return passed(f"{len(names)} parameter tensors, none of them shared")
    cause = f"several layers share their weights: {join_names(groups, 3)}; note that [layer] * n repeats one layer"
    evidence = f"{len(groups)} parameter tensors have several names"
    return warned(evidence, cause, "create separate layers, unless sharing is intended", "model")


def frozen(context: CheckContext) -> Finding:
    """Check that only parameters selected by the config are frozen."""
    parameters = dict(context.model.named_parameters())
    names = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    freeze = context.config["model"].get("freeze")
    evidence = f"{len(names)} of {len(parameters)} parameter tensors are frozen"
    if not names:
        return passed(evidence)
    if freeze:
        pretrained = context.trained or context.config["model"].get("pretrained")
        if pretrained or any(hasattr(module, "pretrained_from") for module in context.model.modules()):
            return passed(f"{evidence} (model.freeze={freeze})")
        cause = f"model.freeze={freeze} freezes randomly initialized weights"
        remedy = "set model.pretrained, or model.freeze=null"
        return warned(evidence, cause, remedy, "model.freeze", "model.pretrained")
    cause = f"frozen parameters cannot learn: {join_names(names)}"
    remedy = "set requires_grad=True, or set model.freeze if this is intended"
    layer_parameters = {
        f"{name}.{parameter}".lstrip(".")
        for name, module in context.model.named_modules()
        if isinstance(module, LAYERS)
        for parameter, _ in module.named_parameters(recurse=False)
    }
    # Other frozen parameters may be constants, such as a positional encoding.
    return (failed if layer_parameters & set(names) else warned)(evidence, cause, remedy, "model.freeze")


def optimizer(context: CheckContext) -> Finding:
    """Check that the optimizer has every trainable parameter once, no others, and a learning rate above 0."""
    model = context.copy_model()
    built = context.make_optimizer(model)
    given = [id(p) for group in built.param_groups for p in group["params"]]
    wanted = trainable_parameters(model)
    missing = [name for name, parameter in wanted.items() if id(parameter) not in given]
    repeated = [name for name, parameter in wanted.items() if given.count(id(parameter)) > 1]
    foreign = len(set(given) - {id(p) for p in model.parameters()})
    rates = _rates(built)
    without_rate = [name for name, parameter in wanted.items() if rates.get(id(parameter)) == 0]
    groups = f"{len(built.param_groups)} group{'s' * (len(built.param_groups) > 1)}"
    evidence = (
        f"{type(built).__name__} has {len(wanted) - len(missing)} of {len(wanted)} trainable tensors, in {groups}"
    )
    remedy = "pass all of model.parameters() with requires_grad to the optimizer, each once"
    if missing:
        cause = f"missing from the optimizer: {join_names(missing)}; these are never updated"
    elif repeated:
        cause = f"several times in the optimizer: {join_names(repeated)}"
    elif foreign:
        cause = f"the optimizer has {foreign} tensors that are not parameters of the model"
    elif without_rate:
        cause = f"the learning rate of {join_names(without_rate)} is 0, so they never change"
        remedy = "set optimizer.lr"
    else:
        return passed(evidence)
    return failed(evidence, cause, remedy, "optimizer")


def gradients(context: CheckContext) -> Finding:
    """Check that every parameter gets a non-zero gradient and changes within a few training steps."""
    model = context.copy_model()
    built, parameters = context.make_optimizer(model), trainable_parameters(model)
    initial = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    largest: dict[str, float | None] = dict.fromkeys(parameters)  # None: no gradient at all

    def record() -> None:
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                largest[name] = max(largest[name] or 0.0, float(parameter.grad.abs().max()))

    losses = context.train_steps(model, built, STEPS, record)
    absent = [name for name, size in largest.items() if size is None]
    zero = [name for name, size in largest.items() if size == 0]
    count = len(parameters) - len(absent) - len(zero)
    evidence = f"{count} of {len(parameters)} parameter tensors received a gradient in {len(losses)} steps"
    if absent:
        remedy = "look for detach(), .data, no_grad, .item(), or a layer that forward() never calls"
        return failed(evidence, _why_absent(context, absent, model), remedy, "model")
    if not all(map(math.isfinite, losses)):
        evidence = f"losses {', '.join(f'{loss:.3g}' for loss in losses)}"
        return failed(evidence, "the loss became non-finite", "lower optimizer.lr; see initial loss", "optimizer.lr")
    if zero:
        cause = f"the gradient of {join_names(zero)} is exactly zero: dead ReLUs or zero weights follow"
        return failed(evidence, cause, "see dead units; check the initialization", "model", "model.init")
    rates = _rates(built)
    unchanged = [
        name
        for name, parameter in parameters.items()
        if torch.equal(parameter, initial[name])
        and _should_change(parameter, rates.get(id(parameter), 0.0), largest[name] or 0.0)
    ]
    if unchanged:
        evidence += f"; {len(unchanged)} did not change"
        cause = f"optimizer steps do not change {join_names(unchanged)} (not in the optimizer, or learning rate 0)"
        return failed(evidence, cause, "see optimizer; increase optimizer.lr", "optimizer", "optimizer.lr")
    return passed(f"{evidence}, and all of them changed")


def _rates(optimizer: Optimizer) -> dict[int, float]:
    """Return the learning rate of each parameter by its id."""
    return {id(p): float(group.get("lr", 1.0)) for group in optimizer.param_groups for p in group["params"]}


def _should_change(parameter: Tensor, rate: float, gradient: float) -> bool:
    """Whether a step is large enough to be visible in float32."""
    return rate == 0 or rate * gradient > MIN_CHANGE * float(parameter.detach().abs().max())


def _why_absent(context: CheckContext, absent: list[str], model: nn.Module) -> str:
    """Describe where the graph is cut, or which layers are never called."""
    images = context.eval_batch(count=2).images
    layers = {name.rpartition(".")[0] for name in absent}
    if layers <= set(never_called(model, images)):
        return f"forward() never calls {join_names(sorted(layers))}"
    where = gradient_cut(model, images) or "they are detached from the loss (detach, .data, no_grad)"
    return f"no gradient reaches {join_names(absent)}: {where}"
