"""Loaders that yield batches: by indexing cached images, or from worker processes that decode files."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from cnntrain.data.cache import CacheMode, decode_into_ram, fits_on_device
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.workers import Transform, WorkerPool
from cnntrain.transfer import to_device
from cnntrain.types import Batch


@dataclass(frozen=True)
class BatchShard:
    """One contiguous part of every batch, for rank `rank` of `count`.

    The parts differ by at most one image, and the longer ones come first. In validation, the last ranks may get no
    image of a short last batch; rank 0 always gets one.

    Attributes:
        with_predecessor: whether the part starts with the image before it (for the first part, the batch's last
            image): mixing blends each image with its predecessor in the batch, which may belong to another rank.
    """

    rank: int = 0
    count: int = 1
    with_predecessor: bool = False

    def slice_of(self, start: int, stop: int) -> slice:
        """Return this rank's part of the images `start` to `stop` (exclusive) of an epoch."""
        base, longer = divmod(stop - start, self.count)
        first = start + self.rank * base + min(self.rank, longer)
        return slice(first, first + base + (self.rank < longer))

    def rows(self, start: int, stop: int) -> Tensor:
        """Return (M,) int64: positions in the epoch that this rank reads for the batch `start` to `stop`."""
        part = self.slice_of(start, stop)
        rows = torch.arange(part.start, part.stop)
        if not self.with_predecessor or not len(rows):
            return rows
        before = part.start - 1 if part.start > start else stop - 1
        return torch.cat((torch.tensor([before]), rows))

    def drop_predecessor(self, batch: Batch) -> Batch:
        """Return the batch without the predecessor, once it has been mixed into its successor."""
        return batch.take(slice(1, None)) if self.with_predecessor and len(batch) else batch


WHOLE = BatchShard()


