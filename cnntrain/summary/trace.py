"""Trace a forward pass on the meta device (shapes without data): modules, operations, and axes of the image."""

import copy
import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cnntrain.summary.conv_arithmetic import ConvGeometry, Shape, operation_geometry
from cnntrain.summary.op_rules import COPIES, FACTORIES, VIEWS, OpCall, multiply_adds, output_axes, tensors_in
from cnntrain.summary.receptive_field import Axes, Axis, image_axes, window

ModelOrBuilder = nn.Module | Callable[[], nn.Module]
_Key = tuple[int, int, Shape, Shape]
# Modules of torch.nn that are one layer although they may have children (parametrized convolutions, attention).
_LAYERS = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.modules.batchnorm._NormBase,
)


def as_meta(model_or_builder: ModelOrBuilder) -> nn.Module:
    """Return a copy of a network on the meta device, or build it there; weights are neither copied nor drawn."""
    if isinstance(model_or_builder, nn.Module):
        return _copy_to_meta(model_or_builder)
    try:
        with torch.device("meta"):
            return _copy_to_meta(model_or_builder())
    except Exception as error:
        if not needs_data(error.__cause__ or error):
            raise
        return _copy_to_meta(model_or_builder())  # its constructor computes with tensors


def _copy_to_meta(model: nn.Module) -> nn.Module:
    memo: dict[int, object] = {}
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()]
        for tensor in tensors:
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _empty_like(tensor)
    return copy.deepcopy(model, memo)


def _empty_like(tensor: Tensor) -> Tensor:
    if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
        return type(tensor)(tensor.requires_grad, "meta")  # type: ignore[call-arg,arg-type]
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def needs_data(error: BaseException) -> bool:
    """Return True if the network failed because it reads values (`.item()`, numpy), which meta tensors lack."""
    return isinstance(error, (NotImplementedError, RuntimeError, TypeError)) and bool(
        re.search(r"\bmeta\b", str(error), re.IGNORECASE)
    )


def meta_images(in_channels: int, image_size: tuple[int, ...], batch_size: int = 1) -> Tensor:
    """Return a batch (N, C, *size) on the meta device."""
    return torch.empty(batch_size, in_channels, *image_size, device="meta")


@dataclass
class Operation:
    """One call of an ATen operation that depends on the image.

    Attributes:
        inputs: indices of the operations that computed its inputs; -1 is the image.
        parameters: those that it reads.
        in_place: it overwrites its input.
        call: the layer it belongs to, or else the innermost module.
        axes: how its output depends on the axes of the image.
    """

    index: int
    name: str
    inputs: tuple[int, ...]
    input_shapes: tuple[Shape, ...]
    output_shape: Shape
    geometry: ConvGeometry | None
    multiply_adds: int
    parameters: tuple[nn.Parameter, ...]
    in_place: bool
    call: "ModuleCall"
    axes: Axes | None = None

    @property
    def is_depthwise(self) -> bool:
        geometry = self.geometry
        return geometry is not None and geometry.groups > 1 and geometry.groups == self.input_shapes[0][1]


@dataclass
class ModuleCall:
    """One call of a module.

    Attributes:
        layer: the module is one row of the table; its children are not listed.
        call_number: 1, or more if the module is called repeatedly.
        same_storage: the output is the input, or was written into it.
    """

    name: str
    module: nn.Module
    layer: bool
    call_number: int
    input_shapes: tuple[Shape, ...]
    output_shapes: tuple[Shape, ...] = ()
    operations: list[Operation] = field(default_factory=list)
    same_storage: bool = False
    axes: Axes | None = None


@dataclass(frozen=True)
class _TensorInfo:
    """The image axes of a tensor, the operation that computed it, and the parameter that it is or is a view of."""

    axes: Axes | None = None
    producer: int | None = None
    parameter: nn.Parameter | None = None


