"""Are the outputs what the loss expects? One answer per image, and bare numbers: no softmax, no ReLU at the end."""

import contextlib
import math

import torch
from torch import Tensor

from cnntrain.checks.context import CheckContext, failed, passed, skipped, warned
from cnntrain.checks.short_training import image_count, relative_distance, seeded_generator
from cnntrain.tasks.classification import Classification
from cnntrain.tasks.keypoints import Keypoints
from cnntrain.tasks.segmentation import Segmentation
from cnntrain.types import Finding

FEW = 5
SAME = 1e-3  # relative difference that batch sizes may make: other kernels, lower precision
HARDLY_CHANCE = 16  # outputs of one sign
# Nodes of the graph that leave numbers as they are.
TRANSPARENT = (
    "View",
    "UnsafeView",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Permute",
    "Transpose",
    "TBackward",
    "ToCopy",
    "Clone",
    "Alias",
    "Slice",
    "Select",
    "Expand",
    "AsStrided",
    "Narrow",
    "Upsample",
    "Cat",
    "Contiguous",
)
POSITIVE = {"Relu": "ReLU", "Softplus": "softplus", "Gelu": "GELU", "Silu": "SiLU", "Threshold": "threshold"}
SQUASHED = {"Sigmoid": "sigmoid", "Softmax": "softmax", "Hardsigmoid": "hard sigmoid"}
BOUNDED = {"Tanh": "tanh"}
CLAMPED = {"Hardtanh": "clamp", "Clamp": "clamp"}
LOGS = {"LogSoftmax": "log-softmax", "LogSigmoid": "log-sigmoid"}


def examples_apart(context: CheckContext) -> Finding:
    """In eval mode the answer and the loss of an image depend on no other image of the batch."""
    batch = context.eval_batch(count=FEW)
    if len(batch) < 2:
        return skipped("needs two images")
    model, images = context.copy_model(), batch.images.clone().requires_grad_()
    outputs, alone = model(images).float(), None
    # Batch norm refuses to take the statistics of one image.
    with torch.no_grad(), contextlib.suppress(ValueError):
        alone = model(images[:1]).float()
    if len(outputs) != len(batch) or (alone is not None and alone.shape != outputs[:1].shape):
        shapes = f"{len(batch)} images give {tuple(outputs.shape)}"
        shapes += "" if alone is None else f", one gives {tuple(alone.shape)}"
        cause = "a squeeze() or reshape takes the batch's axis for another"
        return failed(shapes, cause, "name the axes: flatten(1), squeeze(dim)", "model")
    weights = torch.randn(outputs.shape[1:], generator=seeded_generator(0)).to(outputs.device)
    leak = _leak((outputs[0] * weights).sum(), images)
    apart = math.inf if alone is None else relative_distance(outputs[:1], alone)
    evidence = (
        f"gradient of an answer with respect to other images {leak:.2g} of that to its own; "
        f"alone in a batch it differs by {apart:.2g}"
    )
    if leak > 0 or apart > SAME:
        cause = "something mixes the batch: a mean or softmax over dim 0, a reshape of the wrong axes, "
        cause += "or batch statistics in evaluation"
        return failed(evidence, cause, "let no operation but BatchNorm in training run over dim 0", "model")
    free = outputs.detach().clone().requires_grad_()
    leak = _leak(context.task.losses(free, batch.truth)[0][0], free)
    if leak > 0:
        evidence = f"gradient of a loss with respect to other answers {leak:.2g} of that to its own"
        cause = "the task's losses() mixes the examples"
        return failed(evidence, cause, "return one loss per example", "task")
    return passed(evidence)


def _leak(value: Tensor, inputs: Tensor) -> float:
    """Gradient of what belongs to example 0 with respect to the others, beside that to example 0 itself."""
    if not value.requires_grad:
        return 0.0
    (gradient,) = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
    if gradient is None:
        return 0.0
    own, others = float(gradient[0].abs().max()), float(gradient[1:].abs().max())
    return others / own if own > 0 else float(others > 0)


