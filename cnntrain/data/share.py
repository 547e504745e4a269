"""One process's share of every batch, where several train together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cnntrain.types import Batch


@dataclass(frozen=True)
class BatchShard:
    """Process `rank` of `count` takes one contiguous part of every batch.

    The parts differ by one image at most, and the longer ones come first: of a short last batch the last processes
    may get nothing, the first one always gets something.

    Attributes:
        leader: whether the image before the part comes along, in front (before the first comes the last): mixing
            blends each image with its predecessor in the batch, which may be another process's.
    """

    rank: int = 0
    count: int = 1
    leader: bool = False

    def of(self, start: int, stop: int) -> slice:
        """The part of the images `start` to `stop` (exclusive) of a pass."""
        base, longer = divmod(stop - start, self.count)
        first = start + self.rank * base + min(self.rank, longer)
        return slice(first, first + base + (self.rank < longer))

    def rows(self, start: int, stop: int) -> Tensor:
        """(M,) int64: places in the pass that this process reads of the batch `start` to `stop`."""
        part = self.of(start, stop)
        rows = torch.arange(part.start, part.stop)
        if not self.leader or not len(rows):
            return rows
        before = part.start - 1 if part.start > start else stop - 1
        return torch.cat((torch.tensor([before]), rows))

    def trim(self, batch: Batch) -> Batch:
        """The batch without its leader, which has served."""
        if not self.leader or not len(batch):
            return batch
        return batch.take(slice(1, None))


WHOLE = BatchShard()
