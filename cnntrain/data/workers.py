"""Worker processes that decode batches in a given order."""

import atexit
import errno
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.files import BadFile, raise_if_bad
from cnntrain.errors import CnntrainError, MachineError, UserError
from cnntrain.memory import give_back_freed_memory

Transform = Callable[[Tensor, int], Tensor]  # (uint8 (C, H, W), position in the epoch) -> uint8 (C, H, W)
# Rows of a batch, their positions, and the transform. Lists, because a tensor would need a socket.
Request = tuple[list[int], list[int], Transform | None]
TICK_S = 1.0


class WorkerPool:
    """Decode batches ahead of time in `workers` processes; with 0 workers, on demand in this process."""

    def __init__(self, examples: Examples, workers: int, timeout_s: int, pin_memory: bool, with_matrices: bool) -> None:
        self.loader: Any = None  # in case DataLoader raises an error: __del__ closes the loader
        self.sampler = _RequestSampler()
        self.timeout_s = timeout_s
        # DataLoader's own `timeout` is not used: it includes time in which the run is suspended (Ctrl-Z).
        options: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 4}
        self.loader = DataLoader(
            _RequestDataset(examples, with_matrices),
            batch_size=None,  # a request is a whole batch
            sampler=self.sampler,
            num_workers=workers,
            collate_fn=_identity,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
            # The iterator draws a seed, by default from the global generator.
            generator=torch.Generator(),
            **(options if workers else {}),
        )
        # Workers ignore SIGTERM, which multiprocessing sends at exit; without this handler, the exit would hang.
        atexit.register(_close, weakref.ref(self))

    def run(self, requests: list[Request]) -> Iterator[dict[str, Tensor]]:
        """Yield one dictionary per request: 'images' (M, C, H, W), 'source_to_image' if requested, and lazy targets."""
        self.sampler.requests = requests
        watchdog = _Watchdog(self.loader, self.timeout_s)
        # Free unused memory before the fork; workers would inherit it.
        if getattr(self.loader, "_iterator", None) is None:
            give_back_freed_memory()
        try:
            with watchdog:
                for batch in self.loader:
                    # Errors are returned as values, because torch would add the worker's traceback.
                    if isinstance(batch, CnntrainError):
                        raise batch
                    with watchdog.paused():
                        yield batch
        except (RuntimeError, OSError, EOFError) as error:
            explained = _stuck(self.timeout_s) if watchdog.expired else explain_worker_error(error)
            if explained is None:
                raise
            self.close(kill=True)
            raise explained from error

    def close(self, kill: bool = False) -> None:
        """End the processes; with `kill`, without waiting for a process that may be stuck."""
        if self.loader is None:
            return
        iterator, self.loader._iterator = getattr(self.loader, "_iterator", None), None
        if not isinstance(iterator, _MultiProcessingDataLoaderIter):
            return
        if not kill:
            with suppress(RuntimeError):
                iterator._shutdown_workers()
        for process in iterator._workers:
            if process.is_alive():
                with suppress(RuntimeError):  # torch may raise an error about a dead child at any point
                    process.kill()
                    process.join()
        with suppress(RuntimeError):
            iterator._shutdown_workers()

    def __del__(self) -> None:
        self.close()


