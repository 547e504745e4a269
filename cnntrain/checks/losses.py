"""Checks of the loss: a mean over the batch, lowest for correct outputs, and dependent on the target."""

import math

import torch

from cnntrain.checks.context import CheckContext, failed, passed, skipped
from cnntrain.checks.short_training import image_count, seeded_generator
from cnntrain.types import Finding

IMAGES = 16
TOLERANCE = 1e-4
STEPS, STEP_SIZE = 100, 0.5  # of Adam on free outputs; the first step size
MAX_OUTPUT_ELEMENTS = 1_000_000
MAX_REMAINING = 0.3  # of the distance between the initial and the lowest loss
MAX_REMAINING_MISTAKES = 0.5


def loss_scale(context: CheckContext) -> Finding:
    """Check that the mean loss stays the same if every example is duplicated."""
    batch = context.eval_batch(count=image_count(context, IMAGES))
    with torch.no_grad():
        outputs = context.outputs(context.copy_model(), batch.images)
        twice = {name: torch.cat((target, target)) for name, target in batch.truth.items()}
        first = {name: target[:1] for name, target in batch.truth.items()}
        once = float(context.mean_loss(outputs, batch.truth))
        doubled = float(context.mean_loss(torch.cat((outputs, outputs)), twice))
        single = float(context.mean_loss(outputs[:1], first))
    evidence = (
        f"loss {once:.4g} for {len(batch)} examples, {doubled:.4g} with each example duplicated, {single:.4g} for the "
        "first example alone"
    )
    if abs(doubled - once) <= TOLERANCE * max(abs(once), 1e-6) or not math.isfinite(once):
        return passed(evidence)
    if abs(doubled) > abs(once):
        cause = "the loss is a sum over the batch, not a mean: the effective learning rate grows with batch_size"
    else:
        cause = "the loss is divided by the batch size twice: the effective learning rate shrinks with batch_size"
    remedy = "let losses() return the loss of each example and the number of its terms"
    return failed(evidence, cause, remedy, "task", "batch_size")


def loss_sees_labels(context: CheckContext) -> Finding:
    """Check that the loss of the same outputs changes with the target."""
    batch = context.eval_batch(count=image_count(context, 4 * IMAGES))
    with torch.no_grad():
        like = context.outputs(context.copy_model(), batch.images)
        outputs = torch.randn(like.shape, generator=seeded_generator(2)).to(like.device)
        for shift in range(1, len(batch)):
            others = {name: target.roll(shift, 0) for name, target in batch.truth.items()}
            pairs = [(batch.truth[name], target) for name, target in others.items()]
            differs = [(a != b).flatten(1).any(1) if a.ndim > 1 else a != b for a, b in pairs]
            changed = torch.stack([each.cpu() for each in differs]).any(0)
            if changed.any():
                break
        else:
            return skipped("all examples have the same target")
        own, other = (torch.stack(context.task.losses(outputs, each)) for each in (batch.truth, others))
    depends = (own != other).any(0).cpu()[changed]
    evidence = f"{int(depends.sum())} of {len(depends)} losses change with the target"
    if depends.any():
        return passed(evidence)
    return failed(evidence, "the loss does not depend on the target", "use the targets in the loss", "task")


def loss_sign(context: CheckContext) -> Finding:
    """Check that minimizing the loss over free outputs makes them correct, and reaches the lowest loss.

    The model takes no part, so a failure is a fault of the loss.
    """
    batch, task = context.eval_batch(count=image_count(context, IMAGES)), context.task
    with torch.no_grad():
        outputs = torch.zeros_like(context.outputs(context.copy_model(), batch.images))
    count = max(min(len(batch), MAX_OUTPUT_ELEMENTS // outputs[0].numel()), 1)
    outputs, truth = outputs[:count].clone(), {name: target[:count] for name, target in batch.truth.items()}
    before = float(task.mistake_score(outputs, truth).clamp(min=0).mean())
    outputs.requires_grad_()
    optimizer = torch.optim.Adam([outputs], lr=STEP_SIZE)
    losses: list[float] = []
    for step in range(STEPS + 1):
        loss = context.mean_loss(outputs, truth)
        losses.append(float(loss.detach()))
        if not loss.requires_grad:
            cause = "the loss is not differentiable: it uses argmax, a comparison, .item() or detach()"
            evidence = "the loss has no gradient with respect to the outputs"
            return failed(evidence, cause, "compute the loss from the outputs with differentiable operations", "task")
        optimizer.param_groups[0]["lr"] = STEP_SIZE * (1 - step / (STEPS + 1)) ** 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = float(task.mistake_score(outputs.detach(), truth).clamp(min=0).mean())
    first, last, floor = losses[0], min(losses), task.min_loss()
    evidence = (
        f"minimizing the loss over free outputs: loss {first:.4g} -> {last:.4g} (lowest possible {floor:.4g}), "
        f"mistakes {before:.3g} -> {after:.3g}"
    )
    if not math.isfinite(last) or last < floor - TOLERANCE - 1e-3 * abs(floor):
        cause = f"the loss falls below the lowest possible value ({floor:.4g}): its sign is probably wrong"
        return failed(evidence, cause, "minimize the loss, not its negative", "task")
    if after > MAX_REMAINING_MISTAKES * before and before > 1e-3:
        cause = "a lower loss does not improve the predictions: the loss and the metric use different targets"
        return failed(evidence, cause, "compare losses() with mistake_score()", "task")
    if last - floor > MAX_REMAINING * (first - floor):
        cause = "no outputs bring the loss near its lowest value, for example because a softmax is applied twice"
        return failed(evidence, cause, "pass unnormalized outputs (logits) to the loss", "task")
    return passed(evidence)
