"""Memory: settings of the C allocator, free and peak memory, and Python's garbage collector."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for reuse, instead of returning it to the system.

    By default glibc maps each large block separately, and returns the free memory at the end of its heap. The
    activations of every step are then new pages, which the system fills with zeros: 3,000 to 280,000 page faults per
    step, up to a third of the time of a training on the CPU (`benchmarks/allocator.py`). The process keeps its peak
    size until `give_back_freed_memory`.
    Has no effect except on Linux with glibc.
    """
    if mallopt := _glibc_function("mallopt"):
        mallopt(M_TRIM_THRESHOLD, -1)  # keep the whole heap
        mallopt(M_MMAP_MAX, 0)  # allocate large blocks in the heap as well


def give_back_freed_memory() -> None:
    """Return freed memory to the system once, before it is measured or before a fork, which would copy it."""
    if malloc_trim := _glibc_function("malloc_trim"):
        malloc_trim(0)


def _glibc_function(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


@contextmanager
def without_collector() -> Iterator[None]:
    """Disable the garbage collector, which would search growing lists with one entry per example repeatedly."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def free_host_bytes() -> int:
    """Return the memory that this process may still allocate: of the machine, and of its control groups."""
    give_back_freed_memory()
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    return min([*limits, *_control_group_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _control_group_limits(membership: Path, tree: Path) -> Iterator[int]:
    """Yield the free bytes of this process's control groups and their parents (man 7 cgroups).

    Args:
        membership: file that lists the groups. In a container it may name a group that is not in `tree`, but its
            parents are.
    """
    lines = membership.read_text().splitlines() if membership.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        version_1 = bool(controllers)
        names = ("memory.max", "memory.current")
        if version_1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        prefix = "total_" if version_1 else ""
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            group = (tree / controllers).joinpath(*parts[:depth])
            try:
                limit, used = [(group / name).read_text().strip() for name in names]
                counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            # Page cache counts as used, but is freed on demand.
            page_cache = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            if limit.isdigit() and used.isdigit():
                yield max(0, int(limit) - int(used) + page_cache)


def reset_peak_memory(device: "torch.device") -> None:
    """Release unused memory and restart the measurement of `peak_memory_mib`."""
    gc.collect()
    give_back_freed_memory()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # without write access the peak counts from the start of the process
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def peak_memory_mib(device: "torch.device") -> float:
    """Return the peak memory since `reset_peak_memory`: allocated by torch on a GPU, resident set size on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
