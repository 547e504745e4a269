"""Warnings about networks that run, but probably not as intended; one WARN finding per kind of problem."""

from collections.abc import Iterator, Sequence
from math import prod

from torch import nn

from cnntrain.summary.conv_arithmetic import Geometry, module_geometry
from cnntrain.summary.failures import layer_name
from cnntrain.summary.trace import Operation, Trace
from cnntrain.types import Finding

SMALL_FIELD = "small receptive field"
_NORMS = (
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "cudnn_batch_norm",
)
_MIN_VALUES = 8  # per channel; with fewer, a batch's mean and variance are mostly noise
_MIN_FIELD_SHARE = 0.5  # of the image's side
_MAX_FIRST_SHARE = 0.9  # of all activations


def design_warnings(
    trace: Trace, image_size: tuple[int, ...], batch_size: int, classification: bool = True
) -> list[Finding]:
    """Return the findings for a traced run with `batch_size` images."""
    findings = [
        _unread_rows(trace, image_size),
        _no_activation_between(trace),
        _softmax_at_end(trace) if classification else None,
        _bias_before_norm(trace),
        _small_field(trace, image_size),
        _batch_norm_on_1x1(trace),
        _even_kernel_same(trace),
        _large_first_layer(trace),
    ]
    return [finding for finding in findings if finding is not None]


def _warning(name: str, layers: Sequence[str], cause: str, remedy: str, key: str = "model") -> Finding | None:
    """Return one finding for all `layers`, of which the first three are listed; None if there are none."""
    if not layers:
        return None
    more = f" (and {len(layers) - 3} more)" if len(layers) > 3 else ""
    return Finding(name, "WARN", "; ".join(layers[:3]) + more, cause, remedy, (key,))


def _name(operation: Operation) -> str:
    call = operation.call
    return layer_name(call) if call.layer else f"model.{call.name} {operation.name}".replace(". ", " ")


def _windows(trace: Trace) -> Iterator[tuple[Operation, Geometry]]:
    """Yield convolutions and pools with the geometry of their module, which includes 'same' padding."""
    for operation in trace.operations:
        if operation.geometry is not None:
            of_module = module_geometry(operation.call.module) if operation.call.layer else None
            yield operation, of_module or operation.geometry


def _unread_rows(trace: Trace, image_size: tuple[int, ...]) -> Finding | None:
    layers, dimensions = [], len(image_size)
    for operation, geometry in _windows(trace):
        size, out = operation.input_shapes[0][2:], operation.output_shape[2:]
        if len(geometry.kernel) != dimensions or geometry.same:
            continue
        unread = [geometry.count_unread(i, size[i], out[i]) for i in range(dimensions)]
        if any(unread):
            axis = max(range(dimensions), key=unread.__getitem__)
            shown = "x".join(map(str, size))
            layers.append(f"{_name(operation)} on {shown}: {unread[axis]} of {size[axis]} rows")
    return _warning(
        "unread rows",
        layers,
        "no window reads these rows or columns of the layer's input: (out-1)*S + D*(K-1) + 1 - P < W",
        "choose an image size, a padding or a stride that fits, or a pool with ceil",
    )


def _no_activation_between(trace: Trace) -> Finding | None:
    """Two consecutive convolutions are one linear map; depthwise separable convolutions are intended."""
    layers = []
    for operation in trace.operations:
        before = trace.first_producer(operation)
        if before is None or operation.name != "convolution" or before.name != "convolution":
            continue
        if operation.is_depthwise or before.is_depthwise or (before.geometry and before.geometry.transposed):
            continue
        layers.append(f"{_name(before)} and {_name(operation)}")
    return _warning(
        "no activation between convolutions",
        layers,
        "two convolutions without an activation between them are one linear map",
        "put an activation (and a norm) between them",
    )


def _softmax_at_end(trace: Trace) -> Finding | None:
    last = trace.operations[-1] if trace.operations else None
    if last is None or last.name not in ("_softmax", "_safe_softmax"):
        return None
    return _warning(
        "softmax before cross-entropy",
        [_name(last)],
        "the network ends in softmax, but cross-entropy expects logits: gradients become small and training slow",
        "remove the softmax",
    )


def _bias_before_norm(trace: Trace) -> Finding | None:
    layers = []
    for operation in trace.operations:
        before = trace.first_producer(operation)
        if operation.name not in _NORMS or before is None or before.name != "convolution":
            continue
        if before.call.layer and getattr(before.call.module, "bias", None) is not None:
            layers.append(_name(before))
    return _warning(
        "bias before BatchNorm",
        layers,
        "BatchNorm subtracts the mean, and with it the bias of the convolution",
        "set bias: false there; BatchNorm has its own shift",
    )


def _small_field(trace: Trace, image_size: tuple[int, ...]) -> Finding | None:
    """Warn about a small receptive field of a network whose output is a map; global pooling combines positions."""
    last = trace.last_local()
    if last is None or last.axes is None or last.index + 1 < len(trace.operations):
        return None
    if any(axis.whole for axis in last.axes):
        return None
    field = [axis.interval.size for axis in last.axes]
    if all(pixels >= _MIN_FIELD_SHARE * side for pixels, side in zip(field, image_size, strict=True)):
        return None
    pixels, image = "x".join(map(str, field)), "x".join(map(str, image_size))
    return _warning(
        SMALL_FIELD,
        [f"{_name(last)}: each position sees {pixels} of {image} px"],
        "each output depends on a small part of the image; the network cannot use how parts are arranged",
        "add layers, strides, pools or dilation, or use smaller images",
    )


def _batch_norm_on_1x1(trace: Trace) -> Finding | None:
    layers = []
    for operation in trace.operations:
        shape = operation.input_shapes[0] if operation.input_shapes else ()
        if operation.name not in _NORMS or len(shape) < 4 or isinstance(operation.call.module, nn.GroupNorm):
            continue
        if max(shape[2:]) == 1 and shape[0] < _MIN_VALUES:
            layers.append(f"{_name(operation)}: a 1x1 map, batches of {shape[0]}")
    return _warning(
        "BatchNorm on 1x1 maps",
        layers,
        "with so few values per channel, a batch's mean and variance are mostly noise",
        "use a larger batch_size, larger images, a stem without stride, or norm=group",
        "batch_size",
    )


def _even_kernel_same(trace: Trace) -> Finding | None:
    layers = []
    for call in trace.calls:
        geometry = module_geometry(call.module) if call.layer and call.run == 1 else None
        if geometry and geometry.same and any(geometry.extent(i) % 2 == 0 for i in range(len(geometry.kernel))):
            layers.append(layer_name(call))
    return _warning(
        "even kernel with 'same'",
        layers,
        "the padding is one pixel larger on one side: the map is shifted by half a pixel",
        "use an odd kernel",
    )


def _large_first_layer(trace: Trace) -> Finding | None:
    computed = [op for op in trace.operations if not op.in_place and len(op.output_shape) > 1]
    windows = [op for op in computed if op.geometry is not None]
    total = sum(prod(op.output_shape) for op in computed)
    if len(windows) < 2 or windows[0].index != 0 or total == 0:
        return None
    share = prod(computed[0].output_shape) / total
    if share < _MAX_FIRST_SHARE:
        return None
    return _warning(
        "large first layer",
        [f"{_name(windows[0])}: {share:.0%} of all activations"],
        "the first layer needs nearly all of the memory",
        "use fewer channels there, or a stride",
    )
