"""Host data on the device without a host sync: constants are copied once, batches through pinned memory."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

# CUDA copies up to this many bytes from pageable memory without waiting for the device (CUDA Runtime API, "API
# synchronization behavior").
STAGED_BYTES = 64 * 1024


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy to `device` without a host sync, converted to `dtype` first; a tensor on the device is returned as it is.

    CUDA reads pinned memory in the background. PyTorch keeps a pinned block until the copy is done, so the caller may
    drop `tensor` at once, but must not change it in place if it is pinned.
    """
    tensor = tensor if dtype is None else tensor.to(dtype)
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.nbytes > STAGED_BYTES:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def constant(
    values: Sequence[float] | float, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A tensor of numbers that do not change during training: one copy per device. Never modify it in place."""
    return _constant(tuple(values) if isinstance(values, Sequence) else values, device, dtype)


def free_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that new tensors can take: what is free, and what PyTorch keeps of freed tensors."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...] | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a cached inference tensor could not be used in training
        return torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def arange(length: int, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """0, 1, ..., length - 1, one copy per device. Never modify it in place."""
    with torch.inference_mode(False):
        return torch.arange(length, dtype=dtype, device=device)
