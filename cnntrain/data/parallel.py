"""Files read by all cores: by threads, or where there are many by processes, which do not wait for one another."""

import mmap
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from cnntrain.data.examples import LazyImages
from cnntrain.data.image_reader import BadFile
from cnntrain.errors import MachineError

T = TypeVar("T")
R = TypeVar("R")
MANY = 2_000  # files: to decode fewer takes a second
AT_ONCE = 256  # items between two movements of the bar


def decode_into(
    images: Tensor,
    matrices: Tensor,
    lazy: LazyImages,
    what: str,
    also: Callable[[int], None] = lambda index: None,
) -> list[BadFile]:
    """Decode every file; what can't be used stays as it was, and is returned.

    Args:
        images, matrices: uint8, of the shape of `lazy`, and (N, 3, 3); both in memory that processes share
            (`shared_zeros`, or a mapped file).
        what: what a bar on the terminal calls it.
        also: called with the index of each decoded file, in the process that decoded it.

    Raises:
        MachineError: a process died.
    """
    pixels, source_to_image = images.numpy(), matrices.numpy()

    def one(index: int) -> BadFile | None:
        try:
            decoded, matrix = lazy.read(index)
            pixels[index], source_to_image[index] = decoded.numpy(), matrix.numpy()
            also(index)
        except BadFile as problem:
            return problem
        return None

    ours = type(lazy.decoder).__module__.startswith("cnntrain.")  # others' may not be made for it
    by_processes = len(lazy) >= MANY and ours and sys.platform == "linux" and usable_cores() > 1
    results = in_processes(one, len(lazy), what) if by_processes else in_threads(one, range(len(lazy)), what)
    return [problem for problem in results if problem]


def shared_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that processes forked from this one write to as well; bound by the memory, not by /dev/shm."""
    count = max(1, torch.Size(shape).numel())
    memory = mmap.mmap(-1, count * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype)[: torch.Size(shape).numel()].view(tuple(shape))


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(work: Callable[[T], R], items: Sequence[T], what: str = "") -> list[R]:
    """`work` of each item, by as many threads as there are cores.

    Args:
        what: what a bar on the terminal calls it; none is drawn without.
    """
    done: list[R] = []
    pool = ThreadPoolExecutor(usable_cores())
    try:
        with _bar(what, len(items)) as advance:
            for start in range(0, len(items), AT_ONCE):
                part = list(pool.map(work, items[start : start + AT_ONCE]))
                done += part
                advance(len(part))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for what has not begun
    return done


def in_processes(work: Callable[[int], R], count: int, what: str = "") -> list[R]:
    """What `work` returns for 0 ... count - 1 where that is not None, in no order, by as many processes as there are
    cores.

    They are forked: `work` needs no pickling, and what it writes elsewhere than into shared memory is lost.

    Raises:
        MachineError: a process died.
    """
    context = multiprocessing.get_context("fork")
    cores, found = usable_cores(), []
    running: dict[Connection, BaseProcess] = {}
    try:
        for core in range(cores):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_in_child, args=(work, count, core, cores, theirs, os.getpid()))
            process.start()
            theirs.close()
            running[ours] = process
        with _bar(what, count) as advance:
            waiting = list(running)
            while waiting:
                for end in wait(waiting):
                    assert isinstance(end, Connection)
                    try:
                        done, part = end.recv()
                    except EOFError:
                        waiting.remove(end)
                        _join(running[end])
                        continue
                    found += part
                    advance(done)
    finally:
        for end, process in running.items():
            process.kill()
            process.join()
            end.close()
    return found


def _in_child(
    work: Callable[[int], R], count: int, core: int, cores: int, end: Connection, parent: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent to the group: the parent ends its children
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    for start in range(core * AT_ONCE, count, cores * AT_ONCE):
        if os.getppid() != parent:
            return
        items = range(start, min(start + AT_ONCE, count))
        end.send((len(items), [result for item in items if (result := work(item)) is not None]))
    end.close()


def _join(process: BaseProcess) -> None:
    process.join()
    if process.exitcode:
        raise MachineError(
            f"data: a process that decodes images ended with {process.exitcode}; perhaps for want of memory"
        )


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, moved by calling it; none without a terminal or a name."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (what and console.is_terminal)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)
