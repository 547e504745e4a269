"""The results of a whole run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cnntrain import compose, train
from cnntrain.tasks.meter import HardestExamples
from cnntrain.train.device import Compute
from cnntrain.train.run import _draw_mistakes
from cnntrain.types import Batch
from tests.runs import SMALL, rows


def test_a_run_keeps_the_weights_of_its_best_epoch() -> None:
    result = train(compose(*SMALL, "model=lenet5", "run_dir=best"))
    column = rows("best").splitlines()[0].split(",").index("val/top1")
    values = [float(line.split(",")[column]) for line in rows("best").splitlines()[1:]]
    assert result["best"]["val/top1"] == pytest.approx(max(values))


def test_mistakes_are_drawn_in_the_precision_of_the_run() -> None:
    seen: list[torch.dtype] = []

    class Network(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            outputs = super().forward(input)
            seen.append(outputs.dtype)
            return outputs

    row = torch.zeros(1, dtype=torch.int64)
    loader: Any = SimpleNamespace(
        batches=lambda *_: iter([Batch(torch.zeros(1, 1, 2, 2), {}, row, row)]), examples=SimpleNamespace(names=["a"])
    )
    components: Any = SimpleNamespace(
        compute=Compute(torch.device("cpu"), "bf16", False),
        pipeline=SimpleNamespace(eval_transform=lambda batch: batch),
        task=SimpleNamespace(draw=lambda images, outputs, *_: outputs.dtype),
    )
    hardest = HardestExamples(1)
    hardest.update(torch.ones(1), row)
    assert _draw_mistakes(Network(2, 2), components, loader, hardest) == torch.float32
    assert seen == [torch.bfloat16]
