"""Read many files on all cores: with threads, or with forked processes, which do not share the GIL."""

import mmap
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from cnntrain.data.files import BadFile
from cnntrain.data.image_reader import read_size
from cnntrain.errors import MachineError

T = TypeVar("T")
R = TypeVar("R")
MANY_FILES = 2_000  # decoding fewer files takes about a second
CHUNK_SIZE = 256  # items between two updates of the progress bar


def decode_into(
    images: Tensor,
    matrices: Tensor,
    lazy: LazyImages,
    description: str,
    on_decoded: Callable[[int], None] = lambda index: None,
) -> list[BadFile]:
    """Decode all files into existing tensors; return the bad files, whose rows are left unchanged.

    Args:
        images: uint8, of the shape of `lazy`. matrices: float64 (N, 3, 3), from source to target pixels. Both must be
            in memory that is shared with forked processes (`shared_zeros`, or a mapped file).
        description: label of the progress bar.
        on_decoded: called with the index of each decoded file, in the process that decoded it.
    """
    image_rows, matrix_rows = images.numpy(), matrices.numpy()

    def decode(index: int) -> BadFile | None:
        try:
            image, matrix = lazy.read(index)
            image_rows[index], matrix_rows[index] = image.numpy(), matrix.numpy()
            on_decoded(index)
        except BadFile as problem:
            return problem
        return None

    # A user's decoder may not support a fork.
    fork = len(lazy) >= MANY_FILES and is_builtin(lazy) and sys.platform == "linux" and usable_cores() > 1
    results = process_map(decode, len(lazy), description) if fork else thread_map(decode, range(len(lazy)), description)
    return [problem for problem in results if problem]


def is_builtin(lazy: LazyImages) -> bool:
    """Return True if the decoder is part of cnntrain."""
    return type(lazy.decoder).__module__.startswith("cnntrain.")


def read_sizes(paths: Iterable[str]) -> tuple[dict[str, tuple[int, int]], list[BadFile]]:
    """Return (width, height) of the images from their headers, without bad files; and the bad files."""
    unique = sorted(set(paths))
    sizes, bad = try_map(read_size, unique, f"reading the headers of {len(unique):,} files")
    return {path: size for path, size in zip(unique, sizes, strict=True) if size}, bad


def shared_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros that are shared with processes forked later; limited by the memory, not by /dev/shm."""
    count = torch.Size(shape).numel()
    memory = mmap.mmap(-1, max(1, count) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype)[:count].view(tuple(shape))


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_map(function: Callable[[T], R], items: Sequence[T], description: str = "") -> list[R]:
    """Return `function` of each item, computed by one thread per core; without a description, no progress bar."""
    results: list[R] = []
    pool = ThreadPoolExecutor(usable_cores())
    try:
        with _progress_bar(description, len(items)) as advance:
            for start in range(0, len(items), CHUNK_SIZE):
                chunk = list(pool.map(function, items[start : start + CHUNK_SIZE]))
                results += chunk
                advance(len(chunk))
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C, do not wait for items that have not started
    return results


def try_map(
    function: Callable[[T], R], items: Sequence[T], description: str = ""
) -> tuple[list[R | None], list[BadFile]]:
    """Return the results of `thread_map`, with None where the function raises BadFile; and these bad files."""
    bad: list[BadFile] = []

    def attempt(item: T) -> R | None:
        try:
            return function(item)
        except BadFile as problem:
            bad.append(problem)
            return None

    return thread_map(attempt, items, description), bad


def process_map(function: Callable[[int], R | None], count: int, description: str = "") -> list[R]:
    """Call `function` for 0, ..., count - 1 in one forked process per core; return the results that are not None.

    The order of the results is arbitrary. `function` need not be picklable. What it writes is lost, except in shared
    memory. A process that dies raises `MachineError`.
    """
    context = multiprocessing.get_context("fork")
    cores, results = usable_cores(), []
    processes: dict[Connection, BaseProcess] = {}
    try:
        for core in range(cores):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(function, count, core, cores, sender, os.getpid()))
            process.start()
            sender.close()
            processes[receiver] = process
        with _progress_bar(description, count) as advance:
            running = dict(processes)
            while running:
                for receiver in wait(list(running)):
                    assert isinstance(receiver, Connection)
                    try:
                        done, chunk = receiver.recv()
                    except EOFError:
                        _join(running.pop(receiver))
                        continue
                    results += chunk
                    advance(done)
    finally:
        for receiver, process in processes.items():
            process.kill()
            process.join()
            receiver.close()
    return results


def _work(
    function: Callable[[int], R | None], count: int, core: int, cores: int, sender: Connection, parent: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent to the process group; the parent ends its children
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    for start in range(core * CHUNK_SIZE, count, cores * CHUNK_SIZE):
        if os.getppid() != parent:
            return
        items = range(start, min(start + CHUNK_SIZE, count))
        sender.send((len(items), [result for item in items if (result := function(item)) is not None]))
    sender.close()


def _join(process: BaseProcess) -> None:
    process.join()
    if process.exitcode:
        raise MachineError(
            f"data: a decoding process died with exit code {process.exitcode}, possibly because memory ran out"
        )


@contextmanager
def _progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar if there is a terminal and a description; yield the function that advances it."""
    console = Console(stderr=True)
    disable = not (description and console.is_terminal)
    with Progress(console=console, transient=True, disable=disable) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.advance(task, done)
