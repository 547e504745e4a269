"""The part of every batch that one of several ranks takes."""

from dataclasses import dataclass

import torch
from torch import Tensor

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

    def of(self, start: int, stop: int) -> slice:
        """Return this rank's part of the images `start` to `stop` (exclusive) of an epoch."""
        base, longer = divmod(stop - start, self.count)
        first = start + self.rank * base + min(self.rank, longer)
        return slice(first, first + base + (self.rank < longer))

    def rows(self, start: int, stop: int) -> Tensor:
        """Return (M,) int64: positions in the epoch that this rank reads for the batch `start` to `stop`."""
        part = self.of(start, stop)
        rows = torch.arange(part.start, part.stop)
        if not self.with_predecessor or not len(rows):
            return rows
        before = part.start - 1 if part.start > start else stop - 1
        return torch.cat((torch.tensor([before]), rows))

    def drop_predecessor(self, batch: Batch) -> Batch:
        """Return the batch without the predecessor, once it has been mixed into its successor."""
        return batch.take(slice(1, None)) if self.with_predecessor and len(batch) else batch


WHOLE = BatchShard()
