"""What a meter keeps of every example, however many there are."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cnntrain.tasks.meter import LEAST_ROOM, Meter


class Keeping(Meter):
    """Keeps its outputs as they come."""

    def _collect(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        self._keep("score", outputs)

    def _metrics(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        return {}


def test_rows_are_kept_in_order_beyond_any_room() -> None:
    meter, one = Keeping(), torch.ones(())
    batches = [torch.randn(count, 2) for count in (3, LEAST_ROOM - 1, 1, 5 * LEAST_ROOM, 0, 7)]
    for number, batch in enumerate(batches):
        before = meter.state().get("rows/score")
        kept = None if before is None else before.clone()
        meter.update(batch, {}, one, one)
        assert torch.equal(meter.state()["rows/score"], torch.cat(batches[: number + 1]))
        if before is not None and kept is not None:  # a state that was taken is nobody else's
            assert torch.equal(before, kept)
    other = Keeping()
    other.load_state(meter.state(), torch.device("cpu"))
    assert torch.equal(other.state()["rows/score"], torch.cat(batches))
