"""What a lecturer would write in the margin of a network: it runs, but is it what you meant?

Each note is a WARN finding, once for all layers that it concerns.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from cnntrain.summary.conv_arithmetic import Geometry, module_geometry
from cnntrain.summary.failures import name_of
from cnntrain.summary.record import Call, Operation
from cnntrain.summary.trace import Trace
from cnntrain.types import Finding

_NORMS = (
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "cudnn_batch_norm",
)
SMALL_FIELD = "small receptive field"
_FEW_VALUES = 8  # per channel: below, a batch's mean and variance are mostly noise
_FAR_SMALLER = 0.5  # of the image's side
_MOST = 0.9  # of all activations


def design_warnings(
    trace: Trace, image_size: tuple[int, ...], batch_size: int, classification: bool = True
) -> list[Finding]:
    """The findings for one traced run of `batch_size` images."""
    notes = [
        _unread_rows(trace, image_size),
        _nothing_between(trace),
        _softmax_last(trace) if classification else None,
        _bias_before_norm(trace),
        _small_field(trace, image_size),
        _few_values(trace),
        _even_kernel(trace),
        _large_first_layer(trace),
    ]
    return [note for note in notes if note is not None]


def _note(name: str, places: Sequence[str], cause: str, remedy: str, key: str = "model") -> Finding | None:
    """One finding for all `places`, of which the first few are written out."""
    if not places:
        return None
    more = f" (and {len(places) - 3} more)" if len(places) > 3 else ""
    return Finding(name, "WARN", "; ".join(places[:3]) + more, cause, remedy, (key,))


def _name(operation: Operation) -> str:
    call = operation.call
    return name_of(call) if call.layer else f"model.{call.name} {operation.name}".replace(". ", " ")


def _windows(trace: Trace) -> Iterator[tuple[Operation, Geometry]]:
    """Operations with a window, each with its geometry as the layer states it ('same' padding and all)."""
    for operation in trace.operations:
        if operation.geometry is not None:
            own = module_geometry(operation.call.module) if operation.call.layer else None
            yield operation, own or operation.geometry


def _unread_rows(trace: Trace, image_size: tuple[int, ...]) -> Finding | None:
    places, dimensions = [], len(image_size)
    for operation, geometry in _windows(trace):
        given, made = operation.input_shapes[0][2:], operation.output_shape[2:]
        if len(geometry.kernel) != dimensions or geometry.same:
            continue
        lost = [geometry.count_unread(i, given[i], made[i]) for i in range(dimensions)]
        if any(lost):
            axis = max(range(dimensions), key=lost.__getitem__)
            places.append(
                f"{_name(operation)} on {'x'.join(map(str, given))}: {lost[axis]} of {given[axis]} rows"
            )
    return _note(
        "unread rows",
        places,
        "no window reads these rows or columns of the layer's input: (out-1)*S + D*(K-1) + 1 - P < W",
        "choose an image size, a padding or a stride that fits, or a pool with ceil",
    )


def _producer(trace: Trace, operation: Operation) -> Operation | None:
    """The operation that made the first input, if the image reaches it."""
    first = operation.inputs[0] if operation.inputs else -1
    return trace.operations[first] if first >= 0 else None


def is_depthwise(operation: Operation) -> bool:
    geometry = operation.geometry
    return geometry is not None and geometry.groups > 1 and geometry.groups == operation.input_shapes[0][1]


def _nothing_between(trace: Trace) -> Finding | None:
    """Two linear maps in a row are one; a depthwise convolution followed by a 1x1 one is meant."""
    places = []
    for operation in trace.operations:
        before = _producer(trace, operation)
        if before is None or operation.name != "convolution" or before.name != "convolution":
            continue
        if is_depthwise(operation) or is_depthwise(before) or operation.geometry is None:
            continue
        if before.geometry is not None and before.geometry.transposed:
            continue
        places.append(f"{_name(before)} and {_name(operation)}")
    return _note(
        "nothing between",
        places,
        "two convolutions with no activation in between are one linear map",
        "put an activation (and a norm) between them",
    )


def _softmax_last(trace: Trace) -> Finding | None:
    last = trace.operations[-1] if trace.operations else None
    if last is None or last.name not in ("_softmax", "_safe_softmax"):
        return None
    return _note(
        "softmax last",
        [_name(last)],
        "the cross-entropy brings its own softmax; two of them flatten the gradient, and training crawls",
        "take the softmax out: the network ends in plain scores",
    )


def _bias_before_norm(trace: Trace) -> Finding | None:
    places = []
    for operation in trace.operations:
        before = _producer(trace, operation)
        if operation.name in _NORMS and before is not None and before.name == "convolution":
            module = before.call.module
            if before.call.layer and getattr(module, "bias", None) is not None:
                places.append(_name(before))
    return _note(
        "bias before BatchNorm",
        places,
        "BatchNorm subtracts the mean, and the convolution's bias with it",
        "bias: false there; BatchNorm has a shift of its own",
    )


def last_local(trace: Trace) -> Operation | None:
    """The last operation whose outputs still lie on a map that no adaptive or global pool has changed."""
    for operation in reversed(trace.operations):
        if operation.axes and all(axis.kind == "along" and not axis.adapted for axis in operation.axes):
            return operation
    return None


def _small_field(trace: Trace, image_size: tuple[int, ...]) -> Finding | None:
    """Warn about a small receptive field of a network whose output is a map; global pooling combines positions."""
    last = last_local(trace)
    if last is None or last.axes is None or last.index + 1 < len(trace.operations):
        return None
    if any(axis.whole for axis in last.axes):
        return None
    seen = [axis.span.size for axis in last.axes]
    if all(field >= _FAR_SMALLER * side for field, side in zip(seen, image_size, strict=True)):
        return None
    field, shown = "x".join(map(str, seen)), "x".join(map(str, image_size))
    return _note(
        SMALL_FIELD,
        [f"{_name(last)}: each position sees {field} of {shown} px"],
        "the network judges by details; nothing in it sees how they are arranged",
        "more layers, strides, pools or dilation, or smaller images",
    )


def _few_values(trace: Trace) -> Finding | None:
    places = []
    for operation in trace.operations:
        shape = operation.input_shapes[0] if operation.input_shapes else ()
        if operation.name not in _NORMS or len(shape) < 4 or isinstance(operation.call.module, nn.GroupNorm):
            continue
        values = shape[0]
        for side in shape[2:]:
            values *= side
        if max(shape[2:]) == 1 and values < _FEW_VALUES:
            places.append(f"{_name(operation)}: a 1x1 map, batches of {shape[0]}")
    return _note(
        "BatchNorm on 1x1 maps",
        places,
        "with so few values per channel a batch's mean and variance are mostly noise",
        "a larger batch_size, larger images, a stem without stride, or norm=group",
        "batch_size",
    )


def _even_kernel(trace: Trace) -> Finding | None:
    places = []
    for call in _layers(trace):
        geometry = module_geometry(call.module)
        if (
            geometry
            and geometry.same
            and any(geometry.extent(i) % 2 == 0 for i in range(len(geometry.kernel)))
        ):
            places.append(name_of(call))
    return _note(
        "even kernel with 'same'",
        places,
        "the padding is one pixel larger on one side: the map is shifted by half a pixel",
        "an odd kernel",
    )


def _layers(trace: Trace) -> Iterator[Call]:
    return (call for call in trace.calls if call.layer and call.run == 1)


def _large_first_layer(trace: Trace) -> Finding | None:
    made = [(op, _numbers(op)) for op in trace.operations if not op.in_place and len(op.output_shape) > 1]
    windows = [op for op, _ in made if op.geometry is not None]
    total = sum(numbers for _, numbers in made)
    if len(windows) < 2 or windows[0].index != 0 or total == 0:
        return None
    share = made[0][1] / total
    if share < _MOST:
        return None
    return _note(
        "large first layer",
        [f"{_name(windows[0])}: {share:.0%} of all activations"],
        "the first layer takes nearly all memory",
        "fewer channels there, or a stride",
    )


def _numbers(operation: Operation) -> int:
    numbers = 1
    for side in operation.output_shape:
        numbers *= side
    return numbers
