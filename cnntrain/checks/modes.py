"""Check that train() and eval() reach every layer, and that the two modes differ only where they should."""

import torch
from torch import Tensor, nn

from cnntrain.checks.context import CheckContext, failed, join_names, passed, warned
from cnntrain.checks.short_training import relative_distance
from cnntrain.checks.watch import watch_modes
from cnntrain.types import Finding

IMAGES = 8
TOLERANCE = 1e-4
WARN_DROPOUT, FAIL_DROPOUT = 0.8, 0.95  # dropout probability
MAX_MOMENTUM = 0.99  # of BatchNorm
MODE_LAYERS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
MOMENTUM_REMEDY = "set momentum=0.1, PyTorch's default: the weight of the new batch (Keras's 0.99 is 0.01 here)"
NETWORK = "the network itself"


def modes(context: CheckContext) -> Finding:
    """Check that the mode reaches every layer, and that eval mode is deterministic and changes no state."""
    images = context.eval_batch(count=IMAGES).images
    model = context.copy_model()
    frozen = bool(context.config["model"].get("freeze"))
    return (
        _check_momentum(model)
        or _check_switching(model, images, frozen)
        or _check_evaluation(context, model, images)
        or _check_training(context, model, images)
    )


def _check_momentum(model: nn.Module) -> Finding | None:
    momenta = {
        name: float(module.momentum)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        if module.momentum is not None
    }
    if zero := [name for name, momentum in momenta.items() if momentum == 0]:
        cause = "the running statistics never change, so evaluation uses mean 0 and variance 1"
        return failed(f"momentum 0 in {join_names(zero)}", cause, MOMENTUM_REMEDY, "model")
    if high := [name for name, momentum in momenta.items() if momentum >= MAX_MOMENTUM]:
        cause = "the running statistics are those of the last batch alone"
        return failed(f"momentum {momenta[high[0]]:g} in {join_names(high)}", cause, MOMENTUM_REMEDY, "model")
    return None


def _check_dropout(calls: list[tuple[str, float]]) -> Finding | None:
    name, probability = max(calls, key=lambda call: call[1], default=("", 0.0))
    if probability < WARN_DROPOUT:
        return None
    evidence = f"dropout {probability:g} in {name or NETWORK}"
    cause = f"{evidence} keeps only {100 * (1 - probability):.3g} % of the features"
    remedy = "use 0.1 to 0.5; p is the probability of dropping a feature"
    return (failed if probability >= FAIL_DROPOUT else warned)(evidence, cause, remedy, "model")


def _check_switching(model: nn.Module, images: Tensor, frozen: bool) -> Finding | None:
    """Check the mode of the layers after train() and eval(), before and after a forward pass."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MODE_LAYERS)}
    model.train()
    wrong = [n for n, m in layers.items() if not m.training and not is_frozen(m)]
    with torch.no_grad():
        model(images)
    if not frozen:
        wrong += [n for n, m in layers.items() if not m.training and n not in wrong and not is_frozen(m)]
    if wrong:
        evidence = f"{len(wrong)} of {len(layers)} layers are in eval mode after model.train()"
        cause = f"layers in eval mode during training: {join_names(wrong)}"
        return failed(evidence, cause, "look for eval() in train() or forward()", "model")
    model.eval()
    wrong = [n for n, m in model.named_modules() if m.training]
    with torch.no_grad():
        model(images)
    wrong += [n for n, m in model.named_modules() if m.training and n not in wrong]
    model.eval()
    if wrong:
        evidence = f"{len(wrong)} layers are in training mode after model.eval()"
        cause = f"layers in training mode during evaluation: {join_names([name or NETWORK for name in wrong])}"
        return failed(evidence, cause, "look for train() in eval() or forward()", "model")
    return None


def is_frozen(norm: nn.Module) -> bool:
    """Return True for a norm with frozen parameters, whose statistics are frozen on purpose as well."""
    parameters = list(norm.parameters(recurse=False))
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _check_evaluation(context: CheckContext, model: nn.Module, images: Tensor) -> Finding | None:
    """Check that two evaluations of the same images agree, and leave the model unchanged."""
    model.eval()
    before = {name: value.clone() for name, value in (*model.named_buffers(), *model.named_parameters())}
    context.reseed("modes", 1)
    first, calls = watch_modes(model, images)
    context.reseed("modes", 2)
    with torch.no_grad():
        distance = relative_distance(first, model(images).float())
    if distance > TOLERANCE:
        dropouts = [name or NETWORK for name, _ in calls.dropouts]
        source = f"dropout is active in {join_names(dropouts)}" if dropouts else "it draws random numbers"
        evidence = f"two evaluations of the same images differ by {distance:.2g} (relative)"
        remedy = "use nn.Dropout, or F.dropout(x, p, self.training); create no layers in forward()"
        return failed(evidence, f"evaluation is random: {source}", remedy, "model")
    after = dict((*model.named_buffers(), *model.named_parameters()))
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    if changed:
        evidence = f"an evaluation changes {join_names(changed)}"
        return failed(evidence, "evaluation updates the state of the model", "pass training=self.training", "model")
    if calls.batch_norms:
        evidence = f"batch statistics are used in eval mode: {join_names(calls.batch_norms)}"
        cause = "an output depends on the other images of the batch"
        return failed(evidence, cause, "set track_running_stats=True, training=self.training", "model")
    return None


def _check_training(context: CheckContext, model: nn.Module, images: Tensor) -> Finding:
    """Check that training mode computes the same as eval mode, except for dropout and batch statistics."""
    with torch.no_grad():
        eval_outputs = model.eval()(images).float()
    model.train()
    context.reseed("modes", 3)
    outputs, calls = watch_modes(model, images)
    model.eval()
    if finding := _check_dropout(calls.dropouts):
        return finding
    distance = relative_distance(eval_outputs, outputs)
    reasons = [f"{len(calls.dropouts)} dropouts"] if calls.dropouts else []
    reasons += [f"{len(calls.batch_norms)} batch statistics"] if calls.batch_norms else []
    reasons += ["random draws"] if calls.drew and not calls.dropouts else []
    shown = ", ".join(reasons) or "no operation depends on the mode"
    evidence = f"relative difference between training and eval mode: {distance:.2g} ({shown})"
    if distance > TOLERANCE and not reasons:
        cause = "training mode computes something else, although no operation is random or uses batch statistics"
        return warned(evidence, cause, "look for self.training in forward()", "model")
    return passed(evidence)
