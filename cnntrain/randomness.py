"""Randomness as a function: every draw is a hash of (seed, epoch, position, name), never a generator's state.

The hash is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014), used as a
counter-based generator on the CPU, so that numbers do not depend on batch size, device or rank.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_WORD = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(value: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's finalizer, which spreads each bit over all 64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_FIRST)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_SECOND)
    return value ^ (value >> np.uint64(31))


def _chain(*parts: int | str) -> int:
    """Hash `parts` to 64 bits, in Python integers, which are ten times as fast as NumPy's for single numbers."""
    state = 0
    for part in parts:
        word = zlib.crc32(part.encode()) if isinstance(part, str) else part & _WORD
        state = ((state ^ word) + _GOLDEN) & _WORD
        state = ((state ^ (state >> 30)) * _FIRST) & _WORD
        state = ((state ^ (state >> 27)) * _SECOND) & _WORD
        state ^= state >> 31
    return state


def hash_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends only on `parts` and their order."""
    return _chain(*parts) >> 1


def seed_generators(seed: int) -> None:
    """Seed torch's generators, on the devices that are in use.

    `torch.manual_seed` remembers each call, with its traceback, for every device that has not been used yet: a
    millisecond, and memory that only grows.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def seed_all(*parts: int | str) -> None:
    """Seed torch's generators (initial weights, dropout) with a hash of `parts`."""
    seed_generators(hash_seed(*parts))


@contextmanager
def fork_generators(device: torch.device) -> Iterator[None]:
    """Restore torch's random generators of the CPU and of `device` (not of other GPUs) at the end of the context."""
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


def uniform(seed: int, epoch: int, positions: Tensor, name: str, count: int) -> Tensor:
    """Return random numbers for N images: (N, count) float64, uniform in [0, 1).

    Args:
        positions: (N,) int64, each image's position in the epoch.
        name: name of the augmentation; numbers for different names are independent.
        count: numbers per image; the first ones do not depend on it.
    """
    base, golden = np.uint64(_chain(seed, epoch, name)), np.uint64(_GOLDEN)
    per_image = _mix((positions.cpu().numpy().astype(np.uint64) ^ base) + golden)  # (N,)
    steps = np.arange(1, count + 1, dtype=np.uint64) * golden
    words = _mix(per_image[:, None] + steps[None, :])  # (N, count)
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """Return the order of the examples in an epoch: (count,) int64, a permutation."""
    generator = torch.Generator().manual_seed(hash_seed(seed, epoch, "order"))
    return torch.randperm(count, generator=generator)
