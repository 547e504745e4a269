"""Before any data is read: does the network fit its input and its task, what would a lecturer remark?"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnntrain.errors import CnntrainError
from cnntrain.summary.design_warnings import design_warnings
from cnntrain.summary.failures import Failure, explain, first_line
from cnntrain.summary.meta import Buildable, as_meta, images, needs_numbers
from cnntrain.summary.run import TraceError, trace_run
from cnntrain.types import Finding

_SIZES = (8, 16, 28, 32, 48, 64, 96, 128, 160, 192, 224, 227, 256, 299, 320, 384, 448, 512)
_SEARCH_S = 3.0


def preflight(
    model_or_builder: Buildable,
    in_channels: int,
    image_size: Sequence[int],
    expected_output_shape: Sequence[int | None] | None = None,
    batch_size: int = 2,
    classification: bool = True,
    name: str | None = None,
) -> list[Finding]:
    """Run a network on shapes alone, as training and as validation would; the given network is left as it is.

    Args:
        model_or_builder: a network on any device, or a function that makes one (it is called on the meta
        device).
        image_size: (H, W) in pixels; one or three numbers for signals and volumes.
        expected_output_shape: of one image, without the batch: (10,) for ten classes, (21, None, None) for maps
            of any size.
        batch_size: of training; BatchNorm after a 1x1 map needs more than a few images.
        classification: the outputs go to a cross-entropy, which brings its own softmax.
        name: what messages call the network; by default the name of its class.

    Returns:
        One FAIL finding called 'preflight' where the network does not fit, else the WARN findings (none is
        good news), or one SKIP finding where the network needs numbers and not only shapes. `evidence` names
        the layer as the config does, `remedy` says what to change.
    """
    size = tuple(int(n) for n in image_size)
    try:
        model = as_meta(model_or_builder)
    except CnntrainError as error:
        return [Finding("preflight", "FAIL", str(error), "the network can't be built", "", ("model",))]
    name = name or {"Sequential": "this network"}.get(type(model).__name__, type(model).__name__.lower())
    try:
        _train_once(model, in_channels, size, batch_size)
        trace, output = trace_run(model.eval(), images(in_channels, size, batch_size))
    except TraceError as raised:
        cause = raised.__cause__ or raised
        if needs_numbers(cause):
            return [_skipped(cause)]
        failure = explain(raised.trace, cause)
        return [_misfit(model, name, failure, in_channels, size, batch_size, expected_output_shape)]
    if expected_output_shape is not None and (wrong := _wrong_output(output, tuple(expected_output_shape))):
        return [wrong]
    return design_warnings(trace, size, batch_size, classification)


def output_size(model: nn.Module, in_channels: int, image_size: Sequence[int]) -> tuple[int, int] | None:
    """Return (height, width) of a meta network's output map; None if it fails or its output is not a map."""
    try:
        with torch.no_grad():
            output = model(images(in_channels, tuple(image_size), 1))
    except Exception:
        return None
    if not isinstance(output, Tensor) or output.dim() != 4:
        return None
    return int(output.shape[2]), int(output.shape[3])


def _train_once(model: nn.Module, in_channels: int, size: tuple[int, ...], batch_size: int) -> None:
    """A forward pass as in training: BatchNorm needs more than one value, auxiliary heads need large images.

    Raises:
        TraceError: the network raised; it was run once more, watched, to learn where.
    """
    model.train()
    batch = images(in_channels, size, batch_size)
    try:
        with torch.no_grad():
            model(batch)
    except Exception:
        trace_run(model, batch)


def _skipped(error: BaseException) -> Finding:
    return Finding(
        "preflight",
        "SKIP",
        f"the network could not be run on shapes alone: {first_line(error)}",
        "it looks at values (.item(), numpy, a tensor made on a fixed device)",
        "nothing, if it trains; else build tensors on the device of the input",
        ("model",),
    )


def _wrong_output(output: Any, expected: tuple[int | None, ...]) -> Finding | None:
    shape = ", ".join(
        str(n) if n else name for n, name in zip(expected, ("C", "height", "width"), strict=False)
    )
    wanted = f"the task needs one tensor (N, {shape})"
    if not isinstance(output, Tensor):
        kind = f"a {type(output).__name__}"
        kind += f" with {', '.join(map(str, output))}" if isinstance(output, dict) else ""
        evidence, remedy = f"the network answers with {kind}; {wanted}", "return the main output alone"
    elif output.dim() != len(expected) + 1 or any(
        n is not None and n != given for n, given in zip(expected, output.shape[1:], strict=True)
    ):
        shape = ", ".join(map(str, output.shape[1:]))
        evidence = f"the network's output is (N, {shape}); {wanted}"
        if output.dim() > len(expected) + 1:
            remedy = f"end it with global pooling or flatten, and {expected[0]} outputs"
        elif output.dim() < len(expected) + 1:
            remedy = "choose a network that answers with a map (model=unet_small, model=fcn)"
        else:
            remedy = f"give its last layer {expected[0]} outputs (num_outputs)"
    else:
        return None
    return Finding("preflight", "FAIL", evidence, "network and task disagree", remedy, ("model", "task"))


def _misfit(
    model: nn.Module,
    name: str,
    failure: Failure,
    in_channels: int,
    size: tuple[int, ...],
    batch_size: int,
    expected: Sequence[int | None] | None,
) -> Finding:
    shown = "x".join(map(str, size))
    needed = smallest_size(model, in_channels, len(size), batch_size, expected)
    if failure.positions:
        needed = None
    cause = f"images are {shown} px, {in_channels} channel{'s' if in_channels > 1 else ''}"
    remedies, keys = [failure.advice] if failure.advice else [], ("model",)
    if needed is not None and size != (needed[0],) * len(size):
        smallest, more = needed
        keys = ("data.size", "model")
        cause += f"; {name} needs {'at least' if more else 'exactly'} {smallest} px"
        remedies = [f"set data.size={smallest}", "choose a smaller network", *remedies]
        remedies += ["take out a pool or a stride"] if failure.too_small else []
    remedy = (
        ", or ".join([", ".join(remedies[:-1]), remedies[-1]]) if len(remedies) > 1 else "".join(remedies)
    )
    return Finding("preflight", "FAIL", f"{failure.what}; {cause}", cause, remedy, keys)


def smallest_size(
    model: nn.Module,
    in_channels: int,
    dimensions: int,
    batch_size: int,
    expected: Sequence[int | None] | None = None,
) -> tuple[int, bool] | None:
    """Return the smallest square image size that a meta network accepts, and whether it accepts larger images too.

    None if there is none, or if a size fits only by accident: the output does not have the `expected` shape, or one
    side of the image must be exact and the other does not matter.

    By bisection between common sizes, in the mode that the network is in; given up after a few seconds.
    """
    deadline = time.monotonic() + _SEARCH_S

    def fits(side: int, *others: int) -> bool:
        size = (side, *(others or (side,) * (dimensions - 1)))
        try:
            with torch.no_grad():
                output = model(images(in_channels, size, batch_size))
        except Exception:
            return False
        whole = not isinstance(output, Tensor) or output.shape[:1] == (batch_size,)
        return whole and (expected is None or _wrong_output(output, tuple(expected)) is None)

    low, high = 0, 0
    for side in _SIZES:
        if time.monotonic() > deadline:
            return None
        if fits(side):
            high = side
            break
        low = side
    if not high:
        return None
    while high - low > 1 and time.monotonic() < deadline:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    if high - low > 1:
        return None
    more = fits(2 * high)
    if not more and dimensions == 2 and (fits(high, 2 * high) or fits(2 * high, high)):
        return None
    return high, more
