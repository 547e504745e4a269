"""What a network is made of: one row per layer, and totals that are the sum of the rows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Literal

from torch import nn

from cnntrain.errors import UserError
from cnntrain.summary.axes import Axes
from cnntrain.summary.conv_arithmetic import Geometry, Shape, module_geometry
from cnntrain.summary.design_warnings import is_depthwise, last_local
from cnntrain.summary.failures import explain
from cnntrain.summary.meta import Buildable, as_meta, images
from cnntrain.summary.op_rules import all_tensors
from cnntrain.summary.parameters import Owner, folds
from cnntrain.summary.record import Call, Operation
from cnntrain.summary.run import TraceError, trace_run
from cnntrain.summary.trace import Trace

Convention = Literal["torch", "keras", "folded"]
"""Parameters as torch counts them; as Keras does, with running statistics; with BatchNorm folded away."""

_BYTES = 4  # of a float32
_WORDS = {"cat": "concat", "mm": "matmul", "bmm": "matmul", "addmm": "linear", "mean": "mean"}


@dataclass(frozen=True)
class Row:
    """One layer, or one operation between layers, for one image.

    output_shape: without the batch. parameters: each tensor once, where it is used first. statistics:
        running means and variances. folded: parameters that stay when BatchNorm is folded away.
    multiply_adds: without bias. elements: numbers that an operation without multiply-adds writes.
    activations_kib: memory of the output in float32; in-place and pass-through layers take none, a flatten
        counts as the lectures count it.
    receptive_field: pixels per axis (the image's side where everything is seen); local_field: leaving out
        paths through a global pool; whole: some path saw all of the image; jump: pixels from one position to
        the next; start: center of the first, in pixels. None where it could not be followed, or where no
        dimension walks along the axis.
    """

    name: str
    kind: str
    notation: str
    output_shape: Shape
    parameters: int
    statistics: int = 0
    folded: int = 0
    multiply_adds: int = 0
    elements: int = 0
    activations_kib: float = 0.0
    receptive_field: Shape | None = None
    local_field: Shape | None = None
    jump: tuple[float, ...] | None = None
    start: tuple[float, ...] | None = None
    whole: bool = False
    ran: bool = True
    trainable: int = 0  # number of trainable parameters

    def count(self, convention: Convention) -> int:
        """Parameters by a convention."""
        extra = self.statistics if convention == "keras" else 0
        return self.folded if convention == "folded" else self.parameters + extra

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class ModelSummary:
    """Summary of a network.

    Attributes:
        depth: number of convolutions and dense layers on the longest path from input to output, as in the names
            ResNet-18 and VGG-16; see `_depth`.
        uncounted, unfollowed: layers that the counts do not include.
    """

    name: str
    input_shape: Shape
    output_shape: Shape
    rows: list[Row]
    receptive_field: Shape | None
    depth: int = 0
    uncounted: list[str] = field(default_factory=list)
    unfollowed: list[str] = field(default_factory=list)

    def parameters(self, convention: Convention = "torch") -> int:
        return sum(row.count(convention) for row in self.rows)

    @property
    def trainable(self) -> int:
        """Number of parameters that are not frozen."""
        return sum(row.trainable for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        return sum(row.multiply_adds for row in self.rows)

    @property
    def activations_kib(self) -> float:
        return sum(row.activations_kib for row in self.rows)

    def row(self, name: str) -> Row:
        """The row called `name`; KeyError when there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{self.name} has no row {name!r}")

    def as_dict(self, convention: Convention = "torch") -> dict[str, object]:
        """Everything, for JSON."""
        return {
            "name": self.name,
            "input_shape": self.input_shape,
            "output_shape": self.output_shape,
            "receptive_field": self.receptive_field,
            "depth": self.depth,
            "convention": convention,
            "totals": {
                "parameters": self.parameters(convention),
                "trainable": self.trainable,
                "multiply_adds": self.multiply_adds,
                "activations_kib": self.activations_kib,
            },
            "rows": [row.as_dict() for row in self.rows],
            "uncounted": self.uncounted,
            "unfollowed": self.unfollowed,
        }


def analyze(model_or_builder: Buildable, input_shape: Sequence[int], name: str | None = None) -> ModelSummary:
    """Open a network for one image of `input_shape` (C, H, W), on shapes alone, as in validation.

    Multiply-adds leave out biases: ten 5x5 filters on 3x32x32, padded by 2, make 768,000.

    Raises:
        UserError: the network does not fit its input; names the layer.
    """
    model = as_meta(model_or_builder).eval()
    channels, *size = (int(n) for n in input_shape)
    try:
        trace, output = trace_run(model, images(channels, tuple(size)))
    except TraceError as raised:
        failure = explain(raised.trace, raised.__cause__ or raised)
        raise UserError(f"{failure.what}\n{failure.advice}".strip()) from raised
    owner = Owner(model)
    changes = folds(trace)
    rows = _unique([_row(event, owner, tuple(size), changes) for event in trace.events])
    for home, (count, trainable), statistics in owner.rest():
        kind = type(model.get_submodule(home)).__name__
        rows.append(
            Row(
                home or "model", kind, "not run", (), count, statistics, count, ran=False, trainable=trainable
            )
        )
    last = last_local(trace)
    shape = tuple(output.shape[1:]) if hasattr(output, "shape") else ()
    return ModelSummary(
        name or type(model).__name__,
        (channels, *size),
        shape or (rows[-1].output_shape if rows else ()),
        rows,
        _fields(last.axes, tuple(size))[1] if last is not None and last.axes else None,
        _depth(trace, output),
        sorted({f"{place or 'model'}: {operation}" for place, operation in trace.unknown}),
        _unfollowed(trace),
    )


def _depth(trace: Trace, output: object) -> int:
    """Count the convolutions and dense layers on the longest path from input to output.

    A projection shortcut is parallel to a longer path and is not counted. In an Inception module the longest branch is
    counted. A depthwise convolution directly followed by a 1x1 convolution counts as one layer (Chollet 2017: 36
    convolutions in Xception). With a norm or an activation between them they count as two (Howard et al. 2017: 28
    layers in MobileNet).
    """
    depths: list[int] = []
    for operation in trace.operations:
        before = max((depths[i] for i in operation.inputs if i >= 0), default=0)
        depths.append(before + (_is_weighted(operation) and not _ends_separable(trace, operation)))
    ends = (trace.known(tensor).producer for tensor in all_tensors(output))
    return max((depths[i] for i in ends if i is not None and i >= 0), default=0)


def _is_weighted(operation: Operation) -> bool:
    """Return True for a convolution or dense layer; False for a product of two activations (attention)."""
    dense = operation.name in ("addmm", "mm") and len(operation.inputs) == 1
    return dense or operation.name == "convolution"


def _ends_separable(trace: Trace, operation: Operation) -> bool:
    """Return True for the 1x1 convolution of a separable convolution: its input is a depthwise convolution's output."""
    geometry, first = operation.geometry, operation.inputs[0] if operation.inputs else -1
    pointwise = geometry is not None and geometry.groups == 1 and set(geometry.kernel) == {1}
    return pointwise and first >= 0 and is_depthwise(trace.operations[first])


def _row(event: Call | Operation, owner: Owner, size: Shape, changes: dict[int, int]) -> Row:
    layer = isinstance(event, Call)
    operations = event.operations if layer else [event]
    call = event if layer else event.call
    if layer:
        shape = event.output_shapes[0] if event.output_shapes else ()
        numbers = 0 if event.same_storage else sum(map(prod, event.output_shapes))
        (parameters, trainable), statistics = owner.take_module(event.module)
        geometry, axes = module_geometry(event.module) or _main_geometry(operations), event.axes
    else:
        shape, statistics = event.output_shape, 0
        numbers = 0 if event.in_place and event.name != "flatten" else prod(shape)
        parameters, trainable = owner.take(event.parameters)
        geometry, axes = event.geometry, event.axes
    exact, local, jump, start = _fields(axes, size) if axes else (None, None, None, None)
    whole = exact == size and any(axis.whole for axis in axes or ())
    word = _WORDS.get(operations[0].name, operations[0].name) if operations else ""
    name = call.name + (f"#{call.run}" if layer and call.run > 1 else "")
    return Row(
        name if layer else f"{name}.{word}".lstrip("."),
        type(call.module).__name__ if layer else word,
        geometry.notation() if geometry else _width(call.module) if layer else "",
        tuple(shape[1:] if shape and shape[0] == 1 else shape),
        parameters,
        statistics,
        parameters + sum(changes.get(op.index, 0) for op in operations),
        sum(op.multiply_adds or 0 for op in operations),
        sum(prod(op.output_shape) for op in operations if not op.multiply_adds and op.name != "flatten"),
        numbers * _BYTES / 1024,
        exact,
        local,
        jump,
        start,
        whole,
        trainable=trainable,
    )


def _main_geometry(operations: list[Operation]) -> Geometry | None:
    windows = [op.geometry for op in operations if op.geometry is not None]
    return windows[0] if len(operations) == 1 and windows else None


def _width(module: nn.Module) -> str:
    return f"C{module.out_features}" if isinstance(module, nn.Linear) else ""


def _fields(
    axes: Axes, size: Shape
) -> tuple[Shape | None, Shape | None, tuple[float, ...] | None, tuple[float, ...] | None]:
    """(receptive field, local field, jump, start) per axis of the image."""
    if any(axis.kind == "unknown" for axis in axes):
        return None, None, None, None
    exact, local = [], []
    for axis, side in zip(axes, size, strict=True):
        if axis.kind == "fixed":
            low, high = axis.span.at(0)
            seen = min(high, side - 1) - max(low, 0) + 1
            exact.append(seen)
            local.append(seen)
        else:
            exact.append(side if axis.whole else axis.span.size)
            local.append(axis.span.size)
    walking = all(axis.kind == "along" for axis in axes)
    jump = tuple(float(axis.span.jump) for axis in axes) if walking else None
    return tuple(exact), tuple(local), jump, tuple(axis.span.start for axis in axes) if walking else None


def _unique(rows: list[Row]) -> list[Row]:
    """Rows with names of their own: the second `block.add` is `block.add#2`."""
    seen: dict[str, int] = {}
    named = []
    for row in rows:
        seen[row.name] = seen.get(row.name, 0) + 1
        named.append(row if seen[row.name] == 1 else replace(row, name=f"{row.name}#{seen[row.name]}"))
    return named


def _unfollowed(trace: Trace) -> list[str]:
    """Where the receptive field was lost sight of: the operations with the first unknown outputs."""
    lost = {op.index for op in trace.operations if op.axes and any(a.kind == "unknown" for a in op.axes)}
    first = [op for op in trace.operations if op.index in lost and not lost & set(op.inputs)]
    return sorted({f"{op.call.name or 'model'}: {op.name}" for op in first})
