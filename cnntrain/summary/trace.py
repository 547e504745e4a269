"""One run of a network on shapes alone, and what it did: by module, by operation, by axis of the image."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cnntrain.summary.axes import Axes, image_axes
from cnntrain.summary.conv_arithmetic import Shape, operation_geometry
from cnntrain.summary.multiply_adds import is_elementwise, multiply_adds
from cnntrain.summary.op_rules import all_tensors, tensors_of
from cnntrain.summary.receptive_field import window
from cnntrain.summary.record import Call, Operation
from cnntrain.summary.shape_rules import COPIES, FACTORIES, VIEWS, follow, is_pointwise

_Key = tuple[int, int, Shape, Shape]

# Modules of torch that are one layer, though they may have children (a parametrized convolution, attention).
_LAYERS = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.modules.batchnorm._NormBase,
)


@dataclass
class _Known:
    """What is known of a tensor: how it follows the image, which operation made it, which parameter it is."""

    axes: Axes | None = None
    producer: int | None = None
    parameter: str | None = None


@dataclass
class _Ran:
    """One call at torch's dispatcher; `name` without the underscore of in-place variants."""

    func: Any
    name: str
    args: Any
    kwargs: Any
    inputs: list[Tensor]
    in_place: bool
    before: list[_Known] = field(default_factory=list)
    outs: list[Tensor] = field(default_factory=list)