@torch.no_grad()
def batch_order(context: CheckContext) -> Finding:
    """In eval mode another order of the batch gives the same answers in that order."""
    images = context.eval_batch(count=2 * FEW).images
    if len(images) < 2:
        return skipped("needs two images")
    order = torch.randperm(len(images), generator=seeded_generator(1)).to(images.device)
    model = context.copy_model()
    apart = relative_distance(model(images)[order], model(images[order]))
    evidence = f"answers for {len(images)} images in another order differ by {apart:.2g} of their size"
    if apart <= SAME:
        return passed(evidence)
    cause = "the place in the batch matters, or the answer is drawn at random"
    return failed(evidence, cause, "see examples apart and modes", "model")


def output_layer(context: CheckContext) -> Finding:
    """The network gives bare numbers; the loss itself turns them into probabilities or coordinates."""
    task = context.task
    logits = isinstance(task, (Classification, Segmentation)) or (
        isinstance(task, Keypoints) and task.head == "heatmap" and task.loss_name == "auto"
    )
    points = isinstance(task, Keypoints) and task.head == "regression"
    if not logits and not points:
        return skipped("this task says nothing of what its outputs may be")
    images = context.eval_batch(count=image_count(context, 64)).images
    outputs = context.copy_model()(images).float()
    last, outputs = last_operation(outputs), outputs.detach()
    evidence = f"outputs from {float(outputs.min()):.3g} to {float(outputs.max()):.3g}"
    evidence += f", last operation {last}" if last else ""
    if points:
        return _judge_points(evidence, last, outputs)
    squashed, positive = _is(last, SQUASHED | BOUNDED), _is(last, POSITIVE)
    if squashed == "softmax" or _sums_to_one(outputs):
        cause = "the outputs are probabilities already: a softmax before the loss, which takes one itself"
        return failed(evidence, cause, "take the softmax out of the network", "model")
    if squashed:
        cause = f"a {squashed} before the loss, which takes logits of any size: it holds them between bounds"
        return failed(evidence, cause, f"take the {squashed} out of the network", "model")
    clamped = _is(last, CLAMPED)
    if positive in ("ReLU", "threshold") or (
        clamped and outputs.min() >= 0 and outputs.numel() >= HARDLY_CHANCE
    ):
        cause = "a ReLU on the outputs: a logit below zero has no gradient and never comes back"
        return failed(evidence, cause, "take the last ReLU out of the network", "model")
    if clamped:
        cause = "a clamp on the outputs, from which no gradient comes back where it holds them"
        return warned(evidence, cause, "take it out of the network", "model")
    if positive:
        cause = f"a {positive} on the outputs: logits can hardly be negative"
        return warned(evidence, cause, f"take the {positive} out of the network", "model")
    if _is(last, LOGS) or _sums_to_one(outputs.exp()):
        cause = "a log-softmax before the loss, which takes one itself: it changes nothing"
        return warned(evidence, cause, "take it out of the network", "model")
    return passed(evidence)


def _judge_points(evidence: str, last: str, outputs: Tensor) -> Finding:
    """Coordinates count from the center of the canvas: half of them are negative."""
    name = _is(last, POSITIVE | SQUASHED | LOGS)
    if name or (outputs.min() >= 0 and outputs.numel() >= HARDLY_CHANCE):
        cause = f"{'a ' + name if name else 'something'} on the outputs keeps them on one side of zero: "
        cause += "points left of the center or above it can't be reached"
        return failed(evidence, cause, "end in a bare dense layer", "model")
    return passed(evidence)


def _is(last: str, names: dict[str, str]) -> str:
    """What users call the operation, when it is one of these; else nothing."""
    return next((shown for start, shown in names.items() if last.startswith(start)), "")


def _sums_to_one(outputs: Tensor) -> bool:
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        return False
    return bool((outputs >= 0).all() and ((outputs.sum(1) - 1).abs() < 1e-3).all())


def last_operation(outputs: Tensor) -> str:
    """The last operation of a graph that changes numbers, by torch's name for it ('Relu'); '' where there is none."""
    node = outputs.grad_fn
    while node is not None:
        name = node.name()
        before = [n for n, _ in node.next_functions if n is not None]
        if not name.startswith(TRANSPARENT) or not before:
            return name.partition("Backward")[0]
        node = before[0]
    return ""
