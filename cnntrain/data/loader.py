"""Batches out of examples: an index into one tensor when they are in memory, worker processes when not."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from cnntrain.data import cache as resident
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.share import WHOLE, BatchShard
from cnntrain.data.workers import Transform, WorkerPool
from cnntrain.transfer import free_bytes, to_device
from cnntrain.types import Batch

CacheMode = Literal["auto", "gpu", "ram", "disk", "none"]
SHARE_OF_DEVICE = 0.4  # of the free device memory that images may take
logger = logging.getLogger("cnntrain")


class Loader(ABC):
    """Gives batches of one split in whatever order it is told; draws nothing at random itself.

    Attributes:
        is_cached: whether its images are decoded, so that a batch costs next to nothing.
    """

    is_cached = False

    def __init__(self, examples: Examples, device: torch.device) -> None:
        self.examples = examples
        self.device = device
        # Masks are as large as images, and stay where these are.
        self.targets = {k: v if k == "mask" else v.to(device) for k, v in examples.targets.items()}
        self.source_to_image = _unless_identity(examples.source_to_image)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def batches(
        self,
        order: Tensor,
        batch_size: int,
        start_batch: int = 0,
        drop_last: bool = False,
        positions: Tensor | None = None,
        transform: Transform | None = None,
        share: BatchShard = WHOLE,
    ) -> Iterator[Batch]:
        """The batches of one pass, images uint8 on the device.

        Args:
            order: (M,) int64, rows in the order in which they come.
            start_batch: how many batches to leave out at the beginning; they cost nothing.
            drop_last: leave out a last batch that is smaller.
            positions: (M,) int64, places in the epoch where they are not 0, 1, ..., M - 1 (one process of
                several).
            transform: called as `transform(image, position)` for every image where it is decoded; only a
                streaming loader takes one (see `make_loader`), and it must pickle.
            share: this process's part of each batch, which may be empty; `batch_size` is that of all processes
                together.

        Raises:
            UserError: an image that is read now can't be used.
            MachineError: a worker was lost, got stuck, or has no shared memory.
        """
        count = len(order)
        positions = torch.arange(count) if positions is None else positions
        stop = count - count % batch_size if drop_last else count
        starts = range(start_batch * batch_size, stop, batch_size)
        chunks = [slice(start, min(start + batch_size, stop)) for start in starts]
        if share == WHOLE or not chunks:
            yield from self._batches(order, positions, chunks, transform)
            return
        rows = [share.rows(chunk.start, chunk.stop) for chunk in chunks]
        filled, mine = [len(each) for each in rows if len(each)], torch.cat(rows)
        ends = list(accumulate(filled))
        chunks = [slice(end - length, end) for end, length in zip(ends, filled, strict=True)]
        yield from self._batches(order[mine], positions[mine], chunks, transform)
        nothing = torch.zeros(0, dtype=torch.int64)
        for _ in range(len(rows) - len(filled)):  # only the last batch can be too short to go round
            yield Batch(torch.zeros(0, device=self.device), {}, nothing, nothing)

    @abstractmethod
    def _batches(
        self, order: Tensor, positions: Tensor, chunks: list[slice], transform: Transform | None
    ) -> Iterator[Batch]: ...

    def close(self) -> None:  # noqa: B027  most loaders have nothing to close
        """End worker processes, if there are any."""


class ResidentLoader(Loader):
    """Images in memory, on the device itself or beside it; a batch is one index operation."""

    is_cached = True

    def __init__(self, examples: Examples, device: torch.device, on_device: bool) -> None:
        super().__init__(examples, device)
        assert isinstance(examples.images, Tensor)
        self.images: Tensor = examples.images.to(device) if on_device else examples.images
        if on_device:
            self.targets = {name: target.to(device) for name, target in self.targets.items()}

    def _batches(
        self, order: Tensor, positions: Tensor, chunks: list[slice], transform: Transform | None
    ) -> Iterator[Batch]:
        assert transform is None, "images in memory are transformed batch by batch"
        order_there = to_device(order, self.device)  # once a pass
        for chunk in chunks:
            rows, rows_there = order[chunk], order_there[chunk]
            images = _pick(self.images, rows, rows_there)
            targets = {name: _pick(target, rows, rows_there) for name, target in self.targets.items()}
            matrices = None if self.source_to_image is None else self.source_to_image[rows]
            yield Batch(images, targets, rows, positions[chunk], matrices)


def _pick(held: Tensor, rows: Tensor, rows_there: Tensor) -> Tensor:
    """Rows, brought to the device, of what is held there or on the host; `rows_there` are on the device."""
    if held.device == rows_there.device:
        return held.index_select(0, rows_there)
    picked = held.index_select(0, rows)
    picked = picked.pin_memory() if rows_there.device.type == "cuda" else picked
    return picked.to(rows_there.device, non_blocking=True)


class StreamLoader(Loader):
    """Images on disk, decoded by worker processes; the same batches for any number of them.

    One pass at a time: beginning another ends the one before.
    """

    def __init__(self, examples: Examples, device: torch.device, workers: int, timeout_s: int) -> None:
        super().__init__(examples, device)
        pin = device.type == "cuda"
        self.pool = WorkerPool(examples, workers, timeout_s, pin, self.source_to_image is None)

    def _batches(
        self, order: Tensor, positions: Tensor, chunks: list[slice], transform: Transform | None
    ) -> Iterator[Batch]:
        order_there = to_device(order, self.device)  # once a pass
        requests = [(order[chunk].tolist(), positions[chunk].tolist(), transform) for chunk in chunks]
        for chunk, got in zip(chunks, self.pool.run(requests), strict=True):
            rows = order[chunk]
            images = got.pop("images").to(self.device, non_blocking=True)
            matrices = got.pop("source_to_image", None)
            if self.source_to_image is not None:
                matrices = self.source_to_image[rows]
            targets = {name: _pick(target, rows, order_there[chunk]) for name, target in self.targets.items()}
            targets |= {name: target.to(self.device, non_blocking=True) for name, target in got.items()}
            yield Batch(images, targets, rows, positions[chunk], matrices)

    def close(self) -> None:
        self.pool.close()


def make_loader(
    examples: Examples,
    device: torch.device | str,
    workers: int = 0,
    timeout_s: int = 120,
    cache: CacheMode = "auto",
    per_sample: bool = False,
) -> Loader:
    """The loader that suits where the examples are.

    Args:
        workers: processes that decode what is not in memory; 0 decodes in this one.
        timeout_s: how long a batch may take before its worker counts as stuck.
        cache: 'gpu', 'ram' and 'disk' hold decoded images there, 'none' sends even those through workers,
            'auto' leaves images where they are and takes the device when they fit.
        per_sample: a transform will be given for every image by itself: implies 'none'.

    Raises:
        UserError: images that must be decoded now can't be used.
    """
    device = torch.device(device)
    if cache == "none" or per_sample or (cache == "auto" and isinstance(examples.images, LazyImages)):
        return StreamLoader(examples, device, workers, timeout_s)
    if isinstance(examples.images, LazyImages) or examples.lazy_targets:
        examples = resident.decode({"examples": examples})["examples"]
    on_device = cache == "gpu" or (cache == "auto" and _fits_on(device, examples))
    return ResidentLoader(examples, device, on_device)


def _fits_on(device: torch.device, examples: Examples) -> bool:
    if device.type != "cuda":
        return True
    return resident.decoded_bytes(examples) <= SHARE_OF_DEVICE * free_bytes(device)


def _unless_identity(matrices: Tensor | None) -> Tensor | None:
    if matrices is None or torch.equal(matrices, torch.eye(3, dtype=matrices.dtype).expand_as(matrices)):
        return None
    return matrices
