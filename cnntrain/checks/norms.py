"""Do normalization layers say the same of an image in training and in evaluation?"""

import copy
import math

import torch
from torch import nn

from cnntrain.checks.context import CheckContext, failed, join_names, passed, skipped
from cnntrain.checks.modes import HASTY
from cnntrain.checks.short_training import ShortTraining, train_steps
from cnntrain.types import Finding

SETTLING_BATCHES = 8
LEARNED = (
    0.75  # of the loss of the answer that ignores the image: more, and there is nothing that could be lost
)
LOST = 0.5  # share of what was learned that may be gone in evaluation
SAME = 1e-4
NO_NORM = "no layer keeps running statistics"
Norm = nn.modules.batchnorm._NormBase


def batch_norm_gap(context: CheckContext) -> Finding:
    """Running statistics follow the training, and with them the loss on the same images is that of the training."""
    training = context.cache.get("short training")
    model = context.copy_model() if training is None else training.model
    norms = {n: m for n, m in model.named_modules() if isinstance(m, Norm) and m.track_running_stats}
    if not norms and training is None and not context.trained:
        return skipped(NO_NORM)
    if context.trained:
        return _gap_of_trained(context)
    if training is None:
        train_steps(context, model, context.make_optimizer(model), 2)
    return _statistics_move(context, norms) or _gap(context, training, len(norms))


def _statistics_move(context: CheckContext, norms: dict[str, Norm]) -> Finding | None:
    """None where they do, and are no single batch's."""
    begun = dict(context.model.named_modules())
    remedy = "torch's momentum is the share of the new batch, 0.1 by default (Keras's 0.99 is 0.01 here)"
    still, hasty = [], []
    for name, norm in norms.items():
        own = list(norm.parameters(recurse=False))
        if own and not any(p.requires_grad for p in own):
            continue  # frozen, and its statistics with it
        before = begun[name]
        assert isinstance(before, Norm)
        pairs = ((norm.running_mean, before.running_mean), (norm.running_var, before.running_var))
        if all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs):
            still.append(name)
        elif norm.momentum is not None and norm.momentum >= HASTY:
            hasty.append(name)
    if still:
        cause = "running statistics never move (momentum 0, or evaluation mode in training): evaluation uses others"
        return failed(f"after training steps as they were: {join_names(still)}", cause, remedy, "model")
    if hasty:
        cause = "running statistics are those of the last batch alone"
        return failed(f"momentum {norms[hasty[0]].momentum:g} in {join_names(hasty)}", cause, remedy, "model")
    return None


def _gap(context: CheckContext, training: ShortTraining | None, count: int) -> Finding:
    """The loss on a few batches in training mode without dropout, and in evaluation mode with settled statistics."""
    moves = f"the running statistics of {count} norms move"
    if training is None:
        return passed(f"{moves}; no training to measure the gap after")
    model = copy.deepcopy(training.model)
    for module in model.modules():
        if isinstance(module, Norm) and module.track_running_stats and not _frozen(module):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over the batches: where a moving average would settle
    rows = training.rows[: SETTLING_BATCHES * training.batch_size]
    if len(rows) < 2 * training.batch_size:
        return passed(f"{moves}; too few images to measure the gap on")
    chunks = rows[: len(rows) - len(rows) % training.batch_size].split(training.batch_size)
    batches = [context.train_examples(chunk) for chunk in chunks]
    in_training, in_evaluation = _losses(context, model, batches)
    if not count and abs(in_training - in_evaluation) < SAME * abs(in_evaluation):
        return skipped(NO_NORM)  # nor one of the user's own
    prior = training.priors["train"]
    evidence = f"{moves}; loss on the same images {in_training:.3g} in training mode, {in_evaluation:.3g} in evaluation"
    if in_training > LEARNED * prior:
        return passed(f"{evidence} (little is learned yet)")
    return _judge_gap(in_training, in_evaluation, prior, evidence)


def _gap_of_trained(context: CheckContext) -> Finding:
    """As it is: the statistics of the checkpoint."""
    batch = context.eval_batch("train", max(context.plan.batch_size, 32))
    model = context.copy_model()
    in_training, in_evaluation = _losses(context, model, [batch], settle=False)
    with torch.no_grad():
        uninformed = context.task.uninformed_loss(batch.targets, context.outputs(model, batch.images))
    evidence = f"loss on the same images {in_training:.3g} with their statistics, {in_evaluation:.3g} with the running"
    if in_training > LEARNED * uninformed:
        return skipped(f"too little learned to tell; {evidence}")
    return _judge_gap(in_training, in_evaluation, uninformed, evidence)


def _judge_gap(in_training: float, in_evaluation: float, ignorant: float, evidence: str) -> Finding:
    if in_evaluation - in_training <= LOST * (ignorant - in_training):
        return passed(evidence)
    cause = (
        "evaluation mode loses what training mode knows: its statistics are not those of the training's batches, "
        "or the training was too short for them to settle"
    )
    remedy = (
        "look for a norm with statistics of its own, or a small batch_size; batch_size=32, model.norm=group"
    )
    return failed(evidence, cause, remedy, "model", "batch_size")


@torch.no_grad()
def _losses(
    context: CheckContext, model: nn.Module, batches: list, settle: bool = True
) -> tuple[float, float]:
    """Mean loss in training mode without dropout, then in evaluation mode."""
    found = []
    for training in (True, False):
        model.train(training)
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
            if not settle and isinstance(module, Norm):
                module.momentum = 0.0  # evaluation comes after, and is to meet them as they were
        total = count = 0.0
        for batch in batches:
            sums, counts = context.task.loss(context.outputs(model, batch.images), batch.targets, plain=True)
            total, count = total + float(sums), count + float(counts)
        found.append(total / count if count else math.nan)
    model.eval()
    return found[0], found[1]


def _frozen(norm: nn.Module) -> bool:
    own = list(norm.parameters(recurse=False))
    return bool(own) and not any(p.requires_grad for p in own)
