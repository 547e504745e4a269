"""Memory on the host: what one step frees is kept for the next, and nothing is searched that holds no garbage."""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, instead of giving it back to the system, for the rest of this process.

    By default glibc maps large blocks one by one, and gives back what is free at the end of its heap. Every step then
    gets its activations as pages that the system first fills with zeros: 3,000 to 280,000 page faults a step, up to a
    third of the time of a training on the CPU (`benchmarks/heap.py`). A process stays as large as it once was, until
    `give_back_freed_memory`.
    Elsewhere than on Linux with glibc this does nothing.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(M_TRIM_THRESHOLD, -1)  # give back none of the heap
        mallopt(M_MMAP_MAX, 0)  # and keep every block in it, large ones too


def give_back_freed_memory() -> None:
    """Once, where it would be counted as taken, or copied by a process that is forked."""
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's search for garbage put off: lists with an entry for every example would be searched time and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _of_glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