class Trace(TorchDispatchMode):
    """Records a forward pass on the meta device; use `run.trace_run`.

    events: layers (`Call`) and operations outside of layers (`Operation`), in the order in which they began.
    stack: the modules that were running when an error was raised, the outermost first.
    failing: name and shapes of the operation that raised, if it was one of torch's.
    """

    def __init__(self, model: nn.Module, batch: Tensor) -> None:
        super().__init__()
        self.batch_size = batch.shape[0]
        self.events: list[Call | Operation] = []
        self.operations: list[Operation] = []
        self.calls: list[Call] = []
        self.stack: list[Call] = []
        self.failing: tuple[str, tuple[Shape, ...]] | None = None
        self.unknown: list[tuple[str, str]] = []
        self._known: dict[_Key, _Known] = {}
        self._alive: list[Tensor] = []  # keeps storages from being reused, so that a key means one tensor
        self._buffers: dict[int, tuple[Tensor, int]] = {}
        self._runs: dict[int, int] = {}
        self._remember(batch, _Known(image_axes(batch.dim() - 2), -1))
        for name, parameter in model.named_parameters():
            if nn.parameter.is_lazy(parameter):
                continue
            self._remember(parameter, _Known(parameter=name))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch would import its compiler, seconds long, to be told that it has no part in this

    def known(self, tensor: Tensor) -> _Known:
        return self._known.get(_key(tensor), _Known())

    def _remember(self, tensor: Tensor, known: _Known) -> None:
        self._known[_key(tensor)] = known
        self._alive.append(tensor)

    def enter(self, name: str, module: nn.Module, inputs: list[Tensor]) -> None:
        inside = any(call.layer for call in self.stack)
        layer = not inside and _is_layer(module, root=not name)
        run = self._runs[id(module)] = self._runs.get(id(module), 0) + 1
        call = Call(name, module, layer, run, tuple(tuple(t.shape) for t in inputs))
        self.stack.append(call)
        self.calls.append(call)
        if layer:
            self.events.append(call)

    def leave(self, module: nn.Module, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        while self.stack:
            call = self.stack.pop()
            if call.module is module:
                call.output_shapes = tuple(tuple(t.shape) for t in outputs)
                call.axes = self.known(outputs[0]).axes if outputs else None
                places = {(_key(t)[0], tuple(t.shape)) for t in inputs}
                call.same_storage = bool(outputs) and (_key(outputs[0])[0], tuple(outputs[0].shape)) in places
                return

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        name = name if namespace == "aten" else func._schema.name
        in_place = name.endswith("_") and name != "copy_"
        inputs = tensors_of(args, kwargs)
        ran = _Ran(func, name.rstrip("_") if in_place else name, args, kwargs, inputs, in_place)
        ran.before = [self.known(t) for t in inputs]
        try:
            if name == "convolution":
                _check_channels(args[0], args[1], bool(args[6]), args[8])
            out = func(*args, **kwargs)
        except Exception:
            self.failing = (name, tuple(tuple(t.shape) for t in inputs))
            raise
        ran.outs = all_tensors(out)
        self._observe(ran)
        return out

    def _observe(self, ran: "_Ran") -> None:
        """Note what an operation made of which tensors."""
        if ran.name in FACTORIES and ran.outs:
            self._buffers[_key(ran.outs[0])[0]] = (ran.outs[0], 0)
            self._alive.append(ran.outs[0])
            return
        if ran.name == "copy_":
            self._copied(ran.args[0], ran.args[1])
            return
        axes = follow(ran.func, ran.name, ran.args, ran.kwargs, ran.outs, lambda t: self.known(t).axes)
        if (ran.name in VIEWS and not self._flattens(ran, axes)) or ran.name in COPIES:
            source = ran.before[0] if ran.before else _Known()
            made, parameter = source.producer, source.parameter
        else:
            made, parameter = self._record(ran, axes), None
        for out, out_axes in zip(ran.outs, axes, strict=True):
            self._remember(out, _Known(out_axes, made, parameter))

    def _flattens(self, ran: "_Ran", axes: list[Axes | None]) -> bool:
        """Maps become rows of numbers, one row per image: the flatten of the lectures, though only a view."""
        if len(ran.outs) != 1 or axes[0] is None or len(self.stack) == 0:
            return False
        before, after = ran.inputs[0].shape, ran.outs[0].shape
        return len(after) == 2 < len(before) and after[0] == before[0] == self.batch_size

    def _record(self, ran: "_Ran", axes: list[Axes | None]) -> int | None:
        """Keep an operation that computed something from the image or from parameters; its index."""
        name = "flatten" if ran.name in VIEWS else ran.name
        producers = tuple(k.producer for k in ran.before if k.producer is not None)
        count = multiply_adds(ran.func, name, ran.args, ran.kwargs, ran.outs[0] if ran.outs else None)
        if not ran.outs or not self.stack or (not producers and not count):
            return None
        owner = next((call for call in self.stack if call.layer), self.stack[-1])
        if count is None:
            count = 0
            if not is_elementwise(name, is_pointwise(ran.func)):
                self.unknown.append((owner.name, name))
        operation = Operation(
            index=len(self.operations),
            name=name,
            inputs=producers,
            input_shapes=tuple(tuple(t.shape) for t in ran.inputs),
            output_shape=tuple(ran.outs[0].shape),
            geometry=operation_geometry(name, ran.args),
            multiply_adds=count,
            parameters=tuple(k.parameter for k in ran.before if k.parameter is not None),
            in_place=ran.in_place or name == "flatten",
            call=owner,
            axes=axes[0],
        )
        self.operations.append(operation)
        owner.operations.append(operation)
        if not owner.layer:
            self.events.append(operation)
        return operation.index

    def _copied(self, target: Tensor, source: Tensor) -> None:
        """A copy into part of a new tensor (circular padding): the whole follows the largest part."""
        known = self.known(source)
        self._remember(target, known)
        whole, filled = self._buffers.get(_key(target)[0], (target, source.numel()))
        if known.axes is None or source.numel() <= filled or whole.dim() != target.dim():
            return
        self._buffers[_key(target)[0]] = (whole, source.numel())
        rest, offsets = target.storage_offset() - whole.storage_offset(), []
        for stride in whole.stride():
            offsets.append(rest // stride)
            rest %= stride
        axes = tuple(
            replace(a, span=window(1, 1, offsets[a.dim])(a.span)) if a.kind == "along" else a
            for a in known.axes
        )
        self._remember(whole, _Known(axes, known.producer))


def _key(tensor: Tensor) -> _Key:
    storage = tensor.untyped_storage()._cdata
    return storage, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())


def _check_channels(images: Tensor, weight: Tensor, transposed: bool, groups: int) -> None:
    """On the meta device torch lets a transposed convolution pass with the wrong number of channels."""
    needed = weight.shape[0] if transposed else weight.shape[1] * groups
    if images.shape[1] != needed:
        raise RuntimeError(f"expected {needed} channels, but got {images.shape[1]}")


def _is_layer(module: nn.Module, root: bool) -> bool:
    if isinstance(module, _LAYERS):
        return True
    own = type(module).__module__.startswith("torch.nn.modules")
    return not any(True for _ in module.children()) and (own or not root)
