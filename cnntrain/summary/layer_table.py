"""Summary of a network: one row per layer, and totals that are the sums of the rows."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Literal

from torch import Tensor, nn

from cnntrain.errors import UserError
from cnntrain.summary.conv_arithmetic import Shape, module_geometry
from cnntrain.summary.failures import explain_failure
from cnntrain.summary.op_rules import BATCH_NORMS, tensors_in
from cnntrain.summary.receptive_field import Axes
from cnntrain.summary.trace import (
    ModelOrBuilder,
    ModuleCall,
    Operation,
    Trace,
    TraceError,
    as_meta,
    meta_images,
    trace_run,
)

Convention = Literal["torch", "keras", "folded"]
"""How parameters are counted: as in torch; as in Keras, with running statistics; with BatchNorm folded."""

_BYTES = 4  # of a float32
_OPERATION_NAMES = {"cat": "concat", "mm": "matmul", "bmm": "matmul", "addmm": "linear"}


@dataclass(frozen=True)
class Row:
    """One layer, or one operation between layers, for one image.

    Attributes:
        output_shape: without the batch dimension.
        parameters: each tensor is counted in the first row that uses it.
        statistics: number of running means and variances.
        folded: number of parameters after folding BatchNorm.
        multiply_adds: without bias.
        elements: number of outputs of operations without multiply-adds.
        activations_kib: memory of the output in float32; in-place and pass-through layers have none, a flatten has.
        receptive_field: pixels per image axis (the side of the image if the whole image is read); None if unknown.
        local_field: without the paths through a global pool.
        jump: pixels from one position to the next; None if there are no positions.
        start: center of the first position in pixels.
        whole: some path reads the whole image.
        ran: False for modules that are not used in validation.
        trainable: number of trainable parameters.
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
    trainable: int = 0

    def count(self, convention: Convention) -> int:
        """Return the number of parameters."""
        extra = self.statistics if convention == "keras" else 0
        return self.folded if convention == "folded" else self.parameters + extra


