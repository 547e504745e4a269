"""A simulated CUDA device for tests on machines without one: the numbers are computed on the CPU, but every tensor has
a side (host or device), and what a real GPU would refuse or wait for is found.

    with simulated_cuda() as cuda:
        ...  # torch.cuda.is_available() is true, `.to("cuda")` works
    cuda.events, cuda.kernels

Two modes of torch do it. `_Calls`, a TorchFunctionMode, sees the calls of the Python API and answers those that name a
device (`tensor.device`, `.to`, `torch.zeros(device=...)`). `_Operations`, a TorchDispatchMode, sees every operation
that is executed, gives its results the side of its inputs, and

- raises `DeviceMixError` where an operation would meet tensors of both sides, as CUDA does;
- notes blocking copies between the sides, and non-blocking ones that CUDA would make blocking (more than 64 KiB from
  memory that is not pinned);
- notes host syncs: operations whose result's value or shape the host must know (`.item()`, a boolean index, ...);
- counts the operations that launch work on the device.

It knows the operations that this project uses, not all of PyTorch.
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
REGIONS = ("train_epoch", "evaluate", "_bare_steps")  # functions that events are told apart by

COPIES = {aten.copy_, aten._to_copy}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# The host must know a value or a shape that is computed on the device.
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
# Elsewhere a tensor without dimensions may come from the host.
ALL_ON_ONE_SIDE = {aten.cat, aten.stack, aten._foreach_add_, aten._foreach_mul_}
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
    """An operation would meet tensors of the host and of the device."""


class Event(NamedTuple):
    """Something that makes the host wait for the device.

    Attributes:
        kind: what happened.
        region: the function of `REGIONS` in which it happened, or an empty string.
        place: files and lines of cnntrain, innermost first.
    """

    kind: str
    region: str
    place: str


class SimulatedCuda:
    """Which tensors are on the device, and what happened to them.

    Attributes:
        events: how often each event happened.
        kernels: operations executed on the device, by region.
    """

    def __init__(self) -> None:
        self.events: Counter[Event] = Counter()
        self.kernels: Counter[str] = Counter()
        self._on_device: dict[int, StorageWeakRef] = {}
        self._pinned: dict[int, StorageWeakRef] = {}

    def holds(self, tensor: Tensor) -> bool:
        return _known(self._on_device, tensor)

    def is_pinned(self, tensor: Tensor) -> bool:
        return _known(self._pinned, tensor)

    def pin(self, tensor: Tensor) -> None:
        _note(self._pinned, tensor)

    def put(self, tensor: Tensor, on_device: bool) -> None:
        if on_device and tensor.device.type != "meta":
            _note(self._on_device, tensor)
        else:
            self._on_device.pop(_storage(tensor), None)

    def add(self, kind: str) -> None:
        self.events[Event(kind, *_here())] += 1

    def copied(self, source: Tensor, to_device: bool, non_blocking: bool) -> None:
        if not to_device:
            self.add("non-blocking copy to the host, read too early" if non_blocking else "copy to the host")
        elif not non_blocking:
            self.add("blocking copy to the device")
        elif not self.is_pinned(source) and source.nbytes > transfer.STAGED_BYTES:
            self.add("copy of more than 64 KiB from memory that is not pinned")


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, or without storage
        return 0


def _known(table: dict[int, StorageWeakRef], tensor: Tensor) -> bool:
    reference = table.get(_storage(tensor))
    return reference is not None and not reference.expired()


def _note(table: dict[int, StorageWeakRef], tensor: Tensor) -> None:
    if key := _storage(tensor):
        table[key] = StorageWeakRef(tensor.untyped_storage())


def _frames() -> Iterator[tuple[str, int, str]]:
    """(file, line, function) of cnntrain's frames, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        _, found, file = frame.f_code.co_filename.rpartition("/cnntrain/")
        if found:
            yield file, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


def _here() -> tuple[str, str]:
    """Region and place of the caller."""
    frames = list(_frames())
    region = next((function for _, _, function in frames if function in REGIONS), "")
    return region, " < ".join(f"{file}:{line}" for file, line, _ in frames[:4])


def _tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


