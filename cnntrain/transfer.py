"""Host-to-device copies without a host sync: constants are cached per device, batches go through pinned memory."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

# Copies of up to this many bytes from pageable memory do not synchronize (CUDA Runtime API, "API synchronization
# behavior").
STAGED_BYTES = 64 * 1024


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Convert to `dtype` and copy to `device` without a host sync; a tensor on the device is returned unchanged.

    CUDA reads pinned memory asynchronously. PyTorch keeps the pinned block alive until the copy is complete, so the
    caller may release `tensor` immediately. Do not modify a pinned `tensor` in place afterwards.
    """
    tensor = tensor if dtype is None else tensor.to(dtype)
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.nbytes > STAGED_BYTES:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def constant(values: Sequence[float] | float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a cached tensor of constants, one copy per device. Never modify it in place."""
    return _constant(tuple(values) if isinstance(values, Sequence) else values, device, dtype)


def free_bytes(device: torch.device) -> int:
    """Return the bytes available to new tensors: free CUDA memory plus unused memory in PyTorch's caching allocator."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...] | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a cached inference tensor could not be used in training
        return torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def arange(length: int, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return a cached tensor 0, 1, ..., length - 1, one copy per device. Never modify it in place."""
    with torch.inference_mode(False):
        return torch.arange(length, dtype=dtype, device=device)


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no float64: for sums of many values."""
    return torch.float32 if device.type == "mps" else torch.float64
