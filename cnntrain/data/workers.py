"""Worker processes that decode images, driven by an order that is given from outside."""

import atexit
import errno
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.image_reader import BadFile, refuse
from cnntrain.errors import CnntrainError, MachineError, UserError
from cnntrain.memory import give_back_freed_memory

Transform = Callable[[Tensor, int], Tensor]  # (uint8 (C,H,W), position in the epoch) -> uint8 (C,H,W)
# Rows of a batch, their positions, what to do to each image. Lists, for a tensor would need a socket.
Request = tuple[list[int], list[int], Transform | None]
TICK_S = 1.0


class WorkerPool:
    """Decodes batches ahead of time, in `workers` processes (0: in this one, when asked)."""

    def __init__(
        self,
        examples: Examples,
        workers: int,
        timeout_s: int,
        pin_memory: bool,
        with_matrices: bool,
    ) -> None:
        self.requests = _Requests()
        self.timeout_s = timeout_s
        # DataLoader's own `timeout` is not used: it includes time in which the run is suspended (Ctrl-Z).
        options: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 4}
        self.loader = DataLoader(
            _Decoded(examples, with_matrices),
            batch_size=None,  # a request is a whole batch
            sampler=self.requests,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
            # its iterator draws a seed: from the global generator, if it were not given one
            generator=torch.Generator(),
            **(options if workers else {}),
        )
        # Workers ignore SIGTERM, with which multiprocessing would end them at exit, and wait for ever.
        atexit.register(_close, weakref.ref(self))

    def run(self, requests: list[Request]) -> Iterator[dict[str, Tensor]]:
        """One dictionary a request: 'images' (M, C, H, W), 'source_to_image' where asked for, lazy targets by name.

        Raises:
            UserError: images that can't be used, all of the batch's.
            MachineError: a worker was lost, got stuck, or has no shared memory.
        """
        self.requests.waiting = requests
        patience = _Patience(self.loader, self.timeout_s)
        # Workers that begin now are forks, and would hold it to their end.
        if getattr(self.loader, "_iterator", None) is None:
            give_back_freed_memory()
        try:
            with patience:
                for got in self.loader:
                    if isinstance(got, CnntrainError):  # as a value: torch would add the worker's traceback
                        raise got
                    with patience.suspended():
                        yield got
        except (RuntimeError, OSError, EOFError) as error:
            known = _stuck(self.timeout_s) if patience.lost else explain_worker_error(error, self.timeout_s)
            if known is None:
                raise
            self.close(kill=True)
            raise known from error

    def close(self, kill: bool = False) -> None:
        """End the processes; `kill` does not wait for one that may be stuck."""
        iterator, self.loader._iterator = getattr(self.loader, "_iterator", None), None
        if not isinstance(iterator, _MultiProcessingDataLoaderIter):
            return
        if not kill:
            with suppress(RuntimeError):
                iterator._shutdown_workers()
        for process in iterator._workers:
            if process.is_alive():
                with suppress(RuntimeError):  # torch notices a dead child wherever we are, and raises
                    process.kill()
                    process.join()
        with suppress(RuntimeError):
            iterator._shutdown_workers()

    def __del__(self) -> None:
        self.close()


class _Patience:
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
        self.lost = False
        self.thread = threading.Thread(target=self._watch, daemon=True, name="cnntrain-workers")

    def __enter__(self) -> None:
        self.waiting = True
        if self.loader.num_workers:
            self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.ended.set()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Nobody waits for the workers inside."""
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
                self.lost = True
                for process in getattr(self.loader._iterator, "_workers", []):
                    process.kill()
                return


def _stuck(timeout_s: int) -> MachineError:
    return MachineError(
        f"data: no batch for {timeout_s} s, a worker is stuck or the disk is very slow; raise "
        "data.timeout_s, or decode in the main process with data.workers=0"
    )


def explain_worker_error(error: Exception, timeout_s: int) -> MachineError | None:
    """What an error of torch's or of multiprocessing's means when it is about workers, else None.

    A worker's death is raised wherever the main process happens to be, not only where it waits for a batch.
    """
    text = str(error)
    if "DataLoader timed out" in text:
        return _stuck(timeout_s)
    out_of_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM)
    if out_of_space or "shared memory" in text or "shm" in text or "Bus error" in text:
        return MachineError(
            "data: the workers ran out of shared memory (/dev/shm); make it larger (docker run "
            "--shm-size=2g), lower batch_size, or set data.workers=0"
        )
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return MachineError(
            "data: too many open files; raise the limit (ulimit -n 65536) or lower data.workers"
        )
    # A batch is fetched from its worker through a socket: gone with the worker.
    lost = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
    if lost or "DataLoader worker" in text:
        died = text.splitlines()[0] if text else type(error).__name__
        return MachineError(
            f"data: a worker process died ({died}); perhaps for want of memory: lower data.workers"
        )
    return None


def _close(pool: "weakref.ref[WorkerPool]") -> None:
    alive = pool()
    if alive is not None:
        alive.close()


class _Requests(Sampler[Request]):
    """The requests of the pass that begins next."""

    def __init__(self) -> None:
        self.waiting: list[Request] = []

    def __iter__(self) -> Iterator[Request]:
        return iter(self.waiting)

    def __len__(self) -> int:
        return len(self.waiting)


class _Decoded(Dataset[Any]):
    """From a request to its decoded batch, or to the error that names its files that can't be used."""

    def __init__(self, examples: Examples, with_matrices: bool) -> None:
        self.images = examples.images
        self.lazy_targets = examples.lazy_targets
        self.with_matrices = with_matrices

    def __getitem__(self, request: Request) -> dict[str, Tensor] | UserError | MachineError:
        try:
            batch = self._decode(*request)
            if (
                get_worker_info() is not None
            ):  # here, for the thread that sends it would print an error and drop it
                for tensor in batch.values():
                    tensor.share_memory_()
            return batch
        except UserError as error:
            return error
        except RuntimeError as error:
            known = explain_worker_error(error, 0)
            if known is None:
                raise
            return known

    def _decode(
        self, rows: list[int], positions: list[int], transform: Transform | None
    ) -> dict[str, Tensor]:
        bad: list[BadFile] = []
        result: dict[str, Tensor] = {}
        if isinstance(self.images, LazyImages):
            images, matrices = _read(self.images, rows, bad)
            if self.with_matrices:
                result["source_to_image"] = matrices
        else:
            images = self.images[torch.tensor(rows)]
        for name, lazy in self.lazy_targets.items():
            result[name] = _read(lazy, rows, bad)[0]
        refuse(bad, len(rows))
        if transform is not None:
            images = torch.stack([transform(image, p) for image, p in zip(images, positions, strict=True)])
        return {"images": images, **result}


def _read(lazy: LazyImages, rows: list[int], bad: list[BadFile]) -> tuple[Tensor, Tensor]:
    images = torch.zeros((len(rows), *lazy.shape[1:]), dtype=torch.uint8)
    matrices = torch.zeros(len(rows), 3, 3, dtype=torch.float64)
    for place, row in enumerate(rows):
        try:
            images[place], matrices[place] = lazy.read(row)
        except BadFile as problem:
            bad.append(problem)
    return images, matrices


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Sent to the whole group: the main process decides what to do.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _say_unless_left_alone


def _say_unless_left_alone(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """A thread of a worker hands batches over: when the main process gives up in between, that is no news."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
