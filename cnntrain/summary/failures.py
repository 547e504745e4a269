"""Why a network does not fit its input: the layer at fault, in the config's own words, and the arithmetic."""

from dataclasses import dataclass
from math import prod

from torch import nn

from cnntrain.summary.conv_arithmetic import Shape, describe_module, module_geometry
from cnntrain.summary.record import Call
from cnntrain.summary.trace import Trace


@dataclass(frozen=True)
class Failure:
    """A forward pass that ended in an error.

    layer: the innermost module that was running, by its name in the model ('' for the model itself).
    what: the layer, its input and what is wrong, in one line. `too_small`: a window is larger than the map
    it gets, so that larger images are a remedy. `advice`: what else to change. positions: a dense layer's input has one
    value per row or column instead of per channel, so that images of another size fit only by accident.
    """

    layer: str
    what: str
    advice: str
    too_small: bool = False
    positions: bool = False


def explain(trace: Trace, error: BaseException) -> Failure:
    """The failure that `error` was, raised while `trace` was recorded."""
    if not trace.stack:
        return Failure("", first_line(error), "")
    call = trace.stack[-1]
    shape = call.input_shapes[0] if call.input_shapes else ()
    reason, advice, too_small = _reason(call.module, shape, error)
    if positions := _gets_positions(trace, call.module, shape):
        advice = "average only over rows and columns, x.mean((2, 3)), or use flatten"
        reason += ": one value per position, because the channels were averaged"
    if not reason:
        reason = first_line(error)
        if trace.failing is not None:
            name, shapes = trace.failing
            reason = f"{name} of {' and '.join(map(times, shapes))}: {reason}"
        too_small = too_small or says_too_small(error)
        advice = "" if too_small else "make the shapes that meet there agree"
    where = name_of(call)
    given = " and ".join(times(s) for s in call.input_shapes)
    return Failure(call.name, f"{where}: {reason} (its input is {given})", advice, too_small, positions)


def _gets_positions(trace: Trace, module: nn.Module, shape: Shape) -> bool:
    """Return True if a dense layer's inputs are rows, columns or pixels of the last map, without channels."""
    maps = [op.output_shape for op in trace.operations if len(op.output_shape) > 3]
    if not isinstance(module, nn.Linear) or len(shape) != 2 or not maps or shape[1] == module.in_features:
        return False
    channels, sides = maps[-1][1], maps[-1][2:]
    return shape[1] in (*sides, prod(sides)) and shape[1] not in (channels, channels * prod(sides))


def name_of(call: Call) -> str:
    """What a message calls a layer: the config's words if it was built from a list, else its name."""
    words = getattr(call.module, "in_config", None)
    if isinstance(words, str):
        return words
    path = f"model.{call.name}" if call.name else "model"
    return f"{path} {describe_module(call.module)}"


def times(shape: Shape) -> str:
    """A batch's shape without its batch: 64x27x27."""
    return "x".join(map(str, shape[1:] if len(shape) > 1 else shape))


def says_too_small(error: BaseException) -> bool:
    """torch's own words for a map that is smaller than its window."""
    text = str(error)
    return any(
        words in text
        for words in (
            "Output size is too small",
            "can't be greater than actual input size",
            "kernel_size can't be greater",
            "Padding size should be less than",
            "non-zero size",
            "Input and output sizes should be greater than 0",
            "should be greater than 0",
        )
    )


def _reason(module: nn.Module, shape: Shape, error: BaseException) -> tuple[str, str, bool]:
    """(what is wrong, what to change, is the map too small) for layers of torch.nn; else ('', '', False)."""
    geometry = module_geometry(module)
    dimensions = len(geometry.kernel) if geometry else 0
    if geometry and len(shape) == dimensions + 2 and (arithmetic := geometry.size_error(shape[2:])):
        return arithmetic, "use a smaller kernel or more padding", True
    if geometry and shape and len(shape) != dimensions + 2 and not says_too_small(error):
        kind = f"a map with {dimensions} dimensions" if dimensions > 1 else "a signal with one dimension"
        return (
            f"needs {kind} (N, C, ...), but gets {len(shape)} numbers in its shape",
            "move it before the flatten",
            False,
        )
    channels = getattr(module, "in_channels", getattr(module, "num_features", None))
    if isinstance(channels, int) and len(shape) > 1 and shape[1] != channels:
        key = "in_channels" if hasattr(module, "in_channels") else "num_features"
        return f"needs {channels} channels, but gets {shape[1]}", f"give it {key}={shape[1]}", False
    if isinstance(module, nn.Linear) and shape and shape[-1] != module.in_features:
        advice = f"give it in_features={shape[-1]}"
        if len(shape) == 4:
            advice = "put a flatten or a global pool before it"
        return f"needs in_features={module.in_features}, but gets {shape[-1]}", advice, False
    if "more than 1 value per channel" in str(error):
        what = "one value per channel is too few for BatchNorm's mean and variance"
        return what, "use a larger batch_size, or norm=group", len(shape) > 2
    return "", "", says_too_small(error)


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
