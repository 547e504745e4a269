"""Metrics that are exact over a whole dataset: sums and per-example values on the device, read once."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from cnntrain.errors import UserError
from cnntrain.transfer import to_device, wide_dtype

MIN_CAPACITY = 4096  # rows


def count_pairs(true: Tensor, predicted: Tensor, counts: Tensor, num_classes: int) -> Tensor:
    """Return a flat confusion matrix (num_classes**2,) int64 of (N,) class ids; row = true class, column = predicted.

    `counts` (N,) is 0 for ignored entries, whose ids may be out of range, and 1 for all others. `torch.bincount` and
    boolean indexing are not used because both need a host sync.
    """
    index = true.clamp(0, num_classes - 1) * num_classes + predicted
    total = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=index.device)
    return total.index_add_(0, index, counts.to(torch.int64))


class Meter(ABC):
    """Collect the metrics of a pass over a dataset, or a part of it, without host syncs.

    Values that are added up are kept as sums by name; values needed per batch (the loss) or per example (scores of a
    ranking metric) as rows. Meters of several ranks are merged by their states. The order of batches does not matter.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, tuple[Tensor, int]] = {}  # buffer and number of rows in use

    @torch.no_grad()
    def update(self, outputs: Tensor, targets: Mapping[str, Tensor], loss_sum: Tensor, loss_count: Tensor) -> None:
        """Add a batch and its (sum, count) from `Task.loss`, without a host sync."""
        dtype = torch.promote_types(loss_sum.dtype, loss_count.dtype)
        row = self._new_rows("loss", loss_sum.new_empty((1, 2), dtype=dtype))
        torch.stack((loss_sum.detach(), loss_count.detach()), out=row[0])
        self.collect(outputs.detach(), targets)

    @abstractmethod
    def collect(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Add a batch to the sums and rows of the metrics, without a host sync."""

    @abstractmethod
    def compute_metrics(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the metrics other than the loss from the sums and rows, float64 on the CPU."""

    def details(self) -> dict[str, float]:
        """Return metrics that are too many for metrics.csv, such as `accuracy/cat`. Needs a host sync."""
        return {}

    def compute(self) -> dict[str, float]:
        """Return all metrics by name, `loss` first, with one host sync. NaN where nothing was counted."""
        if "loss" not in self._rows:
            return {"loss": float("nan")}
        values = self.read()
        # Summed in the order of the batches: a resumed run gets the same bits as an uninterrupted one.
        loss_sum, loss_count = values["rows/loss"].cumsum(0)[-1]
        return {"loss": ratio(loss_sum, loss_count), **self.compute_metrics(values)}

    def loss_is_finite(self) -> bool:
        """Return whether all losses are finite; True without any. Needs a host sync."""
        if "loss" not in self._rows:
            return True
        buffer, size = self._rows["loss"]
        return bool(buffer[:size].isfinite().all())

    def read(self) -> dict[str, Tensor]:
        """Return sums and rows as float64 on the CPU, in a single transfer; {} before the first `update`."""
        state = self.state()
        if not state:
            return {}
        wide = wide_dtype(next(iter(state.values())).device)
        flat = torch.cat([value.reshape(-1).to(wide) for value in state.values()]).cpu().double()
        pieces = flat.split([value.numel() for value in state.values()])
        return {name: piece.view(value.shape) for (name, value), piece in zip(state.items(), pieces, strict=True)}

    def state(self) -> dict[str, Tensor]:
        """Return everything collected so far by name, on the device, for `merge` and checkpoints."""
        rows = {f"rows/{name}": buffer[:size].clone() for name, (buffer, size) in self._rows.items()}
        return {**self._sums, **rows}

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Replace everything collected by `state` (of a checkpoint, on the CPU), on `device`."""
        self._sums, self._rows = {}, {}
        self.merge({name: value.to(device) for name, value in state.items()})

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the state of another meter (of another rank, or of another part of the dataset)."""
        for name, value in state.items():
            if name.startswith("rows/"):
                self.append(name.removeprefix("rows/"), value)
            else:
                self.add(name, value)

    def add(self, name: str, value: Tensor) -> None:
        """Add `value` to the sum `name`."""
        if value.is_floating_point():
            value = value.to(wide_dtype(value.device))
        total = self._sums.get(name)
        if total is not None and total.shape != value.shape:
            raise _mismatch_error(name, total, value)
        self._sums[name] = value if total is None else total + value.to(total.device)

    def append(self, name: str, value: Tensor) -> None:
        """Append `value` (N, ...) to the rows `name`."""
        self._new_rows(name, value)[:] = value

    def _new_rows(self, name: str, like: Tensor) -> Tensor:
        """Return new rows of `name` to be filled, of the length, shape and type of `like`.

        The rows of one name share a buffer. Small tensors kept at every step would fragment the memory.
        """
        if not like.ndim:
            raise _mismatch_error(name, like, like)
        if name not in self._rows:
            self._rows[name] = like.new_empty((MIN_CAPACITY, *like.shape[1:])), 0
        buffer, size = self._rows[name]
        if buffer.shape[1:] != like.shape[1:] or buffer.is_floating_point() != like.is_floating_point():
            raise _mismatch_error(name, buffer, like)
        end = size + len(like)
        if end > len(buffer):
            larger = buffer.new_empty((max(end, 2 * len(buffer)), *buffer.shape[1:]))
            larger[:size] = buffer[:size]
            buffer = larger
        self._rows[name] = buffer, end
        return buffer[size:end]


def _mismatch_error(name: str, before: Tensor, now: Tensor) -> UserError:
    """Return the error for values that do not fit those collected before, for example by a checkpoint."""
    shapes = [f"{tuple(value.shape)} {value.dtype}" for value in (before, now)]
    return UserError(
        f"metrics: {name} was {shapes[0]} so far and is {shapes[1]} now; a checkpoint resumed in the middle of an "
        "epoch (state.meter) must be of the same task and data"
    )


def ratio(total: Tensor | float, count: Tensor | float) -> float:
    """Return total / count, or NaN if the count is 0."""
    return float(total) / float(count) if float(count) else float("nan")


class HardestExamples:
    """The examples with the highest mistake scores of an epoch, kept on the device without host syncs."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._scores: Tensor | None = None
        self._index: Tensor | None = None

    @torch.no_grad()
    def update(self, scores: Tensor, index: Tensor) -> None:
        """Add a batch: scores (N,) from `Task.mistake_score`, index (N,) int64 of the rows in the split."""
        scores = scores.detach().float()
        index = to_device(index, scores.device)
        if self._scores is not None and self._index is not None:
            scores, index = scores.to(self._scores.device), index.to(self._index.device)
            scores, index = torch.cat([self._scores, scores]), torch.cat([self._index, index])
        self._scores, best = scores.topk(min(self.count, len(scores)))
        self._index = index[best]

    def state(self) -> tuple[Tensor, Tensor]:
        """Return scores and rows on the CPU, for `update` of another rank."""
        if self._scores is None or self._index is None:
            return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        return self._scores.cpu(), self._index.cpu()

    def rows(self) -> Tensor:
        """Return rows (M,) int64 on the CPU, M <= count, hardest first; only mistakes (score above 0)."""
        scores, index = self.state()
        return index[scores > 0]
