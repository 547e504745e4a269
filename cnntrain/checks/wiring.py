"""Does every parameter take part? Registered, not frozen, in the optimizer once, with a gradient and a change."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.checks.context import CheckContext, failed, join_names, passed, warned
from cnntrain.checks.short_training import train_steps, trainable_parameters
from cnntrain.checks.watch import Weighted, gradient_cut, never_called
from cnntrain.types import Finding

STEPS = (
    4  # a zero head, zero norms before it, what lies before them: each takes a step to let gradients through
)
DEPTH = 3  # of lists in lists that are searched for modules
NOTICED = 1e-6  # relative change that float32 must show
MODE_MATTERS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
LAYERS = (Weighted, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.Embedding, nn.RNNBase)


def registered(context: CheckContext) -> Finding:
    """No layer hides in a plain list, tuple or dict, which `parameters()` does not look into."""
    model = context.model
    known = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    hidden: dict[str, bool] = {}  # where -> whether it could learn
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            for path, part in _inside(value, f"{name}.{attribute}".lstrip("."), DEPTH):
                if id(part) in known:
                    continue
                if isinstance(part, Tensor):
                    if part.requires_grad and part.is_leaf:
                        hidden[path] = True
                elif any(id(p) not in known for p in part.parameters()):
                    hidden[path] = any(p.requires_grad for p in part.parameters())
                elif any(isinstance(m, MODE_MATTERS) for m in part.modules()):
                    hidden[path] = True
    if not hidden:
        return passed(f"{len(list(model.parameters()))} parameter tensors, none hidden in a list or dict")
    learners = [path for path, learns in hidden.items() if learns]
    evidence = f"{len(hidden)} modules or parameters that model.parameters() does not know"
    remedy = "use nn.ModuleList, nn.ModuleDict or nn.Parameter, or assign them to attributes of their own"
    if learners:
        cause = (
            f"not registered: {join_names(learners)}; they stay as they are, on the CPU, and are not saved"
        )
        return failed(evidence, cause, remedy, "model")
    return warned(
        evidence, f"not registered, and frozen: {join_names(list(hidden))}; on purpose?", remedy, "model"
    )


def _inside(value: Any, path: str, depth: int) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """Modules and tensors in a value, however deep in lists, with their paths."""
    if isinstance(value, (nn.Module, Tensor)):
        yield path, value
    elif isinstance(value, dict) and depth:
        for key, part in value.items():
            yield from _inside(part, f"{path}[{key!r}]", depth - 1)
    elif isinstance(value, (list, tuple, set)) and depth:
        for number, part in enumerate(value):
            yield from _inside(part, f"{path}[{number}]", depth - 1)


def shared_weights(context: CheckContext) -> Finding:
    """Every parameter has one name."""
    names: dict[int, list[str]] = {}
    for name, parameter in context.model.named_parameters(remove_duplicate=False):
        if parameter.numel() and parameter.device.type != "meta":
            names.setdefault(parameter.data_ptr(), []).append(name)
    groups = [" = ".join(group[:3]) for group in names.values() if len(group) > 1]
    if not groups:
        return passed(f"{len(names)} parameter tensors, each under one name")
    cause = (
        f"several layers are the same one: {join_names(groups, 3)}; on purpose? [layer] * n repeats one layer"
    )
    evidence = f"{len(groups)} parameter tensors have several names"
    return warned(evidence, cause, "make a new layer for each place, unless they shall share", "model")


def frozen(context: CheckContext) -> Finding:
    """Nothing is frozen that the config does not freeze."""
    parameters = dict(context.model.named_parameters())
    still = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    freeze = context.config["model"].get("freeze")
    evidence = f"{len(still)} of {len(parameters)} parameter tensors are frozen"
    if not still:
        return passed(evidence)
    if freeze:
        learned = context.trained or context.config["model"].get("pretrained")
        if learned or any(hasattr(module, "pretrained_from") for module in context.model.modules()):
            return passed(f"{evidence} (model.freeze={freeze})")
        cause = f"model.freeze={freeze} freezes random weights: nothing was learned that is worth keeping"
        remedy = "set model.pretrained, or model.freeze=null"
        return warned(evidence, cause, remedy, "model.freeze", "model.pretrained")
    cause = f"frozen, they can't learn: {join_names(still)}"
    remedy = "give them requires_grad=True, or set model.freeze"
    layers = {
        f"{name}.{parameter}".lstrip(".")
        for name, module in context.model.named_modules()
        if isinstance(module, LAYERS)
        for parameter, _ in module.named_parameters(recurse=False)
    }
    # A parameter that is no layer's may be a table of constants (sines for positions).
    return (failed if layers & set(still) else warned)(evidence, cause, remedy, "model.freeze")


def optimizer(context: CheckContext) -> Finding:
    """The optimizer has every trainable parameter once, nothing else, and a learning rate for it."""
    model = context.copy_model()
    built = context.make_optimizer(model)
    given = [id(p) for group in built.param_groups for p in group["params"]]
    wanted = trainable_parameters(model)
    missing = [name for name, parameter in wanted.items() if id(parameter) not in given]
    twice = [name for name, parameter in wanted.items() if given.count(id(parameter)) > 1]
    foreign = len(set(given) - {id(p) for p in model.parameters()})
    rates = _rates(built)
    still = [name for name, parameter in wanted.items() if rates.get(id(parameter)) == 0]
    evidence = (
        f"{type(built).__name__} has {len(wanted) - len(missing)} of {len(wanted)} trainable tensors, "
        f"in {(n := len(built.param_groups))} group{'s' * (n > 1)}"
    )
    remedy = "give it all of model.parameters() that have requires_grad"
    if missing:
        cause = f"the optimizer does not know {join_names(missing)}: they never change"
    elif twice:
        cause = f"the optimizer has {join_names(twice)} more than once"
    elif foreign:
        cause = f"the optimizer has {foreign} tensors that are not the network's"
    elif still:
        cause, remedy = (
            f"the learning rate of {join_names(still)} is 0: no step changes them",
            "set optimizer.lr",
        )
    else:
        return passed(evidence)
    return failed(evidence, cause, remedy, "optimizer")


def gradients(context: CheckContext) -> Finding:
    """Within a few real steps every parameter gets a gradient other than zero, and changes."""
    model = context.copy_model()
    built, parameters = context.make_optimizer(model), trainable_parameters(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    largest: dict[str, float | None] = dict.fromkeys(parameters)  # None: no gradient at all

    def look() -> None:
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                largest[name] = max(largest[name] or 0.0, float(parameter.grad.abs().max()))

    losses = train_steps(context, model, built, STEPS, look)
    absent = [name for name, size in largest.items() if size is None]
    zero = [name for name, size in largest.items() if size == 0]
    count = len(parameters) - len(absent) - len(zero)
    evidence = f"{count} of {len(parameters)} parameter tensors got a gradient in {len(losses)} steps"
    if absent:
        remedy = "look for detach(), .data, no_grad, .item(), or a layer that forward() never calls"
        return failed(evidence, _why_absent(context, absent, model), remedy, "model")
    if not all(map(math.isfinite, losses)):
        evidence = f"losses {', '.join(f'{loss:.3g}' for loss in losses)}"
        cause = "the loss is no longer finite"
        return failed(evidence, cause, "lower optimizer.lr; see initial loss", "optimizer.lr")
    if zero:
        cause = (
            f"the gradient of {join_names(zero)} is exactly zero: dead ReLUs or weights of zero lie behind"
        )
        return failed(evidence, cause, "see dead units; look at the initialization", "model", "model.init")
    rates = _rates(built)
    still = [
        name
        for name, parameter in parameters.items()
        if torch.equal(parameter, before[name])
        and _should_move(parameter, rates.get(id(parameter), 0.0), largest[name] or 0.0)
    ]
    if still:
        evidence += f"; {len(still)} did not change"
        cause = f"the optimizer's steps leave {join_names(still)} as they are: not in it, or a learning rate of nothing"
        return failed(evidence, cause, "see optimizer; raise optimizer.lr", "optimizer", "optimizer.lr")
    return passed(f"{evidence}, and all changed")


def _rates(optimizer: Optimizer) -> dict[int, float]:
    """The learning rate of each parameter, by its id."""
    return {id(p): float(group.get("lr", 1.0)) for group in optimizer.param_groups for p in group["params"]}


def _should_move(parameter: Tensor, rate: float, gradient: float) -> bool:
    """Whether a step in float32 had to show: not where it is lost beside the weights."""
    return rate == 0 or rate * gradient > NOTICED * float(parameter.detach().abs().max())


def _why_absent(context: CheckContext, absent: list[str], model: nn.Module) -> str:
    """Names the first parameters without a gradient, and where the graph is cut or what is never run."""
    images = context.eval_batch(count=2).images
    idle = never_called(model, images)
    lone = [name for name in absent if name.rpartition(".")[0] in idle]
    if len(lone) == len(absent):
        return f"forward() never calls {join_names(sorted({name.rpartition('.')[0] for name in lone}))}"
    where = gradient_cut(model, images)
    return f"no gradient reaches {join_names(absent)}: {where or 'something detaches them from the loss'}"
