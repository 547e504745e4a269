"""Meters: rows of any number of examples, and states of other tasks."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from cnntrain.errors import UserError
from cnntrain.tasks.classification import Classification
from cnntrain.tasks.meter import MIN_CAPACITY, Meter
from cnntrain.types import DataSpec


class RowMeter(Meter):
    """Keeps its outputs as they come."""

    def collect(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        self.append("score", outputs)

    def compute_metrics(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        return {}


def test_rows_keep_their_order_when_the_buffer_grows() -> None:
    meter, one = RowMeter(), torch.ones(())
    batches = [torch.randn(count, 2) for count in (3, MIN_CAPACITY - 1, 1, 5 * MIN_CAPACITY, 0, 7)]
    for number, batch in enumerate(batches):
        before = meter.state().get("rows/score")
        kept = None if before is None else before.clone()
        meter.update(batch, {}, one, one)
        assert torch.equal(meter.state()["rows/score"], torch.cat(batches[: number + 1]))
        if before is not None and kept is not None:  # a state that was taken is nobody else's
            assert torch.equal(before, kept)
    other = RowMeter()
    other.load_state(meter.state(), torch.device("cpu"))
    assert torch.equal(other.state()["rows/score"], torch.cat(batches))


FOREIGN = {
    "sums of another shape": {"top5": torch.zeros(3)},
    "a matrix of another size": {"confusion": torch.zeros(9, dtype=torch.int64)},
    "rows of another width": {"rows/loss": torch.zeros(2, 5)},
    "rows of another type": {"rows/loss": torch.zeros(2, 2, dtype=torch.int64)},
    "rows that are a number": {"rows/loss": torch.tensor(1.0)},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_state_of_another_task_is_rejected(kind: str) -> None:
    """As a checkpoint saved in the middle of an epoch may bring them: they were broadcast, or ended in a traceback."""
    task = Classification(spec=DataSpec(1, 8, 8, classes=tuple("0123456789")))
    outputs, targets = torch.zeros(2, 10), {"label": torch.zeros(2, dtype=torch.int64)}

    def count(meter: Meter) -> Meter:
        meter.update(outputs, targets, *task.loss(outputs, targets))
        return meter

    sound = count(task.meter()).state()
    assert FOREIGN[kind].keys() <= sound.keys()
    again = task.meter()
    again.load_state(sound, torch.device("cpu"))
    count(again).compute()
    with pytest.raises(UserError, match=r"state\.meter"):  # noqa: PT012
        meter = task.meter()
        meter.load_state({**sound, **FOREIGN[kind]}, torch.device("cpu"))
        count(meter).compute()


def test_a_meter_without_updates_has_no_figures() -> None:
    task = Classification(DataSpec(1, 8, 8, classes=("a", "b")))
    assert task.meter().read() == {}
    assert task.figures(task.meter()) == {}
