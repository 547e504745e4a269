"""Warnings about networks that run, but probably not as intended; one WARN finding per kind of problem."""

from collections.abc import Callable, Iterator
from math import prod

from torch import nn

from cnntrain.summary.conv_arithmetic import module_geometry
from cnntrain.summary.failures import layer_name
from cnntrain.summary.op_rules import BATCH_NORMS
from cnntrain.summary.trace import Operation, Trace
from cnntrain.types import Finding, format_shape

SMALL_FIELD = "small receptive field"
_SOFTMAX = "softmax before cross-entropy"
_MIN_VALUES = 8  # per channel; with fewer, a batch's mean and variance are mostly noise
_MIN_FIELD_SHARE = 0.5  # of the image's side
_MAX_FIRST_SHARE = 0.9  # of all activations


def design_warnings(
    trace: Trace, image_size: tuple[int, ...], batch_size: int, classification: bool = True
) -> list[Finding]:
    """Return the findings for a traced run with `batch_size` images; each lists at most three layers."""
    findings = []
    for name, (check, cause, remedy) in _CHECKS.items():
        layers = list(check(trace, image_size))
        if not layers or (name == _SOFTMAX and not classification):
            continue
        more = f" (and {len(layers) - 3} more)" if len(layers) > 3 else ""
        key = "batch_size" if check is _batch_norm_on_1x1 else "model"
        findings.append(Finding(name, "WARN", "; ".join(layers[:3]) + more, cause, remedy, (key,)))
    return findings


def _name(operation: Operation) -> str:
    call = operation.call
    return layer_name(call) if call.layer else f"model.{call.name} {operation.name}".replace(". ", " ")


def _unread_rows(trace: Trace, image_size: tuple[int, ...]) -> Iterator[str]:
    for operation in trace.operations:
        of_module = module_geometry(operation.call.module) if operation.call.layer else None  # knows padding 'same'
        geometry = operation.geometry and (of_module or operation.geometry)
        if geometry is None or len(geometry.kernel) != len(image_size) or geometry.same:
            continue
        size, out = operation.input_shapes[0][2:], operation.output_shape[2:]
        unread = [geometry.count_unread(i, size[i], out[i]) for i in range(len(size))]
        if most := max(unread):
            yield f"{_name(operation)} on {format_shape(size)}: {most} of {size[unread.index(most)]} rows"


def _no_activation_between(trace: Trace, image_size: tuple[int, ...]) -> Iterator[str]:
    """Two consecutive convolutions are one linear map; depthwise separable convolutions are intended."""
    for operation in trace.operations:
        before = trace.first_producer(operation)
        if before is None or operation.name != "convolution" or before.name != "convolution":
            continue
        if operation.is_depthwise or before.is_depthwise or (before.geometry and before.geometry.transposed):
            continue
        yield f"{_name(before)} and {_name(operation)}"


def _softmax_at_end(trace: Trace, image_size: tuple[int, ...]) -> Iterator[str]:
    for operation in trace.operations[-1:]:
        if operation.name in ("_softmax", "_safe_softmax"):
            yield _name(operation)


def _bias_before_norm(trace: Trace, image_size: tuple[int, ...]) -> Iterator[str]:
    for operation in trace.operations:
        before = trace.first_producer(operation)
        if operation.name not in BATCH_NORMS or before is None or before.name != "convolution":
            continue
        if before.call.layer and getattr(before.call.module, "bias", None) is not None:
            yield _name(before)


def _small_field(trace: Trace, image_size: tuple[int, ...]) -> Iterator[str]:
    """Warn about a small receptive field of a network whose output is a map; global pooling combines positions."""
    last = trace.last_local()
    if last is None or last.axes is None or last.index + 1 < len(trace.operations):
        return
    field = [axis.interval.size for axis in last.axes]
    small = any(pixels < _MIN_FIELD_SHARE * side for pixels, side in zip(field, image_size, strict=True))
    if small and not any(axis.whole for axis in last.axes):
        yield f"{_name(last)}: each position sees {format_shape(field)} of {format_shape(image_size)} px"


def _batch_norm_on_1x1(trace: Trace, image_size: tuple[int, ...]) -> Iterator[str]:
    for operation in trace.operations:
        shape = operation.input_shapes[0] if operation.input_shapes else ()
        if operation.name not in BATCH_NORMS or len(shape) < 4 or isinstance(operation.call.module, nn.GroupNorm):
            continue
        if max(shape[2:]) == 1 and shape[0] < _MIN_VALUES:
            yield f"{_name(operation)}: a 1x1 map, batches of {shape[0]}"


def _even_kernel_same(trace: Trace, image_size: tuple[int, ...]) -> Iterator[str]:
    for call in trace.calls:
        geometry = module_geometry(call.module) if call.layer and call.call_number == 1 else None
        if geometry and geometry.same and any(geometry.extent(i) % 2 == 0 for i in range(len(geometry.kernel))):
            yield layer_name(call)


def _large_first_layer(trace: Trace, image_size: tuple[int, ...]) -> Iterator[str]:
    computed = [op for op in trace.operations if not op.in_place and len(op.output_shape) > 1]
    windows = [op for op in computed if op.geometry is not None]
    total = sum(prod(op.output_shape) for op in computed)
    if len(windows) < 2 or windows[0].index != 0 or total == 0:
        return
    share = prod(computed[0].output_shape) / total
    if share >= _MAX_FIRST_SHARE:
        yield f"{_name(windows[0])}: {share:.0%} of all activations"


# Name of the finding: a function that describes the layers, the cause and the remedy.
_CHECKS: dict[str, tuple[Callable[[Trace, tuple[int, ...]], Iterator[str]], str, str]] = {
    "unread rows": (
        _unread_rows,
        "no window reads these rows or columns of the layer's input: (out-1)*S + D*(K-1) + 1 - P < W",
        "choose an image size, a padding or a stride that fits, or a pool with ceil",
    ),
    "no activation between convolutions": (
        _no_activation_between,
        "two convolutions without an activation between them are one linear map",
        "put an activation (and a norm) between them",
    ),
    _SOFTMAX: (
        _softmax_at_end,
        "the network ends in softmax, but cross-entropy expects logits: gradients become small and training slow",
        "remove the softmax",
    ),
    "bias before BatchNorm": (
        _bias_before_norm,
        "BatchNorm subtracts the mean, and with it the bias of the convolution",
        "set bias: false there; BatchNorm has its own shift",
    ),
    SMALL_FIELD: (
        _small_field,
        "each output depends on a small part of the image; the network cannot use how parts are arranged",
        "add layers, strides, pools or dilation, or use smaller images",
    ),
    "BatchNorm on 1x1 maps": (
        _batch_norm_on_1x1,
        "with so few values per channel, a batch's mean and variance are mostly noise",
        "use a larger batch_size, larger images, a stem without stride, or norm=group",
    ),
    "even kernel with 'same'": (
        _even_kernel_same,
        "the padding is one pixel larger on one side: the map is shifted by half a pixel",
        "use an odd kernel",
    ),
    "large first layer": (
        _large_first_layer,
        "the first layer needs nearly all of the memory",
        "use fewer channels there, or a stride",
    ),
}
