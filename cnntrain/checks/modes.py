"""Check that train() and eval() reach every layer, and that the two modes differ only where they should."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cnntrain.checks.context import CheckContext, failed, join_names, passed, relative_distance, skipped, warned
from cnntrain.checks.short_training import ShortTraining
from cnntrain.checks.watch import watch_modes
from cnntrain.types import Batch, Finding

IMAGES = 8
TOLERANCE = 1e-4
WARN_DROPOUT, FAIL_DROPOUT = 0.8, 0.95  # dropout probability
MAX_MOMENTUM = 0.99  # of BatchNorm
GAP_BATCHES = 8
LEARNED = 0.75  # loss relative to a prediction that ignores the image; above, there is nothing to lose in eval mode
MAX_LOST = 0.5  # share of what was learned that may be lost in eval mode
Norm = nn.modules.batchnorm._NormBase
Dropout = nn.modules.dropout._DropoutNd
MOMENTUM_REMEDY = "set momentum=0.1, PyTorch's default: the weight of the new batch (Keras's 0.99 is 0.01 here)"
NO_NORM = "no layer has running statistics"
NETWORK = "the network itself"


def modes(context: CheckContext) -> Finding:
    """Check that the mode reaches every layer, and that eval mode is deterministic and changes no state."""
    images = context.eval_batch(count=IMAGES).images
    model = context.copy_model()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    momenta = {n: m.momentum for n, m in norms.items() if m.track_running_stats and m.momentum is not None}
    return (
        _check_momenta(momenta, [name for name, momentum in momenta.items() if momentum == 0])
        or _check_switching(model, images, bool(context.config["model"].get("freeze")))
        or _check_evaluation(context, model, images)
        or _check_training(context, model, images)
    )


def _check_momenta(momenta: dict[str, float], constant: list[str]) -> Finding | None:
    """Check the momenta of norms; `constant` are those whose running statistics do not change."""
    if constant:
        evidence = f"running statistics do not change in {join_names(constant)}"
        cause = "the running statistics never change (momentum 0, or eval mode during training)"
        return failed(evidence, cause, MOMENTUM_REMEDY, "model")
    if high := [name for name, momentum in momenta.items() if momentum >= MAX_MOMENTUM]:
        cause = "the running statistics are those of the last batch alone"
        return failed(f"momentum {momenta[high[0]]:g} in {join_names(high)}", cause, MOMENTUM_REMEDY, "model")
    return None


def _check_switching(model: nn.Module, images: Tensor, frozen: bool) -> Finding | None:
    """Check the mode of the layers after train() and eval(), before and after a forward pass."""
    for training, called, opposite in ((True, "train", "eval"), (False, "eval", "train")):
        layers = {name or NETWORK: module for name, module in model.named_modules()}
        if training:
            layers = {n: m for n, m in layers.items() if isinstance(m, (Dropout, Norm)) and not is_frozen(m)}
        model.train(training)
        wrong = [name for name, module in layers.items() if module.training != training]
        with torch.no_grad():
            model(images)
        if not (training and frozen):
            wrong += [n for n, module in layers.items() if module.training != training and n not in wrong]
        model.eval()
        if wrong:
            evidence = f"after model.{called}(), {len(wrong)} of {len(layers)} layers are in the other mode"
            cause = f"layers that do not follow model.{called}(): {join_names(wrong)}"
            return failed(evidence, cause, f"look for {opposite}() in {called}() or forward()", "model")
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
    if changed := [name for name, value in before.items() if not torch.equal(value, after[name])]:
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
    name, probability = max(calls.dropouts, key=lambda call: call[1], default=("", 0.0))
    if probability >= WARN_DROPOUT:
        evidence = f"dropout {probability:g} in {name or NETWORK}"
        cause = f"{evidence} keeps only {100 * (1 - probability):.3g} % of the features"
        remedy = "use 0.1 to 0.5; p is the probability of dropping a feature"
        return (failed if probability >= FAIL_DROPOUT else warned)(evidence, cause, remedy, "model")
    distance = relative_distance(eval_outputs, outputs)
    reasons = [f"{len(calls.dropouts)} dropouts"] if calls.dropouts else []
    reasons += [f"{len(calls.batch_norms)} batch statistics"] if calls.batch_norms else []
    reasons += ["random draws"] if calls.draws and not calls.dropouts else []
    shown = ", ".join(reasons) or "no operation depends on the mode"
    evidence = f"relative difference between training and eval mode: {distance:.2g} ({shown})"
    if distance > TOLERANCE and not reasons:
        cause = "training mode computes something else, although no operation is random or uses batch statistics"
        return warned(evidence, cause, "look for self.training in forward()", "model")
    return passed(evidence)


def batch_norm_gap(context: CheckContext) -> Finding:
    """Check that running statistics follow training, and that the loss in eval mode is close to that in training."""
    if context.trained:
        return _gap_of_trained(context)
    training: ShortTraining | None = context.cache.get("short training")
    model = context.copy_model() if training is None else training.model
    norms = {n: m for n, m in model.named_modules() if isinstance(m, Norm) and m.track_running_stats}
    if not norms and training is None:
        return skipped(NO_NORM)
    if training is None:
        context.train_steps(model, context.make_optimizer(model), 2)
    trained = {name: norm for name, norm in norms.items() if not is_frozen(norm)}
    constant = [name for name, norm in trained.items() if _same_statistics(norm, context.model.get_submodule(name))]
    momenta = {n: norm.momentum for n, norm in trained.items() if norm.momentum is not None}
    return _check_momenta(momenta, constant) or _gap(context, training, len(norms))


def _same_statistics(norm: nn.Module, other: nn.Module) -> bool:
    pairs = [(getattr(norm, name), getattr(other, name)) for name in ("running_mean", "running_var")]
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def _gap(context: CheckContext, training: ShortTraining | None, norm_count: int) -> Finding:
    """Compare the losses of both modes on a few batches, after averaging the statistics over these batches."""
    evidence = f"the running statistics of {norm_count} norms follow training"
    if training is None:
        return passed(f"{evidence}; the loss was not compared, as there was no short training")
    model = copy.deepcopy(training.model)
    for module in model.modules():
        if isinstance(module, Norm) and module.track_running_stats and not is_frozen(module):
            module.reset_running_stats()
            module.momentum = None  # cumulative average: the value that a moving average converges to
    size = training.batch_size
    count = min(len(training.rows) // size, GAP_BATCHES)
    if count < 2:
        return passed(f"{evidence}; the loss was not compared, as there are too few images")
    batches = [context.train_examples(rows) for rows in training.rows[: count * size].split(size)]
    train_loss, eval_loss = _losses(context, model, batches)
    if not norm_count and abs(train_loss - eval_loss) < TOLERANCE * abs(eval_loss):
        return skipped(NO_NORM)
    evidence += f"; loss on the same images {train_loss:.3g} in training mode, {eval_loss:.3g} in eval mode"
    if train_loss > LEARNED * training.priors["train"]:
        return passed(f"{evidence} (little has been learned yet)")
    return _compare(train_loss, eval_loss, training.priors["train"], evidence)


def _gap_of_trained(context: CheckContext) -> Finding:
    """Compare the losses of both modes with the running statistics of the checkpoint."""
    batch = context.eval_batch("train", max(context.plan.batch_size, 32))
    model = context.copy_model()
    train_loss, eval_loss = _losses(context, model, [batch], update=False)
    with torch.no_grad():
        uninformed = context.task.uninformed_loss(batch.targets, context.outputs(model, batch.images))
    evidence = f"loss on the same images {train_loss:.3g} with batch statistics, {eval_loss:.3g} with running ones"
    if train_loss > LEARNED * uninformed:
        return skipped(f"undecided: too little has been learned; {evidence}")
    return _compare(train_loss, eval_loss, uninformed, evidence)


def _compare(train_loss: float, eval_loss: float, uninformed: float, evidence: str) -> Finding:
    if eval_loss - train_loss <= MAX_LOST * (uninformed - train_loss):
        return passed(evidence)
    cause = "much of what was learned is lost in eval mode: the running statistics differ from the batch statistics"
    remedy = "look for a custom norm layer or a small batch_size; set batch_size=32 or model.norm=group"
    return failed(evidence, cause, remedy, "model", "batch_size")


@torch.no_grad()
def _losses(
    context: CheckContext, model: nn.Module, batches: Sequence[Batch], update: bool = True
) -> tuple[float, float]:
    """Return the mean loss in training mode without dropout, and in eval mode.

    Args:
        update: whether the pass in training mode updates the running statistics.
    """
    losses = []
    for training in (True, False):
        model.train(training)
        for module in model.modules():
            if isinstance(module, Dropout):
                module.eval()
            if not update and isinstance(module, Norm):
                module.momentum = 0.0
        total = count = 0.0
        for batch in batches:
            outputs = context.outputs(model, batch.images)
            loss_sum, terms = context.task.loss(outputs, batch.targets, training=False)
            total, count = total + float(loss_sum), count + float(terms)
        losses.append(total / count if count else math.nan)
    model.eval()
    return losses[0], losses[1]
