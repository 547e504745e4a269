"""Check that norms with running statistics give similar results in training and eval mode."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn

from cnntrain.checks.context import CheckContext, failed, join_names, passed, skipped
from cnntrain.checks.modes import MAX_MOMENTUM, MOMENTUM_REMEDY, is_frozen
from cnntrain.checks.short_training import ShortTraining, train_steps
from cnntrain.types import Batch, Finding

BATCHES = 8
LEARNED = 0.75  # loss relative to a prediction that ignores the image; above, there is nothing to lose in eval mode
MAX_LOST = 0.5  # share of what was learned that may be lost in eval mode
TOLERANCE = 1e-4
NO_NORM = "no layer has running statistics"
Norm = nn.modules.batchnorm._NormBase


def batch_norm_gap(context: CheckContext) -> Finding:
    """Check that running statistics follow training, and that the loss in eval mode is close to that in training."""
    training: ShortTraining | None = context.cache.get("short training")
    model = context.copy_model() if training is None else training.model
    norms = {n: m for n, m in model.named_modules() if isinstance(m, Norm) and m.track_running_stats}
    if not norms and training is None and not context.trained:
        return skipped(NO_NORM)
    if context.trained:
        return _gap_of_trained(context)
    if training is None:
        train_steps(context, model, context.make_optimizer(model), 2)
    return _check_statistics(context, norms) or _gap(context, training, len(norms))


def _check_statistics(context: CheckContext, norms: dict[str, Norm]) -> Finding | None:
    """Check that the running statistics have changed, and are not those of a single batch."""
    initial = dict(context.model.named_modules())
    constant, high = [], []
    for name, norm in norms.items():
        if is_frozen(norm):
            continue
        before = initial[name]
        assert isinstance(before, Norm)
        pairs = ((norm.running_mean, before.running_mean), (norm.running_var, before.running_var))
        if all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs):
            constant.append(name)
        elif norm.momentum is not None and norm.momentum >= MAX_MOMENTUM:
            high.append(name)
    if constant:
        evidence = f"running statistics unchanged by training steps: {join_names(constant)}"
        cause = "the running statistics never change (momentum 0, or eval mode during training)"
        return failed(evidence, cause, MOMENTUM_REMEDY, "model")
    if high:
        cause = "the running statistics are those of the last batch alone"
        evidence = f"momentum {norms[high[0]].momentum:g} in {join_names(high)}"
        return failed(evidence, cause, MOMENTUM_REMEDY, "model")
    return None


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
    rows = training.rows[: BATCHES * training.batch_size]
    if len(rows) < 2 * training.batch_size:
        return passed(f"{evidence}; the loss was not compared, as there are too few images")
    chunks = rows[: len(rows) - len(rows) % training.batch_size].split(training.batch_size)
    batches = [context.train_examples(chunk) for chunk in chunks]
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
    cause = (
        "much of what was learned is lost in eval mode: the running statistics differ from the batch statistics, or "
        "the training was too short for them to converge"
    )
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
            if isinstance(module, nn.modules.dropout._DropoutNd):
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