class Trace(TorchDispatchMode):
    """Record of a forward pass on the meta device; use `trace_run`.

    Attributes:
        events: layers and operations outside of layers, in the order in which they started.
        operations, calls: all operations and all module calls.
        stack: the running modules when an error was raised, the outermost first.
        failed_operation: name and input shapes of the operation that raised, if an operation raised.
        uncounted: (module name, operation name) of operations with unknown multiply-adds.
    """

    def __init__(self, model: nn.Module, batch: Tensor) -> None:
        super().__init__()
        self.batch_size = batch.shape[0]
        self.events: list[ModuleCall | Operation] = []
        self.operations: list[Operation] = []
        self.calls: list[ModuleCall] = []
        self.stack: list[ModuleCall] = []
        self.failed_operation: tuple[str, tuple[Shape, ...]] | None = None
        self.uncounted: list[tuple[str, str]] = []
        self._infos: dict[_Key, _TensorInfo] = {}
        self._alive: list[Tensor] = []  # keeps storages alive, so that a key identifies one tensor
        self._buffers: dict[int, tuple[Tensor, int]] = {}  # new tensors and the largest number of elements copied
        self._runs: Counter[int] = Counter()
        self._set_info(batch, _TensorInfo(image_axes(batch.dim() - 2), -1))
        for parameter in model.parameters():
            if not nn.parameter.is_lazy(parameter):
                self._set_info(parameter, _TensorInfo(parameter=parameter))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch's compiler, which takes seconds

    def producer(self, tensor: Tensor) -> Operation | None:
        """Return the operation that computed the tensor."""
        return self._operation(self._info(tensor).producer)

    def first_producer(self, operation: Operation) -> Operation | None:
        """Return the operation that computed the first input; None if it is the image."""
        return self._operation(operation.inputs[0] if operation.inputs else None)

    def _operation(self, index: int | None) -> Operation | None:
        return self.operations[index] if index is not None and index >= 0 else None

    def last_local(self) -> Operation | None:
        """Return the last operation whose output is a map that no adaptive or global pool has changed."""
        for operation in reversed(self.operations):
            if operation.axes and all(axis.kind == "along" and not axis.adapted for axis in operation.axes):
                return operation
        return None

    def _info(self, tensor: Tensor) -> _TensorInfo:
        return self._infos.get(_key(tensor), _TensorInfo())

    def _set_info(self, tensor: Tensor, info: _TensorInfo) -> None:
        self._infos[_key(tensor)] = info
        self._alive.append(tensor)

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook."""
        layer = not any(call.layer for call in self.stack) and _is_layer(module, root=not name)
        self._runs[id(module)] += 1
        call = ModuleCall(name, module, layer, self._runs[id(module)], _shapes(tensors_in(args, kwargs)))
        self.stack.append(call)
        self.calls.append(call)
        if layer:
            self.events.append(call)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook; calls above the module's on the stack ended with an error that the network caught."""
        inputs, outputs = tensors_in(args, kwargs), tensors_in(output)
        while (call := self.stack.pop()).module is not module:
            pass
        call.output_shapes = _shapes(outputs)
        if not outputs:
            return
        if isinstance(module, nn.Linear) and inputs:
            self._set_linear_axes(inputs[0], outputs[0])
        call.axes = self._info(outputs[0]).axes
        call.same_storage = (_storage(outputs[0]), outputs[0].shape) in [(_storage(t), t.shape) for t in inputs]

    def _set_linear_axes(self, source: Tensor, output: Tensor) -> None:
        """Keep the axes of channels-last maps (ConvNeXt), which torch flattens for the matrix product."""
        if (axes := self._info(source).axes) is not None:
            axes = tuple(a.combined(source.shape) if a.dim == -1 else a for a in axes)
            self._set_info(output, replace(self._info(output), axes=axes))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        in_place = name.endswith("_") and name != "copy_"
        name = name.rstrip("_") if in_place else name
        call = OpCall(func, name, args, kwargs or {}, lambda t: self._info(t).axes, in_place)
        infos = [self._info(t) for t in call.inputs]
        try:
            if name == "convolution":
                _check_channels(args[0], args[1], bool(args[6]), args[8])
            out = func(*args, **call.kwargs)
        except Exception:
            self.failed_operation = (name, _shapes(call.inputs))
            raise
        call.outs = tensors_in(out)
        if name in FACTORIES and call.outs:
            self._buffers[_storage(call.outs[0])] = (call.outs[0], 0)
            self._alive.append(call.outs[0])
        elif name == "copy_":
            self._record_copy(call.args[0], call.args[1])
        else:
            self._record(call, infos)
        return out

    def _record(self, call: OpCall, infos: list[_TensorInfo]) -> None:
        """Record which tensors the operation computed from which."""
        axes = output_axes(call)
        flatten = call.name in VIEWS and self._is_flatten(call, axes)
        producer, parameter = None, None
        if call.name in VIEWS | COPIES and not flatten:
            if infos:
                producer, parameter = infos[0].producer, infos[0].parameter
        else:
            producer = self._record_operation(call, "flatten" if flatten else call.name, infos, axes)
        for out, out_axes in zip(call.outs, axes, strict=True):
            self._set_info(out, _TensorInfo(out_axes, producer, parameter))

    def _is_flatten(self, call: OpCall, axes: list[Axes | None]) -> bool:
        """Return True if a view turns maps into vectors; it has a row although it computes nothing."""
        if len(call.outs) != 1 or axes[0] is None:
            return False
        before, after = call.shape, call.out_shape
        return len(after) == 2 < len(before) and after[0] == before[0] == self.batch_size

    def _record_operation(
        self, call: OpCall, name: str, infos: list[_TensorInfo], axes: list[Axes | None]
    ) -> int | None:
        """Record an operation that depends on the image or has multiply-adds; return its index."""
        producers = tuple(info.producer for info in infos if info.producer is not None)
        count = 0 if name == "flatten" else multiply_adds(call)
        if not call.outs or not self.stack or (not producers and not count):
            return None
        owner = next((c for c in self.stack if c.layer), self.stack[-1])
        if count is None:
            self.uncounted.append((owner.name, name))
        operation = Operation(
            index=len(self.operations),
            name=name,
            inputs=producers,
            input_shapes=_shapes(call.inputs),
            output_shape=call.out_shape,
            geometry=operation_geometry(name, call.args),
            multiply_adds=count or 0,
            parameters=tuple(info.parameter for info in infos if info.parameter is not None),
            in_place=call.in_place or name == "flatten",
            call=owner,
            axes=axes[0],
        )
        self.operations.append(operation)
        owner.operations.append(operation)
        if not owner.layer:
            self.events.append(operation)
        return operation.index

    def _record_copy(self, target: Tensor, source: Tensor) -> None:
        """Record a copy into a part of a new tensor (circular padding); the largest part decides about its axes."""
        info = self._info(source)
        self._set_info(target, info)
        whole, copied = self._buffers.get(_storage(target), (target, source.numel()))
        if info.axes is None or source.numel() <= copied or whole.dim() != target.dim():
            return
        self._buffers[_storage(target)] = (whole, source.numel())
        start = int(target.storage_offset() - whole.storage_offset())

        def shifted(axis: Axis) -> Axis:
            offset = start // whole.stride(axis.dim) % whole.shape[axis.dim]
            return replace(axis, interval=window(1, 1, offset)(axis.interval))

        axes = tuple(shifted(axis) if axis.kind == "along" else axis for axis in info.axes)
        self._set_info(whole, _TensorInfo(axes, info.producer))


