"""Is the loss a loss? A mean over the batch, least where the answer is right, and different for another target."""

import math

import torch
from torch import Tensor

from cnntrain.checks.context import CheckContext, failed, passed, skipped
from cnntrain.checks.short_training import image_count, seeded_generator
from cnntrain.types import Finding

IMAGES = 16
SAME = 1e-4
DESCENT, STRIDE = 100, 0.5  # steps of Adam on bare outputs, and the first one's length
LARGEST = 1_000_000  # outputs in all
LEFT = 0.3  # share of the way from knowing nothing to the lowest loss that may be left at the end
TASK = "task"


def loss_scale(context: CheckContext) -> Finding:
    """The mean loss of a batch stays the same when every example comes twice."""
    batch = context.eval_batch(count=image_count(context, IMAGES))
    with torch.no_grad():
        outputs = context.outputs(context.copy_model(), batch.images)
        twice = {name: torch.cat((target, target)) for name, target in batch.truth.items()}
        once, doubled = (
            _mean(context, outputs, batch.truth),
            _mean(context, torch.cat((outputs, outputs)), twice),
        )
        single = _mean(context, outputs[:1], {name: target[:1] for name, target in batch.truth.items()})
    evidence = (
        f"loss {once:.4g} of {len(batch)} examples, {doubled:.4g} with each twice ({single:.4g} of one alone)"
    )
    if abs(doubled - once) <= SAME * max(abs(once), 1e-6) or not math.isfinite(once):
        return passed(evidence)
    if abs(doubled) > abs(once):
        cause = "the loss is a sum over the batch, not a mean: the learning rate grows with batch_size"
    else:
        cause = "the loss is divided by the size of the batch twice: the learning rate falls with batch_size"
    return failed(
        evidence, cause, "let losses() return each example's loss and what counts in it", TASK, "batch_size"
    )


def loss_sees_labels(context: CheckContext) -> Finding:
    """For the same outputs another target gives another loss."""
    batch = context.eval_batch(count=image_count(context, 4 * IMAGES))
    with torch.no_grad():
        like = context.outputs(context.copy_model(), batch.images)
        outputs = torch.randn(like.shape, generator=seeded_generator(2)).to(like.device)
        for shift in range(1, len(batch)):
            others = {name: target.roll(shift, 0) for name, target in batch.truth.items()}
            pairs = [(batch.truth[name], target) for name, target in others.items()]
            differs = [
                (one != other).flatten(1).any(1) if one.ndim > 1 else one != other for one, other in pairs
            ]
            changed = torch.stack([each.cpu() for each in differs]).any(0)
            if changed.any():
                break
        else:
            return skipped("all examples have the same target")
        own, wrong = (torch.stack(context.task.losses(outputs, each)) for each in (batch.truth, others))
    differ = (own != wrong).any(0).cpu()[changed]
    evidence = f"{int(differ.sum())} of {len(differ)} losses change with the target"
    if differ.any():
        return passed(evidence)
    cause = "the loss does not depend on the target: it never sees it"
    return failed(evidence, cause, "pass the targets to the loss", TASK)


def loss_sign(context: CheckContext) -> Finding:
    """Moving bare outputs down the gradient of the loss makes them right, and ends near the lowest loss.

    Neither network nor images take part: whatever goes wrong here is the loss's.
    """
    batch, task = context.eval_batch(count=image_count(context, IMAGES)), context.task
    with torch.no_grad():
        free = torch.zeros_like(context.outputs(context.copy_model(), batch.images))
    keep = max(min(len(batch), LARGEST // free[0].numel()), 1)
    free, truth = free[:keep].clone(), {name: target[:keep] for name, target in batch.truth.items()}
    before = float(task.mistake_score(free, truth).clamp(min=0).mean())
    free.requires_grad_()
    optimizer = torch.optim.Adam([free], lr=STRIDE)
    losses: list[float] = []
    for step in range(DESCENT + 1):
        total, count = task.loss(free, truth)
        loss = total / count.clamp(min=1e-12)
        losses.append(float(loss.detach()))
        if not loss.requires_grad:
            cause = "something in the loss can't be differentiated: argmax, a comparison, .item() or detach()"
            evidence = "the loss has no gradient with respect to the outputs"
            return failed(evidence, cause, "compute it from the outputs themselves", TASK)
        optimizer.param_groups[0]["lr"] = STRIDE * (1 - step / (DESCENT + 1)) ** 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = float(task.mistake_score(free.detach(), truth).clamp(min=0).mean())
    first, last, floor = losses[0], min(losses), task.min_loss()
    evidence = (
        f"bare outputs: loss {first:.4g} -> {last:.4g} (lowest {floor:.4g}), "
        f"mistakes {before:.3g} -> {after:.3g}"
    )
    if not math.isfinite(last) or last < floor - SAME - 1e-3 * abs(floor):
        cause = f"the loss falls below the lowest that there is ({floor:.4g}): its sign is flipped"
        return failed(evidence, cause, "minimize the loss, not its negative", TASK)
    if after > 0.5 * before and before > 1e-3:
        cause = "lowering the loss does not make the answers right: it compares them with another truth than the metric"
        return failed(evidence, cause, "look at losses() and mistake_score()", TASK)
    if last - floor > LEFT * (first - floor):
        cause = "no outputs bring the loss near its lowest: a softmax inside a loss that takes one itself?"
        return failed(evidence, cause, "give the loss bare outputs", TASK)
    return passed(evidence)


def _mean(context: CheckContext, outputs: Tensor, truth: dict[str, Tensor]) -> float:
    total, count = context.task.loss(outputs, truth)
    return float(total / count.clamp(min=1e-12))
