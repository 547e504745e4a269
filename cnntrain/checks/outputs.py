"""Checks of the outputs and the loss.

Outputs: one per image, independent of the other images, and without a softmax or ReLU at the end. Loss: a mean over the
batch, lowest for correct outputs, and dependent on the target.
"""

import contextlib
import math

import torch
from torch import Tensor

from cnntrain.checks.context import CheckContext, failed, passed, relative_distance, skipped, sums_to_one, warned
from cnntrain.tasks.classification import Classification
from cnntrain.tasks.keypoints import Keypoints
from cnntrain.tasks.segmentation import Segmentation
from cnntrain.types import Finding

IMAGES = 5
TOLERANCE = 1e-3  # relative difference between batch sizes, which use other kernels
SIGN_EVIDENCE = 16  # number of outputs whose common sign is not a coincidence
LOSS_IMAGES = 16
LOSS_TOLERANCE = 1e-4
STEPS, STEP_SIZE = 100, 0.5  # of Adam on free outputs; the first step size
MAX_OUTPUT_ELEMENTS = 1_000_000
MAX_REMAINING = 0.3  # of the distance between the initial and the lowest loss
MAX_REMAINING_MISTAKES = 0.5
# Autograd nodes that do not change values.
SHAPE_OPERATIONS = (
    *("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Permute", "Transpose", "TBackward", "ToCopy"),
    *("Clone", "Alias", "Slice", "Select", "Expand", "AsStrided", "Narrow", "Upsample", "Cat", "Contiguous"),
)
POSITIVE = {"Relu": "ReLU", "Softplus": "softplus", "Gelu": "GELU", "Silu": "SiLU", "Threshold": "threshold"}
SQUASHED = {"Sigmoid": "sigmoid", "Softmax": "softmax", "Hardsigmoid": "hard sigmoid"}
BOUNDED = {"Tanh": "tanh"}
CLAMPED = {"Hardtanh": "clamp", "Clamp": "clamp"}
LOGARITHMIC = {"LogSoftmax": "log-softmax", "LogSigmoid": "log-sigmoid"}


def examples_apart(context: CheckContext) -> Finding:
    """Check that in eval mode the output and the loss of an image do not depend on other images of the batch."""
    batch = context.eval_batch(count=IMAGES)
    if len(batch) < 2:
        return skipped("needs two images")
    model, images = context.copy_model(), batch.images.requires_grad_()
    outputs, single = model(images).float(), None
    # BatchNorm in training mode refuses a batch of one image.
    with torch.no_grad(), contextlib.suppress(ValueError):
        single = model(images[:1]).float()
    if len(outputs) != len(batch) or (single is not None and single.shape != outputs[:1].shape):
        shapes = f"output shape for {len(batch)} images: {tuple(outputs.shape)}"
        shapes += "" if single is None else f", for one image: {tuple(single.shape)}"
        cause = "a squeeze() or reshape removes or merges the batch dimension"
        return failed(shapes, cause, "name the dimensions explicitly: flatten(1), squeeze(dim)", "model")
    weights = torch.randn(outputs.shape[1:], generator=torch.Generator().manual_seed(0)).to(outputs.device)
    leak = _gradient_leak((outputs[0] * weights).sum(), images)
    distance = math.inf if single is None else relative_distance(outputs[:1], single)
    evidence = f"gradient of an output with respect to other images, relative to its own image: {leak:.2g}; "
    evidence += f"difference from the output in a batch of one: {distance:.2g}"
    if leak > 0 or distance > TOLERANCE:
        cause = "an operation mixes the images: a mean or softmax over dimension 0, a reshape, or batch statistics"
        remedy = "let no operation except BatchNorm in training mode reduce over dimension 0"
        return failed(evidence, cause, remedy, "model")
    free = outputs.detach().clone().requires_grad_()
    leak = _gradient_leak(context.task.losses(free, batch.truth)[0][0], free)
    if leak > 0:
        evidence = f"gradient of a loss with respect to other outputs, relative to its own output: {leak:.2g}"
        cause = "losses() of the task mixes the examples"
        return failed(evidence, cause, "return one loss per example", "task")
    return passed(evidence)