class Loader:
    """Yield batches of one split in a given order. The loader itself is deterministic."""

    is_cached = False  # True if the images are decoded, so that a batch is cheap

    def __init__(self, examples: Examples, device: torch.device) -> None:
        self.examples = examples
        self.device = device
        # Masks are as large as images, and stay in the same memory.
        self.targets = {k: v if k == "mask" else v.to(device) for k, v in examples.targets.items()}
        matrices = examples.source_to_image
        if matrices is not None and torch.equal(matrices, torch.eye(3, dtype=matrices.dtype).expand_as(matrices)):
            matrices = None
        self.source_to_image = matrices

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.examples)

    def batches(
        self,
        order: Tensor,
        batch_size: int,
        start_batch: int = 0,
        drop_last: bool = False,
        positions: Tensor | None = None,
        transform: Transform | None = None,
        shard: BatchShard = WHOLE,
    ) -> Iterator[Batch]:
        """Yield the batches of one pass; images are uint8 on the device.

        Args:
            order: (M,) int64, rows in the order of the pass.
            batch_size: of all ranks together.
            start_batch: number of batches to skip, without decoding them.
            drop_last: drop the last batch if it is not full.
            positions: (M,) int64, positions in the epoch; None: 0, 1, ..., M - 1.
            transform: called as `transform(image, position)` for every image in the process that decodes it; must be
                picklable. Requires a `StreamingLoader` (see `make_loader`).
            shard: this rank's part of each batch, which may be empty.

        Raises:
            UserError: an image cannot be used.
            MachineError: a worker died, is stuck, or has no shared memory.
        """
        count = len(order)
        positions = torch.arange(count) if positions is None else positions
        stop = count - count % batch_size if drop_last else count
        starts = range(start_batch * batch_size, stop, batch_size)
        chunks = [slice(start, min(start + batch_size, stop)) for start in starts]
        if shard == WHOLE or not chunks:
            yield from self._batches(order, positions, chunks, transform)
            return
        rows = [shard.rows(chunk.start, chunk.stop) for chunk in chunks]
        sizes, all_rows = [len(each) for each in rows if len(each)], torch.cat(rows)
        chunks = [slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]
        yield from self._batches(order[all_rows], positions[all_rows], chunks, transform)
        empty = torch.zeros(0, dtype=torch.int64)
        for _ in range(len(rows) - len(sizes)):  # only the last batch can have fewer images than ranks
            yield Batch(torch.zeros(0, device=self.device), {}, empty, empty)

    def _batches(
        self, order: Tensor, positions: Tensor, chunks: list[slice], transform: Transform | None
    ) -> Iterator[Batch]:
        device_order = to_device(order, self.device)  # once per pass
        parts = self._read(order, device_order, positions, chunks, transform)
        for chunk, part in zip(chunks, parts, strict=True):
            rows, matrices = order[chunk], part.pop("source_to_image", None)
            if self.source_to_image is not None:
                matrices = self.source_to_image[rows]
            targets = {name: _select(target, rows, device_order[chunk]) for name, target in self.targets.items()}
            targets |= {name: tensor.to(self.device, non_blocking=True) for name, tensor in part.items()}
            yield Batch(targets.pop("images"), targets, rows, positions[chunk], matrices)

    def _read(
        self, order: Tensor, device_order: Tensor, positions: Tensor, chunks: list[slice], transform: Transform | None
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the 'images' of each chunk; of files also the decoded targets, and 'source_to_image' if unknown."""
        raise NotImplementedError

    def close(self) -> None:
        """End the worker processes, if there are any."""


class CachedLoader(Loader):
    """Images in device or host memory; a batch is one index operation."""

    is_cached = True

    def __init__(self, examples: Examples, device: torch.device, on_device: bool) -> None:
        super().__init__(examples, device)
        assert isinstance(examples.images, Tensor)
        self.images: Tensor = examples.images.to(device) if on_device else examples.images
        if on_device:
            self.targets = {name: target.to(device) for name, target in self.targets.items()}

    def _read(
        self, order: Tensor, device_order: Tensor, positions: Tensor, chunks: list[slice], transform: Transform | None
    ) -> Iterator[dict[str, Tensor]]:
        assert transform is None, "cached images are transformed in batches"
        for chunk in chunks:
            yield {"images": _select(self.images, order[chunk], device_order[chunk])}


class StreamingLoader(Loader):
    """Images on disk, decoded by worker processes; the batches do not depend on the number of workers.

    Only one pass can be active: starting a pass ends the previous one.
    """

    def __init__(self, examples: Examples, device: torch.device, workers: int, timeout_s: int) -> None:
        super().__init__(examples, device)
        pin = device.type == "cuda"
        self.pool = WorkerPool(examples, workers, timeout_s, pin, self.source_to_image is None)

    def _read(
        self, order: Tensor, device_order: Tensor, positions: Tensor, chunks: list[slice], transform: Transform | None
    ) -> Iterator[dict[str, Tensor]]:
        return self.pool.run([(order[chunk].tolist(), positions[chunk].tolist(), transform) for chunk in chunks])

    def close(self) -> None:
        self.pool.close()


def _select(tensor: Tensor, rows: Tensor, device_rows: Tensor) -> Tensor:
    """Return rows of a tensor on the host or on the device, copied to the device of `device_rows`."""
    if tensor.device == device_rows.device:
        return tensor.index_select(0, device_rows)
    selected = tensor.index_select(0, rows)
    selected = selected.pin_memory() if device_rows.device.type == "cuda" else selected
    return selected.to(device_rows.device, non_blocking=True)


def make_loader(
    examples: Examples,
    device: torch.device | str,
    workers: int = 0,
    timeout_s: int = 120,
    cache: CacheMode = "auto",
    per_sample: bool = False,
) -> Loader:
    """Return a cached loader, or a streaming loader for images that stay on disk.

    Args:
        workers: number of processes that decode images on disk; 0 decodes in this process.
        timeout_s: seconds without a batch after which a worker counts as stuck.
        cache: 'gpu', 'ram' and 'disk' need decoded images, and decode them now if necessary; 'none' reads even decoded
            images in workers; 'auto' streams images on disk, and moves decoded images to the device if they fit.
        per_sample: a transform of single images will be used, so workers must read the images, as for 'none'.
    """
    device = torch.device(device)
    if cache == "none" or per_sample or (cache == "auto" and isinstance(examples.images, LazyImages)):
        return StreamingLoader(examples, device, workers, timeout_s)
    if examples.lazy_images():
        examples = decode_into_ram({"examples": examples})["examples"]
    on_device = cache == "gpu" or (cache == "auto" and fits_on_device(examples, device))
    return CachedLoader(examples, device, on_device)
