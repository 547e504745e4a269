"""Metrics that are exact over a data set: sums and kept scores on the device, read once."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from cnntrain.errors import UserError
from cnntrain.transfer import to_device

LEAST_ROOM = 4096  # rows


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it (Apple's GPUs don't): for sums over a whole data set."""
    return torch.float32 if device.type == "mps" else torch.float64


def count_pairs(true: Tensor, predicted: Tensor, counts: Tensor, num_classes: int) -> Tensor:
    """Confusion counts of (N,) class ids: (num_classes**2,) int64, row = true class, column = predicted.

    `counts` (N,) is 1 for what counts and 0 for what is ignored; ignored ids may be out of range.
    `torch.bincount` is not used because it waits for the device to learn the largest id, and neither is a
    boolean index, which waits for its length.
    """
    index = true.clamp(0, num_classes - 1) * num_classes + predicted
    total = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=index.device)
    return total.index_add_(0, index, counts.to(torch.int64))


class Meter(ABC):
    """Collects one pass over a data set (or a part of it) without ever waiting for the device.

    What is added up lives in sums, by name; what has to be kept for every batch (its loss) or every example (scores of
    a ranking metric) in rows. Meters of several processes merge by their states, and any order of batches gives the
    same result.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, tuple[Tensor, int]] = {}  # room, and how much of it is taken

    @torch.no_grad()
    def update(
        self, outputs: Tensor, targets: Mapping[str, Tensor], loss_sum: Tensor, loss_count: Tensor
    ) -> None:
        """Add a batch, and the (sum, count) that `Task.loss` gave for it. No host sync."""
        dtype = torch.promote_types(loss_sum.dtype, loss_count.dtype)
        row = self._make_room("loss", loss_sum.new_empty((1, 2), dtype=dtype))
        torch.stack((loss_sum.detach(), loss_count.detach()), out=row[0])
        self._collect(outputs.detach(), targets)

    @abstractmethod
    def _collect(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Add the batch to the sums of this task's metrics. No host sync."""

    @abstractmethod
    def _metrics(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics other than the loss, from the sums and rows on the CPU (float64)."""

    def details(self) -> dict[str, float]:
        """Finer figures that are too many for the table of epochs, e.g. `accuracy/cat`. Waits for the
        device."""
        return {}

    def compute(self) -> dict[str, float]:
        """All metrics by name, `loss` first; waits for the device once. NaN where nothing was counted."""
        if "loss" not in self._rows:
            return {"loss": float("nan")}
        values = self.read()
        # In the order of the batches, whatever part of them an interrupted run had seen: resumed sums have equal bits.
        loss_sum, loss_count = values["rows/loss"].cumsum(0)[-1]
        return {"loss": ratio(loss_sum, loss_count), **self._metrics(values)}

    def loss_is_finite(self) -> bool:
        """Whether the sum of the losses is; waits for the device. True where nothing was counted."""
        if "loss" not in self._rows:
            return True
        room, taken = self._rows["loss"]
        return bool(room[:taken].isfinite().all())

    def read(self) -> dict[str, Tensor]:
        """Sums and rows as float64 on the CPU, in a single transfer. Needs at least one `update`."""
        state = self.state()
        if not state:
            raise RuntimeError("the meter is empty: no batch was given to update()")
        device = next(iter(state.values())).device
        flat = (
            torch.cat([value.reshape(-1).to(wide_dtype(device)) for value in state.values()]).cpu().double()
        )
        pieces = flat.split([value.numel() for value in state.values()])
        return {
            name: piece.view(value.shape) for (name, value), piece in zip(state.items(), pieces, strict=True)
        }

    def state(self) -> dict[str, Tensor]:
        """Everything collected so far, by name, on the device: what another process merges."""
        rows = {f"rows/{name}": room[:taken].clone() for name, (room, taken) in self._rows.items()}
        return {**self._sums, **rows}

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Forget what was collected and take `state` (a checkpoint's, on the CPU) instead, on `device`."""
        self._sums, self._rows = {}, {}
        self.merge({name: value.to(device) for name, value in state.items()})

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add another meter's state (of another process, or of another part of the data set)."""
        for name, value in state.items():
            if name.startswith("rows/"):
                self._keep(name.removeprefix("rows/"), value)
            else:
                self._add(name, value)

    def _add(self, name: str, value: Tensor) -> None:
        if value.is_floating_point():
            value = value.to(wide_dtype(value.device))
        known = self._sums.get(name)
        if known is not None and known.shape != value.shape:
            raise _foreign(name, known, value)
        self._sums[name] = value if known is None else known + value.to(known.device)

    def _keep(self, name: str, value: Tensor) -> None:
        self._make_room(name, value)[:] = value

    def _make_room(self, name: str, value: Tensor) -> Tensor:
        """The next rows of `name`, to be filled: as many, and of the kind, as `value` has."""
        # In one piece: a small tensor kept from every step would lie between the large ones, and what is freed beside
        # it would not fit the next step: the heap would grow by a batch a step.
        if not value.ndim:
            raise _foreign(name, value, value)
        room, taken = self._rows.get(name, (value.new_empty((LEAST_ROOM, *value.shape[1:])), 0))
        if room.shape[1:] != value.shape[1:] or room.is_floating_point() != value.is_floating_point():
            raise _foreign(name, room, value)
        end = taken + len(value)
        if end > len(room):
            larger = room.new_empty((max(end, 2 * len(room)), *room.shape[1:]))
            larger[:taken] = room[:taken]
            room = larger
        self._rows[name] = room, end
        return room[taken:end]


def _foreign(name: str, known: Tensor, value: Tensor) -> UserError:
    """What is collected does not fit what was collected before, as where a checkpoint brought it."""
    was, now = (f"{tuple(each.shape)} {each.dtype}" for each in (known, value))
    return UserError(
        f"metrics: {name} was collected as {was}, and is {now} now; a checkpoint that is resumed in the middle of an "
        "epoch (state.meter) must be of the same task and data"
    )


def ratio(total: Tensor | float, count: Tensor | float) -> float:
    """total / count, or NaN where nothing counted."""
    return float(total) / float(count) if float(count) else float("nan")


class HardestExamples:
    """The rows with the highest mistake scores of a pass, kept on the device without waiting for it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._scores: Tensor | None = None
        self._rows: Tensor | None = None

    @torch.no_grad()
    def update(self, scores: Tensor, index: Tensor) -> None:
        """Add a batch: scores (N,), see `Task.mistake_score`; index (N,) int64, the rows in their split."""
        scores = scores.detach().float()
        index = to_device(index, scores.device)
        if self._scores is not None and self._rows is not None:
            scores, index = scores.to(self._scores.device), index.to(self._rows.device)
            scores, index = torch.cat([self._scores, scores]), torch.cat([self._rows, index])
        self._scores, best = scores.topk(min(self.count, len(scores)))
        self._rows = index[best]

    def state(self) -> tuple[Tensor, Tensor]:
        """Scores and rows on the CPU, which another process's `update` takes."""
        if self._scores is None or self._rows is None:
            return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        return self._scores.cpu(), self._rows.cpu()

    def rows(self) -> Tensor:
        """(M,) int64 on the CPU, worst first, M <= count; only what is a mistake at all (score above 0)."""
        if self._scores is None or self._rows is None:
            return torch.zeros(0, dtype=torch.int64)
        scores, rows = self.state()
        return rows[scores > 0]