def _gradient_leak(value: Tensor, inputs: Tensor) -> float:
    """Return the largest gradient of `value` with respect to inputs[1:], relative to that with respect to inputs[0]."""
    if not value.requires_grad:
        return 0.0
    (gradient,) = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
    if gradient is None:
        return 0.0
    own, others = float(gradient[0].abs().max()), float(gradient[1:].abs().max())
    return others / own if own > 0 else float(others > 0)


@torch.no_grad()
def batch_order(context: CheckContext) -> Finding:
    """Check that in eval mode a permuted batch gives the same outputs, permuted."""
    images = context.eval_batch(count=2 * IMAGES).images
    if len(images) < 2:
        return skipped("needs two images")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1)).to(images.device)
    model = context.copy_model()
    distance = relative_distance(model(images)[order], model(images[order]))
    evidence = f"relative difference of the outputs for {len(images)} images in another order: {distance:.2g}"
    if distance <= TOLERANCE:
        return passed(evidence)
    cause = "the output depends on the position in the batch, or is random"
    return failed(evidence, cause, "see examples apart and modes", "model")


def output_layer(context: CheckContext) -> Finding:
    """Check that the network ends in unnormalized outputs (logits or coordinates), as the loss expects."""
    task = context.task
    logits = isinstance(task, (Classification, Segmentation)) or (
        isinstance(task, Keypoints) and task.head == "heatmap" and task.loss_name == "auto"
    )
    coordinates = isinstance(task, Keypoints) and task.head == "regression"
    if not logits and not coordinates:
        return skipped("this task does not restrict its outputs")
    images = context.eval_batch(count=context.image_count(64)).images
    outputs = context.copy_model()(images).float()
    last, outputs = last_operation(outputs), outputs.detach()
    evidence = f"outputs from {float(outputs.min()):.3g} to {float(outputs.max()):.3g}"
    evidence += f", last operation {last}" if last else ""
    if coordinates:
        return _check_coordinates(evidence, last, outputs)
    squashed, positive = _display_name(last, SQUASHED | BOUNDED), _display_name(last, POSITIVE)
    clamped = _display_name(last, CLAMPED)
    non_negative = bool(outputs.min() >= 0) and outputs.numel() >= SIGN_EVIDENCE
    if squashed == "softmax" or sums_to_one(outputs):
        verdict, name, effect = failed, "softmax", "cross-entropy expects logits, and applies softmax itself"
    elif squashed:
        verdict, name, effect = failed, squashed, "it bounds the outputs, but the loss expects logits"
    elif positive in ("ReLU", "threshold") or (clamped and non_negative):
        verdict, name, effect = failed, "ReLU", "negative logits are cut off and get no gradient"
    elif clamped:
        verdict, name, effect = warned, "clamp", "outputs at its bounds get no gradient"
    elif positive:
        verdict, name, effect = warned, positive, "logits can hardly be negative"
    elif _display_name(last, LOGARITHMIC) or sums_to_one(outputs.exp()):
        verdict, name, effect = warned, "log-softmax", "cross-entropy applies it as well, so it has no effect"
    else:
        return passed(evidence)
    return verdict(evidence, f"the network ends in {name}: {effect}", f"remove the last {name}", "model")


def _check_coordinates(evidence: str, last: str, outputs: Tensor) -> Finding:
    """Check that coordinates, which are relative to the center of the image, can be negative."""
    name = _display_name(last, POSITIVE | SQUASHED | LOGARITHMIC)
    if name or (outputs.min() >= 0 and outputs.numel() >= SIGN_EVIDENCE):
        end = f"the network ends in {name}" if name else "the outputs are never negative"
        cause = f"{end}, so points left of the center or above it cannot be predicted"
        return failed(evidence, cause, "end the network with a dense layer", "model")
    return passed(evidence)