def _key(tensor: Tensor) -> _Key:
    return _storage(tensor), int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _shapes(tensors: list[Tensor]) -> tuple[Shape, ...]:
    return tuple(tuple(t.shape) for t in tensors)


def _check_channels(images: Tensor, weight: Tensor, transposed: bool, groups: int) -> None:
    """Raise for a wrong number of channels; on the meta device transposed convolutions accept any number."""
    needed = weight.shape[0] if transposed else weight.shape[1] * groups
    if images.shape[1] != needed:
        raise RuntimeError(f"expected {needed} channels, but got {images.shape[1]}")


def _is_layer(module: nn.Module, root: bool) -> bool:
    if isinstance(module, _LAYERS):
        return True
    own = type(module).__module__.startswith("torch.nn.modules")
    return not any(True for _ in module.children()) and (own or not root)


class TraceError(Exception):
    """A network raised while it was traced; `__cause__` is what it raised."""

    def __init__(self, trace: Trace) -> None:
        super().__init__("the network raised an error")
        self.trace = trace


def trace_run(model: nn.Module, batch: Tensor) -> tuple[Trace, Any]:
    """Run a meta network on a meta batch (N, C, *size); return the trace and the network's output.

    Raises:
        TraceError: the network raised; it has the trace up to the error.
    """
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        with torch.no_grad(), suppress(Exception):
            model(batch)  # initializes lazy modules; an error is raised again below
    trace = Trace(model, batch)
    try:
        with torch.no_grad(), ExitStack() as hooks:
            for name, module in model.named_modules():
                hooks.enter_context(module.register_forward_pre_hook(partial(trace.enter, name), with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(trace.leave, with_kwargs=True))
            with trace:
                return trace, model(batch)
    except Exception as error:
        raise TraceError(trace) from error
