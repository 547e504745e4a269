"""A simulated CUDA device for tests on machines without one.

Computations run on the CPU, but every tensor has a side (host or device). Operations that CUDA would refuse, or that
would synchronize with the device, are detected.

    with simulated_cuda() as cuda:
        ...  # torch.cuda.is_available() is true, `.to("cuda")` works
    cuda.events, cuda.kernels

Two torch modes implement it. `_Calls`, a TorchFunctionMode, intercepts calls of the Python API that concern a device
(`tensor.device`, `.to`, `torch.zeros(device=...)`). `_Operations`, a TorchDispatchMode, intercepts every executed
operation, gives its results the side of its inputs, and

- raises `DeviceMixError` if an operation gets tensors of both sides, as CUDA does;
- records blocking copies between the sides, and non-blocking ones that CUDA would make blocking (more than 64 KiB from
  memory that is not pinned);
- records host syncs: operations whose result or its shape the host must know (`.item()`, a boolean index, ...);
- counts the operations that launch kernels.

It supports the operations that this project uses, not all of PyTorch.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cnntrain import transfer

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
REGIONS = ("train_epoch", "evaluate", "_bare_steps")  # functions that events are attributed to

COPIES = {aten.copy_, aten._to_copy}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Operations for which the host needs a value or a shape that is computed on the device.
SYNCS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten.bincount,
    aten.histc,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.linalg_inv_ex,
    aten._linalg_det,
    aten._linalg_solve_ex,
}
# Operations that accept no host tensors; other operations accept 0-dimensional ones.
ONE_SIDE_ONLY = {aten.cat, aten.stack, aten._foreach_add_, aten._foreach_mul_}
NO_KERNEL = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten.detach,
    aten._unsafe_view,
    aten.lift_fresh,
    torch.ops.profiler._record_function_enter_new,
    torch.ops.profiler._record_function_exit,
}


class DeviceMixError(RuntimeError):
    """An operation got tensors of the host and of the device."""


class Event(NamedTuple):
    """An operation that makes the host wait for the device.

    Attributes:
        kind: description of the operation.
        region: the function of `REGIONS` in which it happened, or an empty string.
        place: files and lines of cnntrain, innermost first.
    """

    kind: str
    region: str
    place: str


class SimulatedCuda:
    """The tensors on the simulated device, and the events that involved them.

    Attributes:
        events: number of occurrences of each event.
        kernels: operations executed on the device, by region.
    """

    def __init__(self) -> None:
        self.events: Counter[Event] = Counter()
        self.kernels: Counter[str] = Counter()
        self._on_device: dict[int, StorageWeakRef] = {}
        self._pinned: dict[int, StorageWeakRef] = {}

    def is_on_device(self, tensor: Tensor) -> bool:
        return _contains(self._on_device, tensor)

    def is_pinned(self, tensor: Tensor) -> bool:
        return _contains(self._pinned, tensor)

    def pin(self, tensor: Tensor) -> None:
        _insert(self._pinned, tensor)

    def set_side(self, tensor: Tensor, on_device: bool) -> None:
        if on_device and tensor.device.type != "meta":
            _insert(self._on_device, tensor)
        else:
            self._on_device.pop(_storage(tensor), None)

    def record(self, kind: str) -> None:
        self.events[Event(kind, *_caller())] += 1

    def record_copy(self, source: Tensor, to_device: bool, non_blocking: bool) -> None:
        if not to_device:
            self.record("non-blocking copy to the host, read too early" if non_blocking else "copy to the host")
        elif not non_blocking:
            self.record("blocking copy to the device")
        elif not self.is_pinned(source) and source.nbytes > transfer.STAGED_BYTES:
            self.record("copy of more than 64 KiB from memory that is not pinned")


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, or without storage
        return 0


def _contains(table: dict[int, StorageWeakRef], tensor: Tensor) -> bool:
    reference = table.get(_storage(tensor))
    return reference is not None and not reference.expired()


def _insert(table: dict[int, StorageWeakRef], tensor: Tensor) -> None:
    if key := _storage(tensor):
        table[key] = StorageWeakRef(tensor.untyped_storage())


def _frames() -> Iterator[tuple[str, int, str]]:
    """Yield (file, line, function) of the frames in cnntrain, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        _, found, file = frame.f_code.co_filename.rpartition("/cnntrain/")
        if found:
            yield file, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


def _caller() -> tuple[str, str]:
    """Return the region and place of the caller."""
    frames = list(_frames())
    region = next((function for _, _, function in frames if function in REGIONS), "")
    return region, " < ".join(f"{file}:{line}" for file, line, _ in frames[:4])