@dataclass(frozen=True)
class ModelSummary:
    """Summary of a network.

    Attributes:
        receptive_field: of the last feature map in pixels per axis; None if unknown.
        depth: number of convolutions and dense layers on the longest path from input to output, as in the names
            ResNet-18 and VGG-16; see `_depth`.
        uncounted: operations whose multiply-adds are not counted.
        unfollowed: operations after which the receptive field is unknown.
    """

    name: str
    input_shape: Shape
    output_shape: Shape
    receptive_field: Shape | None
    depth: int
    rows: list[Row]
    uncounted: list[str]
    unfollowed: list[str]

    def parameters(self, convention: Convention = "torch") -> int:
        return sum(row.count(convention) for row in self.rows)

    @property
    def trainable(self) -> int:
        return sum(row.trainable for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        return sum(row.multiply_adds for row in self.rows)

    @property
    def activations_kib(self) -> float:
        return sum(row.activations_kib for row in self.rows)

    def as_dict(self, convention: Convention = "torch") -> dict[str, object]:
        """Return the summary for JSON."""
        totals = {
            "parameters": self.parameters(convention),
            "trainable": self.trainable,
            "multiply_adds": self.multiply_adds,
            "activations_kib": self.activations_kib,
        }
        return {"convention": convention, "totals": totals} | asdict(self)


def summarize(model_or_builder: ModelOrBuilder, input_shape: Sequence[int], name: str | None = None) -> ModelSummary:
    """Summarize a network for one image of `input_shape` (C, H, W), in evaluation mode, on the meta device.

    Multiply-adds do not include biases: ten 5x5 filters on 3x32x32 with padding 2 have 768,000.

    Raises:
        UserError: the network does not fit its input; names the layer.
    """
    model = as_meta(model_or_builder).eval()
    channels, *sides = (int(n) for n in input_shape)
    size = tuple(sides)
    try:
        trace, output = trace_run(model, meta_images(channels, size))
    except TraceError as error:
        failure = explain_failure(error)
        raise UserError(f"{failure.message}\n{failure.remedy}".strip()) from error
    counted: set[int] = set()
    folded = _folding_changes(trace)
    rows = _unique([_row(event, size, counted, folded) for event in trace.events])
    rows += _unused(model, counted)
    last, unfollowed = trace.last_local(), _unfollowed(trace)
    shape = tuple(output.shape[1:]) if hasattr(output, "shape") else ()
    return ModelSummary(
        name or type(model).__name__,
        (channels, *size),
        shape or (rows[-1].output_shape if rows else ()),
        _fields(last.axes, size)["local_field"] if last and last.axes and not unfollowed else None,
        _depth(trace, output),
        rows,
        sorted({f"{module or 'model'}: {operation}" for module, operation in trace.uncounted}),
        unfollowed,
    )


def _count(tensors: Iterable[Tensor], counted: set[int]) -> dict[str, Any]:
    """Count the elements of the tensors that no earlier row has, and add these tensors to `counted`."""
    new = {id(t): t for t in tensors if id(t) not in counted}
    counted.update(new)
    parameters = [t for t in new.values() if isinstance(t, nn.Parameter)]
    statistics = [t for t in new.values() if not isinstance(t, nn.Parameter) and t.is_floating_point()]
    return {
        "parameters": sum(t.numel() for t in parameters),
        "trainable": sum(t.numel() for t in parameters if t.requires_grad),
        "statistics": sum(t.numel() for t in statistics),
    }


def _unused(model: nn.Module, counted: set[int]) -> list[Row]:
    """Return rows for modules with parameters that were not used, for example auxiliary heads."""
    rows = []
    for name, module in model.named_modules():
        counts = _count([*module.parameters(recurse=False), *module.buffers(recurse=False)], counted)
        if folded := counts["parameters"]:
            kind = type(module).__name__
            rows.append(Row(name or "model", kind, "not run", (), folded=folded, ran=False, **counts))
    return rows


def _folding_changes(trace: Trace) -> dict[int, int]:
    """Return by operation how many parameters folding of BatchNorm adds (a bias) or removes (those of the norm).

    A norm is folded into the convolution or dense layer before it if no other operation reads that layer's output.
    """
    readers = Counter(i for operation in trace.operations for i in operation.inputs)
    change: dict[int, int] = {}
    for operation in trace.operations:
        module, before = operation.call.module, trace.first_producer(operation)
        if operation.name not in BATCH_NORMS or not isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        if before is None or before.name not in ("convolution", "addmm", "mm") or readers[before.index] != 1:
            continue
        if module.running_mean is None or operation.call.call_number > 1 or before.call.call_number > 1:
            continue
        change[operation.index] = -sum(p.numel() for p in module.parameters())
        has_bias = before.call.layer and getattr(before.call.module, "bias", None) is not None
        change[before.index] = 0 if has_bias else module.num_features
    return change


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
    last = [operation for tensor in tensors_in(output) if (operation := trace.producer(tensor))]
    return max((depths[operation.index] for operation in last), default=0)


def _is_weighted(operation: Operation) -> bool:
    """Return True for a convolution or dense layer; False for a product of two activations (attention)."""
    dense = operation.name in ("addmm", "mm") and len(operation.inputs) == 1
    return dense or operation.name == "convolution"


def _ends_separable(trace: Trace, operation: Operation) -> bool:
    """Return True for the 1x1 convolution of a separable convolution: its input is a depthwise convolution's output."""
    geometry, before = operation.geometry, trace.first_producer(operation)
    pointwise = geometry is not None and geometry.groups == 1 and set(geometry.kernel) == {1}
    return pointwise and before is not None and before.is_depthwise


def _row(event: ModuleCall | Operation, size: Shape, counted: set[int], folded: dict[int, int]) -> Row:
    if isinstance(event, ModuleCall):
        operations, module = event.operations, event.module
        shape = event.output_shapes[0] if event.output_shapes else ()
        elements = 0 if event.same_storage else sum(map(prod, event.output_shapes))
        counts = _count([*module.parameters(), *module.buffers()], counted)
        geometry = module_geometry(module) or (operations[0].geometry if len(operations) == 1 else None)
        name, kind = event.name + (f"#{event.call_number}" if event.call_number > 1 else ""), type(module).__name__
        notation = f"C{module.out_features}" if isinstance(module, nn.Linear) else ""
    else:
        operations, shape, geometry, notation = [event], event.output_shape, event.geometry, ""
        elements = 0 if event.in_place and event.name != "flatten" else prod(shape)
        counts = _count(event.parameters, counted)
        kind = _OPERATION_NAMES.get(event.name, event.name)
        name = f"{event.call.name}.{kind}".lstrip(".")
    return Row(
        name,
        kind,
        geometry.notation() if geometry else notation,
        tuple(shape[1:] if shape and shape[0] == 1 else shape),
        folded=counts["parameters"] + sum(folded.get(op.index, 0) for op in operations),
        multiply_adds=sum(op.multiply_adds for op in operations),
        elements=sum(prod(op.output_shape) for op in operations if not op.multiply_adds and op.name != "flatten"),
        activations_kib=elements * _BYTES / 1024,
        **counts,
        **(_fields(event.axes, size) if event.axes else {}),
    )


def _fields(axes: Axes, size: Shape) -> dict[str, Any]:
    """Return the values of a row that describe the receptive field; none if it is unknown."""
    if any(axis.kind == "unknown" for axis in axes):
        return {}
    exact, local = [], []
    for axis, side in zip(axes, size, strict=True):
        pixels = axis.interval.size
        if axis.kind == "fixed":
            low, high = axis.interval.at(0)
            pixels = min(high, side - 1) - max(low, 0) + 1
        local.append(pixels)
        exact.append(side if axis.whole and axis.kind != "fixed" else pixels)
    whole = tuple(exact) == size and any(axis.whole for axis in axes)
    values: dict[str, Any] = {"receptive_field": tuple(exact), "local_field": tuple(local), "whole": whole}
    if all(axis.kind == "along" for axis in axes):
        values["jump"] = tuple(float(axis.interval.jump) for axis in axes)
        values["start"] = tuple(axis.interval.start for axis in axes)
    return values


def _unique(rows: list[Row]) -> list[Row]:
    """Make names unique: the second `block.add` becomes `block.add#2`."""
    counts: Counter[str] = Counter()
    named = []
    for row in rows:
        counts[row.name] += 1
        count = counts[row.name]
        named.append(row if count == 1 else replace(row, name=f"{row.name}#{count}"))
    return named


def _unfollowed(trace: Trace) -> list[str]:
    """Return the first operations with an unknown receptive field."""
    unknown = {op.index for op in trace.operations if op.axes and any(a.kind == "unknown" for a in op.axes)}
    first = [op for op in trace.operations if op.index in unknown and not unknown & set(op.inputs)]
    return sorted({f"{op.call.name or 'model'}: {op.name}" for op in first})
