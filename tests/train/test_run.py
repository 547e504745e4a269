"""The results of a whole run."""

import pytest

from cnntrain import compose, train
from tests.runs import SMALL, rows


def test_a_run_keeps_the_weights_of_its_best_epoch() -> None:
    result = train(compose(*SMALL, "model=lenet5", "run_dir=best"))
    column = rows("best").splitlines()[0].split(",").index("val/top1")
    values = [float(line.split(",")[column]) for line in rows("best").splitlines()[1:]]
    assert result["best"]["val/top1"] == pytest.approx(max(values))
