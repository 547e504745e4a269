"""Checks of the outputs: one per image, independent of the other images, and without a softmax or ReLU at the end."""

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

IMAGES = 5
TOLERANCE = 1e-3  # relative difference between batch sizes, which use other kernels
SIGN_EVIDENCE = 16  # number of outputs whose common sign is not a coincidence
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
    model, images = context.copy_model(), batch.images.clone().requires_grad_()
    outputs, single = model(images).float(), None
    # BatchNorm in training mode refuses a batch of one image.
    with torch.no_grad(), contextlib.suppress(ValueError):
        single = model(images[:1]).float()
    if len(outputs) != len(batch) or (single is not None and single.shape != outputs[:1].shape):
        shapes = f"output shape for {len(batch)} images: {tuple(outputs.shape)}"
        shapes += "" if single is None else f", for one image: {tuple(single.shape)}"
        cause = "a squeeze() or reshape removes or merges the batch dimension"
        return failed(shapes, cause, "name the dimensions explicitly: flatten(1), squeeze(dim)", "model")
    weights = torch.randn(outputs.shape[1:], generator=seeded_generator(0)).to(outputs.device)
    leak = _gradient_leak((outputs[0] * weights).sum(), images)
    distance = math.inf if single is None else relative_distance(outputs[:1], single)
    evidence = (
        f"gradient of an output with respect to other images, relative to its own image: {leak:.2g}; difference from "
        f"the output in a batch of one: {distance:.2g}"
    )
    if leak > 0 or distance > TOLERANCE:
        cause = (
            "an operation mixes the images of a batch: a mean or softmax over dimension 0, a reshape of the wrong "
            "dimensions, or batch statistics in eval mode"
        )
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
    order = torch.randperm(len(images), generator=seeded_generator(1)).to(images.device)
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
    images = context.eval_batch(count=image_count(context, 64)).images
    outputs = context.copy_model()(images).float()
    last, outputs = last_operation(outputs), outputs.detach()
    evidence = f"outputs from {float(outputs.min()):.3g} to {float(outputs.max()):.3g}"
    evidence += f", last operation {last}" if last else ""
    if coordinates:
        return _check_coordinates(evidence, last, outputs)
    squashed, positive = _display_name(last, SQUASHED | BOUNDED), _display_name(last, POSITIVE)
    if squashed == "softmax" or _sums_to_one(outputs):
        cause = "the network ends in softmax, but cross-entropy expects logits"
        return failed(evidence, cause, "remove the softmax from the network", "model")
    if squashed:
        cause = f"the network ends in {squashed}, which bounds the outputs, but the loss expects logits"
        return failed(evidence, cause, f"remove the {squashed} from the network", "model")
    clamped = _display_name(last, CLAMPED)
    non_negative = bool(outputs.min() >= 0) and outputs.numel() >= SIGN_EVIDENCE
    if positive in ("ReLU", "threshold") or (clamped and non_negative):
        cause = "the network ends in ReLU: negative logits are cut off and get no gradient"
        return failed(evidence, cause, "remove the last ReLU from the network", "model")
    if clamped:
        cause = "the network ends in a clamp: outputs at its bounds get no gradient"
        return warned(evidence, cause, "remove the clamp from the network", "model")
    if positive:
        cause = f"the network ends in {positive}: logits can hardly be negative"
        return warned(evidence, cause, f"remove the {positive} from the network", "model")
    if _display_name(last, LOGARITHMIC) or _sums_to_one(outputs.exp()):
        cause = "the network ends in log-softmax, which cross-entropy applies as well; it has no effect"
        return warned(evidence, cause, "remove the log-softmax from the network", "model")
    return passed(evidence)


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


def _sums_to_one(outputs: Tensor) -> bool:
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        return False
    return bool((outputs >= 0).all() and ((outputs.sum(1) - 1).abs() < 1e-3).all())


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