class _Watchdog:
    """Kill the workers if no batch arrives for `timeout_s`, so that the run ends with an error.

    Time is counted in steps of one second. A suspension of this process (Ctrl-Z, SIGSTOP, a sleeping laptop) counts as
    a single step, because its workers did not run either.
    """

    def __init__(self, loader: DataLoader[Any], timeout_s: int) -> None:
        self.loader = loader
        self.limit_s = float(timeout_s)
        self.waiting = False
        self.waited_s = 0.0
        self.ended = threading.Event()
        self.expired = False
        self.thread = threading.Thread(target=self._watch, daemon=True, name="cnntrain-workers")

    def __enter__(self) -> None:
        self.waiting = True
        if self.loader.num_workers:
            self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.ended.set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time inside the `with` block."""
        self.waiting = False
        yield
        self.waited_s = 0.0
        self.waiting = True

    def _watch(self) -> None:
        before = time.monotonic()
        while not self.ended.wait(TICK_S):
            now = time.monotonic()
            self.waited_s = self.waited_s + min(now - before, TICK_S) if self.waiting else 0.0
            before = now
            if self.waited_s > self.limit_s:
                self.expired = True
                for process in getattr(self.loader._iterator, "_workers", []):
                    process.kill()
                return


def _stuck(timeout_s: int) -> MachineError:
    return MachineError(
        f"data: no batch for {timeout_s} s; a worker is stuck or the disk is very slow; increase data.timeout_s, or "
        "decode in the main process with data.workers=0"
    )


def explain_worker_error(error: Exception) -> MachineError | None:
    """Convert an error of torch or multiprocessing that was caused by a worker; return None for other errors.

    torch raises an error about a dead worker at any point of the main process, not only where it waits for a batch.
    """
    text = str(error)
    out_of_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM)
    if out_of_space or "shared memory" in text or "shm" in text or "Bus error" in text:
        return MachineError(
            "data: the workers ran out of shared memory (/dev/shm); increase it (docker run --shm-size=2g), lower "
            "batch_size, or set data.workers=0"
        )
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return MachineError("data: too many open files; raise the limit (ulimit -n 65536) or lower data.workers")
    # Batches are received through a socket, which is closed if the worker dies.
    lost = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
    if lost or "DataLoader worker" in text:
        reason = text.splitlines()[0] if text else type(error).__name__
        return MachineError(
            f"data: a worker process died ({reason}), possibly because memory ran out; lower data.workers"
        )
    return None


def _close(pool: "weakref.ref[WorkerPool]") -> None:
    if (alive := pool()) is not None:
        alive.close()


class _RequestSampler:
    """Yield the requests of the next pass."""

    requests: Sequence[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


class _RequestDataset(Dataset[Any]):
    """Return the decoded batch of a request, or the error that lists its bad files."""

    def __init__(self, examples: Examples, with_matrices: bool) -> None:
        self.images = examples.images
        self.lazy_targets = examples.lazy_targets
        self.with_matrices = with_matrices

    def __getitem__(self, request: Request) -> dict[str, Tensor] | UserError | MachineError:
        try:
            batch = self._decode(*request)
            if get_worker_info() is not None:
                # Allocate shared memory here: the sender thread would only print the error and drop the batch.
                for tensor in batch.values():
                    tensor.share_memory_()
            return batch
        except UserError as error:
            return error
        except RuntimeError as error:
            explained = explain_worker_error(error)
            if explained is None:
                raise
            return explained

    def _decode(self, rows: list[int], positions: list[int], transform: Transform | None) -> dict[str, Tensor]:
        bad: list[BadFile] = []
        batch: dict[str, Tensor] = {}
        if isinstance(self.images, LazyImages):
            images, matrices = _read(self.images, rows, bad)
            if self.with_matrices:
                batch["source_to_image"] = matrices
        else:
            images = self.images[torch.tensor(rows)]
        for name, lazy in self.lazy_targets.items():
            batch[name] = _read(lazy, rows, bad)[0]
        raise_if_bad(bad, len(rows))
        if transform is not None:
            images = torch.stack([transform(image, p) for image, p in zip(images, positions, strict=True)])
        return {"images": images, **batch}


def _read(lazy: LazyImages, rows: list[int], bad: list[BadFile]) -> tuple[Tensor, Tensor]:
    images = torch.zeros((len(rows), *lazy.shape[1:]), dtype=torch.uint8)
    matrices = torch.zeros(len(rows), 3, 3, dtype=torch.float64)
    for i, row in enumerate(rows):
        try:
            images[i], matrices[i] = lazy.read(row)
        except BadFile as problem:
            bad.append(problem)
    return images, matrices


def _identity(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # These signals are sent to the whole process group; the main process decides what to do.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _excepthook


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Suppress connection errors of a sender thread after the main process has closed the connection."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