def _display_name(operation: str, names: dict[str, str]) -> str:
    """Return the display name of an autograd operation if it is in `names`, else ''."""
    return next((shown for start, shown in names.items() if operation.startswith(start)), "")


def last_operation(outputs: Tensor) -> str:
    """Return autograd's name of the last operation that changes values ('Relu'); '' if there is no graph."""
    node = outputs.grad_fn
    while node is not None:
        name = node.name()
        inputs = [n for n, _ in node.next_functions if n is not None]
        if not name.startswith(SHAPE_OPERATIONS) or not inputs:
            return name.partition("Backward")[0]
        node = inputs[0]
    return ""


def loss_scale(context: CheckContext) -> Finding:
    """Check that the mean loss stays the same if every example is duplicated."""
    batch = context.eval_batch(count=context.image_count(LOSS_IMAGES))
    with torch.no_grad():
        outputs = context.outputs(context.copy_model(), batch.images)
        twice = {name: torch.cat((target, target)) for name, target in batch.truth.items()}
        first = {name: target[:1] for name, target in batch.truth.items()}
        once = float(context.mean_loss(outputs, batch.truth))
        doubled = float(context.mean_loss(torch.cat((outputs, outputs)), twice))
        single = float(context.mean_loss(outputs[:1], first))
    evidence = f"loss {once:.4g} for {len(batch)} examples, {doubled:.4g} with each twice, {single:.4g} for the first"
    if abs(doubled - once) <= LOSS_TOLERANCE * max(abs(once), 1e-6) or not math.isfinite(once):
        return passed(evidence)
    if abs(doubled) > abs(once):
        cause = "the loss is a sum over the batch, not a mean: the effective learning rate grows with batch_size"
    else:
        cause = "the loss is divided by the batch size twice: the effective learning rate shrinks with batch_size"
    remedy = "let losses() return the loss of each example and the number of its terms"
    return failed(evidence, cause, remedy, "task", "batch_size")


def loss_sees_labels(context: CheckContext) -> Finding:
    """Check that the loss of the same outputs changes with the target."""
    batch = context.eval_batch(count=context.image_count(4 * LOSS_IMAGES))
    with torch.no_grad():
        like = context.outputs(context.copy_model(), batch.images)
        outputs = torch.randn(like.shape, generator=torch.Generator().manual_seed(2)).to(like.device)
        for shift in range(1, len(batch)):
            others = {name: target.roll(shift, 0) for name, target in batch.truth.items()}
            differs = [(batch.truth[name] != other).reshape(len(batch), -1).any(1) for name, other in others.items()]
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
    batch, task = context.eval_batch(count=context.image_count(LOSS_IMAGES)), context.task
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
    evidence = f"minimizing the loss over free outputs: loss {first:.4g} -> {last:.4g} (lowest possible {floor:.4g})"
    evidence += f", mistakes {before:.3g} -> {after:.3g}"
    if not math.isfinite(last) or last < floor - LOSS_TOLERANCE - 1e-3 * abs(floor):
        cause = f"the loss falls below the lowest possible value ({floor:.4g}): its sign is probably wrong"
        return failed(evidence, cause, "minimize the loss, not its negative", "task")
    if after > MAX_REMAINING_MISTAKES * before and before > 1e-3:
        cause = "a lower loss does not improve the predictions: the loss and the metric use different targets"
        return failed(evidence, cause, "compare losses() with mistake_score()", "task")
    if last - floor > MAX_REMAINING * (first - floor):
        cause = "no outputs bring the loss near its lowest value, for example because a softmax is applied twice"
        return failed(evidence, cause, "pass unnormalized outputs (logits) to the loss", "task")
    return passed(evidence)
