"""Explain why a forward pass failed: the layer, its input, and the arithmetic."""

from dataclasses import dataclass
from math import prod

from torch import nn

from cnntrain.summary.conv_arithmetic import Shape, describe_module, module_geometry
from cnntrain.summary.trace import ModuleCall, Trace, TraceError
from cnntrain.types import format_shape

_TOO_SMALL = (  # parts of torch's messages
    "Output size is too small",
    "can't be greater than actual input size",
    "Padding size should be less than",
    "non-zero size",
    "should be greater than 0",
)
_TOO_SMALL_REMEDY = "use a smaller kernel or more padding, or remove a pool or a stride before it"


@dataclass(frozen=True)
class Failure:
    """Explanation of a forward pass that raised an error.

    Attributes:
        message: the layer, its input and the problem, in one line.
        remedy: what to change, apart from the image size.
        positions: the inputs of a dense layer are positions instead of channels, so that another image size would fit
            only by coincidence.
    """

    message: str
    remedy: str
    positions: bool = False


def explain_failure(failed: TraceError) -> Failure:
    """Explain why a network raised."""
    trace, error = failed.trace, failed.__cause__ or failed
    if not trace.stack:
        return Failure(first_line(error), "")
    call = trace.stack[-1]
    shape = call.input_shapes[0] if call.input_shapes else ()
    reason, remedy = explain_error(call.module, shape, error)
    if positions := _gets_positions(trace, call.module, shape):
        remedy = "average only over rows and columns, x.mean((2, 3)), or use flatten"
        reason += ": one value per position, because the channels were averaged"
    if not reason:
        reason = first_line(error)
        if trace.failed_operation is not None:
            name, shapes = trace.failed_operation
            reason = f"{name} of {' and '.join(map(_without_batch, shapes))}: {reason}"
    inputs = " and ".join(map(_without_batch, call.input_shapes))
    message = f"{layer_name(call)}: {reason} (its input is {inputs})"
    return Failure(message, remedy or "make these shapes agree", positions)


def _gets_positions(trace: Trace, module: nn.Module, shape: Shape) -> bool:
    """Return True if a dense layer's inputs are rows, columns or pixels of the last map, without channels."""
    maps = [op.output_shape for op in trace.operations if len(op.output_shape) > 3]
    if not isinstance(module, nn.Linear) or len(shape) != 2 or not maps or shape[1] == module.in_features:
        return False
    channels, sides = maps[-1][1], maps[-1][2:]
    return shape[1] in (*sides, prod(sides)) and shape[1] not in (channels, channels * prod(sides))


def layer_name(call: ModuleCall) -> str:
    """Return a layer's name for messages: as in the list of layers in the config, or the module's name."""
    in_config = getattr(call.module, "in_config", None)
    if isinstance(in_config, str):
        return in_config
    path = f"model.{call.name}" if call.name else "model"
    return f"{path} {describe_module(call.module)}"


def _without_batch(shape: Shape) -> str:
    return format_shape(shape[1:] if len(shape) > 1 else shape)


def explain_error(module: nn.Module, shape: Shape, error: BaseException) -> tuple[str, str]:
    """Return (problem, remedy) for an error that a layer raised for an input of `shape`; '' for what is unknown."""
    geometry = module_geometry(module)
    dimensions = len(geometry.kernel) if geometry else 0
    too_small = any(text in str(error) for text in _TOO_SMALL)
    if geometry and len(shape) == dimensions + 2 and (arithmetic := geometry.size_error(shape[2:])):
        return f"{arithmetic}: the kernel is larger than the padded map", _TOO_SMALL_REMEDY
    if geometry and shape and len(shape) != dimensions + 2 and not too_small:
        problem = f"needs an input with {dimensions + 2} dimensions (N, C, ...), but gets {len(shape)}"
        return problem, "move it before the flatten"
    channels = getattr(module, "in_channels", getattr(module, "num_features", None))
    if isinstance(channels, int) and len(shape) > 1 and shape[1] != channels:
        key = "in_channels" if hasattr(module, "in_channels") else "num_features"
        return f"needs {channels} channels, but gets {shape[1]}", f"set {key}={shape[1]}"
    if isinstance(module, nn.Linear) and shape and shape[-1] != module.in_features:
        flat = "put a flatten or a global pool before it"
        remedy = flat if len(shape) == 4 else f"set in_features={shape[-1]}"
        return f"needs in_features={module.in_features}, but gets {shape[-1]}", remedy
    if "more than 1 value per channel" in str(error):
        problem = "one value per channel is too few for the mean and variance of BatchNorm"
        return problem, "use a larger batch_size or norm=group, or remove a pool or a stride before it"
    return "", _TOO_SMALL_REMEDY if too_small else ""


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