class _Operations(TorchDispatchMode):
    """Gives the results of operations their side."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cuda, kwargs, operation = self.cuda, dict(kwargs or {}), func._overloadpacket
        wanted = kwargs.get("device")
        to_device = None if wanted is None or torch.device(wanted).type != "cuda" else True
        if to_device:
            kwargs["device"] = CPU
        inputs = [tensor for tensor in _tensors(args, kwargs) if tensor.device.type != "meta"]
        sides = [cuda.holds(tensor) for tensor in inputs]
        on_device = any(sides)
        if operation in COPIES:
            non_blocking = bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
            if operation is aten.copy_:
                on_device = sides[0]
                if len(sides) > 1 and sides[0] != sides[1]:
                    cuda.copied(inputs[1], on_device, non_blocking)
            elif to_device and not sides[0]:
                cuda.copied(inputs[0], True, non_blocking)
        elif on_device and not all(sides):
            self._check(operation, args, inputs, sides)
        if on_device:
            if operation in SYNCS or (operation is aten.repeat_interleave and "output_size" not in kwargs):
                cuda.add(f"host sync by {operation.__name__}")
            if operation in INDEXING and any(i.dtype in (torch.bool, torch.uint8) for i in _tensors(args[1])):
                cuda.add("host sync by a boolean index")
            view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
            if not view and operation not in NO_KERNEL:
                cuda.kernels[_here()[0]] += 1
        result = func(*args, **kwargs)
        known = {_storage(tensor) for tensor in inputs}
        for tensor in _tensors(result):
            if on_device or to_device or _storage(tensor) not in known:
                cuda.put(tensor, to_device or on_device)
        return result

    def _check(self, operation: Any, args: Any, inputs: list[Tensor], sides: list[bool]) -> None:
        """Refuse tensors of both sides, as CUDA does.

        Raises:
            DeviceMixError: they may not meet.
        """
        if operation in INDEXING:
            if not sides[0]:
                raise DeviceMixError(f"{operation.__name__}: a host tensor is indexed from the device at {_here()}")
            if not all(self.cuda.holds(index) for index in _tensors(args[1])):
                self.cuda.add("blocking copy of an index to the device")
            if operation is not aten.index and args[2].ndim and not self.cuda.holds(args[2]):
                raise DeviceMixError(f"{operation.__name__}: host values for a device tensor at {_here()}")
            return
        strangers = [
            tuple(tensor.shape)
            for tensor, side in zip(inputs, sides, strict=True)
            if not side and (tensor.ndim or operation in ALL_ON_ONE_SIDE)
        ]
        if strangers:
            raise DeviceMixError(f"{operation.__name__}: device tensors and host tensors {strangers} at {_here()}")


class _Calls(TorchFunctionMode):
    """Answers the calls of the Python API that name a device."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.answers: dict[Any, Callable[..., Any]] = {
            Tensor.device.__get__: lambda t: CUDA if cuda.holds(t) else t.device,  # pyright: ignore
            Tensor.is_cuda.__get__: cuda.holds,  # pyright: ignore
            Tensor.is_cpu.__get__: lambda t: t.is_cpu and not cuda.holds(t),  # pyright: ignore
            Tensor.get_device: lambda t: 0 if cuda.holds(t) else -1,
            Tensor.is_pinned: cuda.is_pinned,
            Tensor.to: self._to,
            Tensor.cpu: lambda t: self._move(t, CPU),
            Tensor.cuda: lambda t, non_blocking=False: self._move(t, CUDA, None, non_blocking),
            Tensor.pin_memory: self._pin_memory,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.answers:
            return self.answers[func](*args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and self.cuda.holds(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.tolist and self.cuda.holds(args[0]):
            self.cuda.add("host sync by tolist")
        if func is Tensor.__deepcopy__:
            return self._put(func(*args, **kwargs), self.cuda.holds(args[0]))
        if getattr(func, "__module__", "") == "cnntrain.models.norm_act" and self.cuda.holds(args[0]):
            return torch.nn.functional.dropout(*args, **kwargs)  # inside, this mode is off: `device` would be the CPU
        device = kwargs.get("device")
        if func is Tensor.new_tensor and device is None:
            device = CUDA if self.cuda.holds(args[0]) else CPU
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            self.cuda.add("blocking copy to the device")
        return self._put(func(*args, **{**kwargs, "device": CPU}), True)

    def _put(self, result: Any, on_device: bool) -> Any:
        for tensor in _tensors(result):
            self.cuda.put(tensor, on_device)
        return result

    def _pin_memory(self, tensor: Tensor) -> Tensor:
        if self.cuda.holds(tensor):
            raise RuntimeError("cannot pin a tensor of the device")
        pinned = tensor.clone()
        self.cuda.pin(pinned)
        return pinned

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`Tensor.to` in all its forms: (device, dtype, non_blocking, copy), (dtype, ...), (other, ...)."""
        named = {name: kwargs.get(name) for name in ("device", "dtype", "memory_format")}
        flags = [value for value in args if isinstance(value, bool)]
        for value in args:
            if isinstance(value, Tensor):
                named["device"], named["dtype"] = CUDA if self.cuda.holds(value) else CPU, value.dtype
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
        here = self.cuda.holds(tensor)
        there = here if device is None else torch.device(device).type == "cuda"
        if here != there:
            self.cuda.copied(tensor, there, non_blocking)
        layout = {} if memory_format is None else {"memory_format": memory_format}
        moved = tensor.to(dtype, copy=copy or here != there, **layout)
        if moved is not tensor:
            self.cuda.put(moved, there)
        return moved


@contextlib.contextmanager
def simulated_cuda(free_bytes: int = 70 << 30, total_bytes: int = 80 << 30) -> Iterator[SimulatedCuda]:
    """One CUDA device (Hopper, compute capability 9.0) inside the block."""
    import torch.nn.utils.clip_grad as clip_grad
    import torch.optim.optimizer as optimizer

    cuda = SimulatedCuda()
    answers: dict[str, Any] = {
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

    def by_side(group: Callable[..., Any]) -> Callable[..., Any]:
        """torch groups parameters in C++, which sees their real device."""

        def grouped(tensors: Any, with_indices: bool = False) -> Any:
            found = group(tensors, with_indices)
            first = {key: next(t for t in value[0][0] if t is not None) for key, value in found.items()}
            return {(CUDA if cuda.holds(first[k]) else k[0], k[1]): value for k, value in found.items()}

        return grouped

    _forget_constants()
    with contextlib.ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, mock.Mock(return_value=value)))
        torch.cuda.synchronize.side_effect = lambda *_: cuda.add("host sync by synchronize")  # pyright: ignore
        for owner in (torch, torch.amp, torch.amp.autocast_mode):
            stack.enter_context(mock.patch.object(owner, "autocast", Autocast))
        for module in (clip_grad, optimizer):
            name = "_group_tensors_by_device_and_dtype"
            stack.enter_context(mock.patch.object(module, name, by_side(getattr(module, name))))
        for name in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
            if hasattr(optimizer.Optimizer, name):
                stack.enter_context(mock.patch.object(optimizer.Optimizer, name))
        stack.callback(_forget_constants)
        with _Operations(cuda), _Calls(cuda):
            yield cuda


def _forget_constants() -> None:
    """Constants that are kept per device are not those of another simulation."""
    for cached in (transfer._constant, transfer.arange):
        cached.cache_clear()
