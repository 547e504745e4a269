"""Check that a network fits its input and its task, on the meta device, before data is read."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnntrain.errors import CnntrainError
from cnntrain.summary.design_warnings import design_warnings
from cnntrain.summary.failures import Failure, explain_failure, first_line
from cnntrain.summary.trace import ModelOrBuilder, TraceError, as_meta, meta_images, needs_data, trace_run
from cnntrain.types import Finding, format_shape

_SIZES = (8, 16, 28, 32, 48, 64, 96, 128, 160, 192, 224, 227, 256, 299, 320, 384, 448, 512)
_SEARCH_S = 3.0
OutputShape = Sequence[int | None]


def preflight(
    model_or_builder: ModelOrBuilder,
    in_channels: int,
    image_size: Sequence[int],
    expected_output_shape: OutputShape | None = None,
    batch_size: int = 2,
    classification: bool = True,
    name: str | None = None,
    size_key: str | None = "data.size",
) -> list[Finding]:
    """Run a network on the meta device, in training mode and in evaluation mode; the network is not changed.

    Args:
        model_or_builder: a network on any device, or a function that builds one (called on the meta device).
        image_size: (H, W) in pixels; one or three numbers for signals and volumes.
        expected_output_shape: without the batch: (10,) for ten classes, (21, None, None) for maps of any size.
        batch_size: of training; BatchNorm needs several images after a 1x1 map.
        classification: the loss is cross-entropy.
        name: of the network in messages; by default the name of its class.
        size_key: config key of the image size, for the remedy; None if the size is fixed.

    Returns:
        One FAIL finding called 'preflight' if the network does not fit; one SKIP finding if it needs data; otherwise
        WARN findings about its design. `evidence` names the layer as the config does, `remedy` says what to change.
    """
    size = tuple(int(n) for n in image_size)
    try:
        model = as_meta(model_or_builder)
    except CnntrainError as error:
        return [Finding("preflight", "FAIL", str(error), "the network cannot be built", "", ("model",))]
    name = name or {"Sequential": "this network"}.get(type(model).__name__, type(model).__name__.lower())
    requirements = _Requirements(in_channels, size, batch_size, expected_output_shape, size_key)
    try:
        _run_training_pass(model, requirements)
        trace, output = trace_run(model.eval(), meta_images(in_channels, size, batch_size))
    except TraceError as raised:
        cause = raised.__cause__ or raised
        if needs_data(cause):
            return [_skipped(cause)]
        return [_failure_finding(model, name, explain_failure(raised), requirements)]
    if finding := _check_output(output, expected_output_shape):
        return [finding]
    return design_warnings(trace, size, batch_size, classification)


@dataclass(frozen=True)
class _Requirements:
    """What the network has to accept and to return."""

    in_channels: int
    image_size: tuple[int, ...]
    batch_size: int
    output_shape: OutputShape | None
    size_key: str | None


def output_size(model: nn.Module, in_channels: int, image_size: Sequence[int]) -> tuple[int, int] | None:
    """Return (height, width) of a meta network's output map; None if it fails or its output is not a map."""
    try:
        with torch.no_grad():
            output = model(meta_images(in_channels, tuple(image_size), 1))
    except Exception:
        return None
    return (output.shape[2], output.shape[3]) if isinstance(output, Tensor) and output.dim() == 4 else None


def _run_training_pass(model: nn.Module, needed: _Requirements) -> None:
    """Run the network in training mode: BatchNorm needs more than one value, auxiliary heads need large images."""
    model.train()
    batch = meta_images(needed.in_channels, needed.image_size, needed.batch_size)
    try:
        with torch.no_grad():
            model(batch)
    except Exception:
        trace_run(model, batch)  # again, to find the layer


def _skipped(error: BaseException) -> Finding:
    return Finding(
        "preflight",
        "SKIP",
        f"the network cannot run on the meta device (shapes without data): {first_line(error)}",
        "it reads values (.item(), numpy, a tensor created on a fixed device)",
        "no action is needed if training works; otherwise create tensors on the input's device",
        ("model",),
    )


