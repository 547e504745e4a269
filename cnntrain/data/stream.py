"""Worker processes that decode images, driven by an order that is given from outside."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cnntrain.data.decode import BadFile, refuse
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.errors import MachineError
from cnntrain.randomness import hash_seed

Request = tuple[Tensor, Tensor, int]  # rows (M,), positions in the epoch (M,), the epoch's seed
Transform = Callable[
    [Tensor, int], Tensor
]  # (uint8 (C,H,W), seed of this image in this epoch) -> uint8 (C,H,W)


class WorkerPool:
    """Decodes batches ahead of time, in `workers` processes (0: in this one, when asked)."""

    def __init__(
        self,
        examples: Examples,
        workers: int,
        timeout_s: int,
        transform: Transform | None,
        pin_memory: bool,
        with_matrices: bool,
    ) -> None:
        self.requests = _Requests()
        self.timeout_s = timeout_s
        options: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 4, "timeout": timeout_s}
        self.loader = DataLoader(
            _Decoded(examples, transform, with_matrices),
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

    def run(self, requests: list[Request]) -> Iterator[dict[str, Tensor]]:
        """One dictionary a request: 'images' (M, C, H, W), 'to_canvas' where asked for, lazy targets by name.

        Raises:
            UserError: images that can't be used, all of the batch's.
            MachineError: a worker was lost, got stuck, or has no shared memory.
        """
        self.requests.waiting = requests
        try:
            for got in self.loader:
                if isinstance(got, list):
                    refuse(got, len(got))
                yield got
        except RuntimeError as error:
            known = explain_worker_error(error, self.timeout_s)
            if known is None:
                raise
            self.close()
            raise known from error

    def close(self) -> None:
        """End the processes, stuck ones too."""
        iterator = getattr(self.loader, "_iterator", None)
        for process in getattr(iterator, "_workers", []):
            process.kill()
        self.loader._iterator = None


def explain_worker_error(error: RuntimeError, timeout_s: int) -> MachineError | None:
    """What a RuntimeError of torch's means when it is about workers, else None.

    A worker's death is raised wherever the main process happens to be, not only where it waits for a batch.
    """
    text = str(error)
    if "DataLoader timed out" in text:
        return MachineError(
            f"data: no batch for {timeout_s} s, a worker is stuck or the disk is very slow; raise "
            "data.timeout_s, or decode in the main process with data.workers=0"
        )
    if "shared memory" in text or "shm" in text or "Bus error" in text:
        return MachineError(
            "data: the workers ran out of shared memory (/dev/shm); make it larger (docker run "
            "--shm-size=2g), lower batch_size, or set data.workers=0"
        )
    if "DataLoader worker" in text:
        return MachineError(
            f"data: a worker process died ({text.splitlines()[0]}); perhaps for want of memory: lower data.workers"
        )
    return None


class _Requests(Sampler[Request]):
    """The requests of the pass that begins next."""

    def __init__(self) -> None:
        self.waiting: list[Request] = []

    def __iter__(self) -> Iterator[Request]:
        return iter(self.waiting)

    def __len__(self) -> int:
        return len(self.waiting)


class _Decoded(Dataset[Any]):
    """From a request to its decoded batch, or to the list of its files that can't be used."""

    def __init__(self, examples: Examples, transform: Transform | None, with_matrices: bool) -> None:
        self.images = examples.images
        self.lazy_targets = examples.lazy_targets
        self.transform = transform
        self.with_matrices = with_matrices

    def __getitem__(self, request: Request) -> dict[str, Tensor] | list[BadFile]:
        rows, positions, seed = request
        bad: list[BadFile] = []
        result: dict[str, Tensor] = {}
        if isinstance(self.images, LazyImages):
            images, matrices = _read(self.images, rows, bad)
            if self.with_matrices:
                result["to_canvas"] = matrices
        else:
            images = self.images[rows]
        for name, lazy in self.lazy_targets.items():
            result[name] = _read(lazy, rows, bad)[0]
        if bad:
            return bad
        if self.transform is not None:
            seeds = [hash_seed(seed, position) for position in positions.tolist()]
            images = torch.stack([self.transform(image, s) for image, s in zip(images, seeds, strict=True)])
        return {"images": images, **result}


def _read(lazy: LazyImages, rows: Tensor, bad: list[BadFile]) -> tuple[Tensor, Tensor]:
    images = torch.zeros((len(rows), *lazy.shape[1:]), dtype=torch.uint8)
    matrices = torch.zeros(len(rows), 3, 3, dtype=torch.float64)
    for place, row in enumerate(rows.tolist()):
        try:
            images[place], matrices[place] = lazy.read(row)
        except BadFile as problem:
            bad.append(problem)
    return images, matrices


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # sent to the whole group: the main process decides what to do
        signal.signal(number, signal.SIG_IGN)
