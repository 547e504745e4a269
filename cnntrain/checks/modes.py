"""Is the network in the right mode? Training and evaluation differ only where they should."""

import torch
from torch import Tensor, nn

from cnntrain.checks.context import CheckContext, failed, join_names, passed, warned
from cnntrain.checks.short_training import relative_distance
from cnntrain.checks.watch import watch_modes
from cnntrain.types import Finding

IMAGES = 8
SAME = 1e-4
STRONG, ABSURD = 0.8, 0.95  # dropout probability
HASTY = 0.99  # momentum of BatchNorm
MATTERS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


def modes(context: CheckContext) -> Finding:
    """train() and eval() reach every layer; evaluation is not random and learns nothing."""
    images = context.eval_batch(count=IMAGES).images
    model = context.copy_model()
    frozen = bool(context.config["model"].get("freeze"))
    return (
        _settings(model)
        or _switching(model, images, frozen)
        or _evaluation(context, model, images)
        or _training(context, model, images)
    )


def _settings(model: nn.Module) -> Finding | None:
    """Dropout and BatchNorm with numbers that make no sense."""
    norms = {
        name: float(module.momentum)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        if module.momentum is not None
    }
    still = [name for name, momentum in norms.items() if momentum == 0]
    hasty = [name for name, momentum in norms.items() if momentum >= HASTY]
    if still:
        cause = "BatchNorm's running statistics never move: evaluation goes on with mean 0 and variance 1"
    elif hasty:
        cause = "BatchNorm's running statistics are those of the last batch alone"
    else:
        return None
    evidence = f"momentum {norms[(still or hasty)[0]]:g} in {join_names(still or hasty)}"
    remedy = "torch's momentum is the share of the new batch, 0.1 by default (Keras's 0.99 is 0.01 here)"
    return failed(evidence, cause, remedy, "model")


def _dropouts(calls: list[tuple[str, float]]) -> Finding | None:
    strongest = max(calls, key=lambda call: call[1], default=("", 0.0))
    if strongest[1] < STRONG:
        return None
    evidence = f"dropout {strongest[1]:g} in {strongest[0] or 'the network itself'}"
    cause = f"{evidence} leaves {100 * (1 - strongest[1]):.3g} % of the features"
    remedy = "0.1 to 0.5 are usual; torch's p is the share that is dropped"
    return (failed if strongest[1] >= ABSURD else warned)(evidence, cause, remedy, "model")


def _switching(model: nn.Module, images: Tensor, frozen: bool) -> Finding | None:
    """Whether the layers that care are in the mode that was asked for, before and after a forward pass."""
    matter = {n: m for n, m in model.named_modules() if isinstance(m, MATTERS)}
    model.train()
    kept = [n for n, m in matter.items() if not m.training and not _frozen_norm(m)]
    with torch.no_grad():
        model(images)
    if not frozen:
        kept += [n for n, m in matter.items() if not m.training and n not in kept and not _frozen_norm(m)]
    if kept:
        evidence = f"after model.train() {len(kept)} of {len(matter)} layers are not in training mode"
        cause = f"evaluation mode in training: {join_names(kept)}"
        return failed(evidence, cause, "look for eval() in train() or forward()", "model")
    model.eval()
    kept = [n for n, m in model.named_modules() if m.training]
    with torch.no_grad():
        model(images)
    kept += [n for n, m in model.named_modules() if m.training and n not in kept]
    model.eval()
    if kept:
        evidence = f"after model.eval() {len(kept)} layers are in training mode"
        cause = f"training mode in evaluation: {join_names([name or 'the network itself' for name in kept])}"
        return failed(evidence, cause, "look for train() in eval() or forward()", "model")
    return None


def _frozen_norm(module: nn.Module) -> bool:
    """A norm whose parameters don't learn keeps its statistics, too, on purpose."""
    parameters = list(module.parameters(recurse=False))
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _evaluation(context: CheckContext, model: nn.Module, images: Tensor) -> Finding | None:
    """Whether two evaluations of the same images agree, and leave the model as it was."""
    model.eval()
    before = {name: value.clone() for name, value in (*model.named_buffers(), *model.named_parameters())}
    context.reseed("modes", 1)
    first, calls = watch_modes(model, images)
    context.reseed("modes", 2)
    with torch.no_grad():
        apart = relative_distance(first, model(images).float())
    if apart > SAME:
        drops = [name or "the network itself" for name, _ in calls.dropouts]
        source = f"dropout is at work in {join_names(drops)}" if drops else "something is drawn at random"
        evidence = f"two evaluations of the same images differ by {apart:.2g}"
        remedy = "use nn.Dropout, or F.dropout(x, p, self.training); make no layers in forward()"
        return failed(evidence, f"evaluation is random: {source}", remedy, "model")
    now = dict((*model.named_buffers(), *model.named_parameters()))
    changed = [name for name, value in before.items() if not torch.equal(value, now[name])]
    if changed:
        cause = "something learns in evaluation"
        return failed(
            f"an evaluation changes {join_names(changed)}", cause, "pass training=self.training", "model"
        )
    if calls.batch_norms:
        evidence = f"batch statistics in evaluation: {join_names(calls.batch_norms)}"
        cause = "an answer depends on the other images of its batch"
        return failed(evidence, cause, "set track_running_stats=True, training=self.training", "model")
    return None


def _training(context: CheckContext, model: nn.Module, images: Tensor) -> Finding:
    """Whether training computes what evaluation does, but for dropout and batch statistics."""
    with torch.no_grad():
        answer = model.eval()(images).float()
    model.train()
    context.reseed("modes", 3)
    outputs, calls = watch_modes(model, images)
    model.eval()
    if finding := _dropouts(calls.dropouts):
        return finding
    apart = relative_distance(answer, outputs)
    reasons = [f"{len(calls.dropouts)} dropouts"] if calls.dropouts else []
    reasons += [f"{len(calls.batch_norms)} batch statistics"] if calls.batch_norms else []
    reasons += ["random draws"] if calls.drew and not calls.dropouts else []
    shown = ", ".join(reasons) or "nothing depends on the mode"
    evidence = f"training and evaluation differ by {apart:.2g}: {shown}"
    if apart > SAME and not reasons:
        cause = "the network computes something else in training, though nothing is random or of the batch"
        return warned(evidence, cause, "look for self.training in forward()", "model")
    return passed(evidence)