def _check_output(output: Any, expected: OutputShape | None) -> Finding | None:
    """Return a FAIL finding unless the output is one tensor (N, *expected)."""
    if expected is None:
        return None
    if not isinstance(output, Tensor):
        returned = f"returns a {type(output).__name__}"
        returned += f" with {', '.join(map(str, output))}" if isinstance(output, dict) else ""
        remedy = "return only the main output"
    else:
        actual = output.shape[1:]
        if len(actual) == len(expected) and all(n in (None, m) for n, m in zip(expected, actual, strict=True)):
            return None
        returned = f"returns (N, {', '.join(map(str, actual))})"
        remedy = f"give its last layer {expected[0]} outputs (num_outputs)"
        if len(actual) > len(expected):
            remedy = f"end it with global pooling or flatten, and {expected[0]} outputs"
        elif len(actual) < len(expected):
            remedy = "choose a network that returns a map (model=unet_small, model=fcn)"
    names = ("C", "height", "width")
    shape = ", ".join(str(n) if n else name for n, name in zip(expected, names, strict=False))
    evidence = f"the network {returned}; the task needs one tensor (N, {shape})"
    cause = "the network's output does not fit the task"
    return Finding("preflight", "FAIL", evidence, cause, remedy, ("model", "task"))


def _failure_finding(model: nn.Module, name: str, failure: Failure, needed: _Requirements) -> Finding:
    plural = "s" if needed.in_channels > 1 else ""
    cause = f"images are {format_shape(needed.image_size)} px, {needed.in_channels} channel{plural}"
    remedies, keys = [failure.remedy] if failure.remedy else [], ("model",)
    smallest = None if failure.positions else smallest_size(model, needed)
    if smallest is not None and needed.image_size != (smallest[0],) * len(needed.image_size):
        side, accepts_larger = smallest
        keys = (*([needed.size_key] if needed.size_key else []), "model")
        cause += f"; {name} needs {'at least' if accepts_larger else 'exactly'} {side} px"
        resize = [f"set {needed.size_key}={side}"] if needed.size_key else []
        remedies = [*resize, "choose a smaller network", *remedies]
    remedy = ", or ".join(filter(None, [", ".join(remedies[:-1]), *remedies[-1:]]))
    return Finding("preflight", "FAIL", f"{failure.message}; {cause}", cause, remedy, keys)


def smallest_size(model: nn.Module, needed: _Requirements) -> tuple[int, bool] | None:
    """Return the smallest square image size that a meta network accepts, and whether it accepts larger images too.

    None if there is none, or if a size fits only by coincidence: the output does not have the expected shape, or one
    side of the image must be exact and the other does not matter. Uses bisection between common sizes, in the current
    mode of the network; gives up after a few seconds.
    """
    deadline = time.monotonic() + _SEARCH_S
    dimensions = len(needed.image_size)
    lazy = any(nn.parameter.is_lazy(p) for p in model.parameters())  # a trial would fix their shapes

    def fits(side: int, *others: int) -> bool:
        size = (side, *(others or (side,) * (dimensions - 1)))
        trial = copy.deepcopy(model) if lazy else model
        try:
            with torch.no_grad():
                output = trial(meta_images(needed.in_channels, size, needed.batch_size))
        except Exception:
            return False
        whole_batch = not isinstance(output, Tensor) or output.shape[:1] == (needed.batch_size,)
        return whole_batch and _check_output(output, needed.output_shape) is None

    low, high = 0, 0
    for side in _SIZES:
        if time.monotonic() > deadline:
            return None
        if fits(side):
            high = side
            break
        low = side
    while high - low > 1 and time.monotonic() < deadline:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    if high - low != 1:
        return None
    accepts_larger = fits(2 * high)
    if not accepts_larger and dimensions == 2 and (fits(high, 2 * high) or fits(2 * high, high)):
        return None
    return high, accepts_larger