def _tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


class _Operations(TorchDispatchMode):
    """Tracks the side of the results of operations."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cuda, kwargs, operation = self.cuda, dict(kwargs or {}), func._overloadpacket
        device = kwargs.get("device")
        to_device = device is not None and torch.device(device).type == "cuda"
        if to_device:
            kwargs["device"] = CPU
        inputs = [tensor for tensor in _tensors(args, kwargs) if tensor.device.type != "meta"]
        sides = [cuda.is_on_device(tensor) for tensor in inputs]
        on_device = any(sides)
        if operation in COPIES:
            non_blocking = bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
            if operation is aten.copy_:
                on_device = sides[0]
                if len(sides) > 1 and sides[0] != sides[1]:
                    cuda.record_copy(inputs[1], on_device, non_blocking)
            elif to_device and not sides[0]:
                cuda.record_copy(inputs[0], True, non_blocking)
        elif on_device and not all(sides):
            self._check(operation, args, inputs, sides)
        if on_device:
            if operation in SYNCS or (operation is aten.repeat_interleave and "output_size" not in kwargs):
                cuda.record(f"host sync by {operation.__name__}")
            if operation in INDEXING and any(i.dtype in (torch.bool, torch.uint8) for i in _tensors(args[1])):
                cuda.record("host sync by a boolean index")
            view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
            if not view and operation not in NO_KERNEL:
                cuda.kernels[_caller()[0]] += 1
        result = func(*args, **kwargs)
        input_storages = {_storage(tensor) for tensor in inputs}
        for tensor in _tensors(result):
            if on_device or to_device or _storage(tensor) not in input_storages:
                cuda.set_side(tensor, to_device or on_device)
        return result

    def _check(self, operation: Any, args: Any, inputs: list[Tensor], sides: list[bool]) -> None:
        """Raise DeviceMixError if CUDA does not support this combination of sides."""
        if operation in INDEXING:
            if not sides[0]:
                raise DeviceMixError(
                    f"{operation.__name__}: a host tensor is indexed by a device tensor at {_caller()}"
                )
            if not all(self.cuda.is_on_device(index) for index in _tensors(args[1])):
                self.cuda.record("blocking copy of an index to the device")
            if operation is not aten.index and args[2].ndim and not self.cuda.is_on_device(args[2]):
                raise DeviceMixError(f"{operation.__name__}: host values for a device tensor at {_caller()}")
            return
        host_shapes = [
            tuple(tensor.shape)
            for tensor, side in zip(inputs, sides, strict=True)
            if not side and (tensor.ndim or operation in ONE_SIDE_ONLY)
        ]
        if host_shapes:
            raise DeviceMixError(f"{operation.__name__}: device tensors and host tensors {host_shapes} at {_caller()}")


class _Calls(TorchFunctionMode):
    """Intercepts calls of the Python API that concern a device."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.replacements: dict[Any, Callable[..., Any]] = {
            Tensor.device.__get__: lambda t: CUDA if cuda.is_on_device(t) else t.device,  # pyright: ignore
            Tensor.is_cuda.__get__: cuda.is_on_device,  # pyright: ignore
            Tensor.is_cpu.__get__: lambda t: t.is_cpu and not cuda.is_on_device(t),  # pyright: ignore
            Tensor.get_device: lambda t: 0 if cuda.is_on_device(t) else -1,
            Tensor.is_pinned: cuda.is_pinned,
            Tensor.to: self._to,
            Tensor.cpu: lambda t: self._move(t, CPU),
            Tensor.cuda: lambda t, non_blocking=False: self._move(t, CUDA, None, non_blocking),
            Tensor.pin_memory: self._pin_memory,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.replacements:
            return self.replacements[func](*args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and self.cuda.is_on_device(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.tolist and self.cuda.is_on_device(args[0]):
            self.cuda.record("host sync by tolist")
        if func is Tensor.__deepcopy__:
            return self._set_side(func(*args, **kwargs), self.cuda.is_on_device(args[0]))
        if getattr(func, "__module__", "") == "cnntrain.models.norm_act" and self.cuda.is_on_device(args[0]):
            return torch.nn.functional.dropout(
                *args, **kwargs
            )  # it would see the CPU as device, because this mode is off inside
        device = kwargs.get("device")
        if func is Tensor.new_tensor and device is None:
            device = CUDA if self.cuda.is_on_device(args[0]) else CPU
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            self.cuda.record("blocking copy to the device")
        return self._set_side(func(*args, **{**kwargs, "device": CPU}), True)

    def _set_side(self, result: Any, on_device: bool) -> Any:
        for tensor in _tensors(result):
            self.cuda.set_side(tensor, on_device)
        return result

    def _pin_memory(self, tensor: Tensor) -> Tensor:
        if self.cuda.is_on_device(tensor):
            raise RuntimeError("cannot pin a tensor on the device")
        pinned = tensor.clone()
        self.cuda.pin(pinned)
        return pinned

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Implement all signatures of `Tensor.to`: (device, dtype, non_blocking, copy), (dtype, ...), (other, ...)."""
        named = {name: kwargs.get(name) for name in ("device", "dtype", "memory_format")}
        flags = [value for value in args if isinstance(value, bool)]
        for value in args:
            if isinstance(value, Tensor):
                named["device"], named["dtype"] = CUDA if self.cuda.is_on_device(value) else CPU, value.dtype
            elif isinstance(value, torch.dtype):
                named["dtype"] = value
            elif isinstance(value, str | torch.device):
                named["device"] = torch.device(value)
        non_blocking = kwargs.get("non_blocking", flags[0] if flags else False)
        copy = kwargs.get("copy", flags[1] if len(flags) > 1 else False)
        return self._move(tensor, named["device"], named["dtype"], non_blocking, copy, named["memory_format"])

    def _move(
        self,
        tensor: Tensor,
        device: Any,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
        copy: bool = False,
        memory_format: torch.memory_format | None = None,
    ) -> Tensor:
        dtype = dtype or tensor.dtype
        if tensor.device.type == "meta" or (device is not None and torch.device(device).type == "meta"):
            return tensor.to(device or tensor.device, dtype)
        source_on_device = self.cuda.is_on_device(tensor)
        target_on_device = source_on_device if device is None else torch.device(device).type == "cuda"
        if source_on_device != target_on_device:
            self.cuda.record_copy(tensor, target_on_device, non_blocking)
        layout = {} if memory_format is None else {"memory_format": memory_format}
        moved = tensor.to(dtype, copy=copy or source_on_device != target_on_device, **layout)
        if moved is not tensor:
            self.cuda.set_side(moved, target_on_device)
        return moved


@contextlib.contextmanager
def simulated_cuda(free_bytes: int = 70 << 30, total_bytes: int = 80 << 30) -> Iterator[SimulatedCuda]:
    """Simulate one CUDA device (Hopper, compute capability 9.0) within the block."""
    import torch.nn.utils.clip_grad as clip_grad
    import torch.optim.optimizer as optimizer

    cuda = SimulatedCuda()
    results: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "is_initialized": True,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": "simulated",
        "mem_get_info": (free_bytes, total_bytes),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 1 << 20,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "synchronize": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "set_device": None,
        "_lazy_init": None,
        "set_rng_state": None,
        "get_rng_state": torch.get_rng_state(),
    }
    real_autocast = torch.autocast

    class Autocast(real_autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def group_by_side(group: Callable[..., Any]) -> Callable[..., Any]:
        """Replace a torch function that groups parameters in C++, where they are on the CPU."""

        def grouped(tensors: Any, with_indices: bool = False) -> Any:
            groups = group(tensors, with_indices)
            first = {key: next(t for t in value[0][0] if t is not None) for key, value in groups.items()}
            return {(CUDA if cuda.is_on_device(first[k]) else k[0], k[1]): value for k, value in groups.items()}

        return grouped

    _clear_constants()
    with contextlib.ExitStack() as stack:
        for name, value in results.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, mock.Mock(return_value=value)))
        torch.cuda.synchronize.side_effect = lambda *_: cuda.record("host sync by synchronize")  # pyright: ignore
        for owner in (torch, torch.amp, torch.amp.autocast_mode):
            stack.enter_context(mock.patch.object(owner, "autocast", Autocast))
        for module in (clip_grad, optimizer):
            name = "_group_tensors_by_device_and_dtype"
            stack.enter_context(mock.patch.object(module, name, group_by_side(getattr(module, name))))
        for name in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
            if hasattr(optimizer.Optimizer, name):
                stack.enter_context(mock.patch.object(optimizer.Optimizer, name))
        stack.callback(_clear_constants)
        with _Operations(cuda), _Calls(cuda):
            yield cuda


def _clear_constants() -> None:
    """Clear the caches of constants per device, which are invalid in another simulation."""
    for cached in (transfer._constant, transfer.arange):
        cached.cache_clear()
