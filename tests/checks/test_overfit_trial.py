"""Measurements of an overfit trial, and the judgement of its pace."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cnntrain.checks.overfit_trial import (
    FAST_STEPS,
    MAX_STEPS_FOR_ONE,
    SPEEDUP,
    OverfitResult,
    OverfitTrial,
    diagnose_pace,
)
from cnntrain.tasks.classification import Classification
from cnntrain.train.device import Compute
from cnntrain.types import Batch, DataSpec


def result_of(steps: int | None, **more: float) -> OverfitResult:
    result = OverfitResult(0.0, 2.3, 0.046, [2.3, 0.01], steps, learning_rate=0.1, output_difference=1.0)
    return dataclasses.replace(result, pixel_deviation=1.0, gradient_share={"w": 1.0}, **more)


@pytest.mark.parametrize(
    ("steps", "examples", "faster", "verdict"),
    [
        (FAST_STEPS, 1, None, "PASS"),
        (FAST_STEPS + 50, 1, result_of(FAST_STEPS // SPEEDUP), "WARN"),
        (FAST_STEPS + 50, 1, result_of(None), "PASS"),
        (FAST_STEPS + 50, 1, result_of(FAST_STEPS // SPEEDUP, largest_output=1e4), "PASS"),  # that trial fails
        (MAX_STEPS_FOR_ONE + 1, 1, result_of(None), "WARN"),
        (MAX_STEPS_FOR_ONE + 1, 8, result_of(None), "PASS"),
        (2 * FAST_STEPS, 8, None, "PASS"),
        (4 * FAST_STEPS, 8, result_of(FAST_STEPS // SPEEDUP), "WARN"),
    ],
)
def test_trial_is_slow_if_a_higher_rate_is_much_faster(
    steps: int, examples: int, faster: OverfitResult, verdict: str
) -> None:
    allowed: list[int] = []
    finding = diagnose_pace(result_of(steps), examples, lambda most: allowed.append(most) or faster)
    assert finding.verdict == verdict
    assert allowed == ([] if steps <= FAST_STEPS * examples**0.5 else [steps // SPEEDUP])


class TwoLayers(nn.Module):
    """A layer that is used, one that is not, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1)) * self.scale


def test_norms_are_measured_with_two_host_copies_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient shares equal those of norms computed one by one, with 2 instead of 15 host syncs per step."""
    torch.manual_seed(0)
    model, images = TwoLayers(), torch.randn(1, 1, 2, 2)
    batch = Batch(images, {"label": torch.tensor([1])}, torch.zeros(1), torch.zeros(1))
    task = Classification(DataSpec(1, 2, 2, ("a", "b", "c")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    compute = Compute(torch.device("cpu"), "fp32", channels_last=False)
    copies = {"item": 0, "tolist": 0, "float": 0}
    for name, method in (("item", "item"), ("tolist", "tolist"), ("float", "__float__")):
        original = getattr(Tensor, method)

        def counted(self: Tensor, name: str = name, original: Any = original) -> Any:
            copies[name] += 1
            return original(self)

        monkeypatch.setattr(Tensor, method, counted)
    before = [copy.deepcopy(model) for _ in range(2)]
    OverfitTrial(task, compute, batch, batch, 1).run(before[0], torch.optim.SGD(before[0].parameters(), lr=0.01))
    once = sum(copies.values())
    OverfitTrial(task, compute, batch, batch, 4).run(before[1], torch.optim.SGD(before[1].parameters(), lr=0.01))
    assert sum(copies.values()) - 2 * once == 3 * 2
    loss = nn.functional.cross_entropy(model(images), batch.targets["label"])
    loss.backward()
    norms = {name: p.grad.norm().item() if p.grad is not None else 0.0 for name, p in model.named_parameters()}
    model.zero_grad()
    result = OverfitTrial(task, compute, batch, batch, 1).run(model, optimizer)
    largest = max(norms.values())
    assert result.gradient_share == pytest.approx({name: norm / largest for name, norm in norms.items()})
    assert result.gradient_share["unused.weight"] == 0 and result.jump is None


def test_abrupt_change_of_a_weight_is_recorded() -> None:
    torch.manual_seed(0)
    model = TwoLayers()
    batch = Batch(torch.randn(1, 1, 2, 2), {"label": torch.tensor([1])}, torch.zeros(1), torch.zeros(1))
    task = Classification(DataSpec(1, 2, 2, ("a", "b", "c")))
    optimizer = torch.optim.SGD([{"params": model.fc.parameters(), "lr": 0.0}, {"params": [model.scale]}], lr=1e4)
    before = model.scale.item()
    compute = Compute(torch.device("cpu"), "fp32", channels_last=False)
    result = OverfitTrial(task, compute, batch, batch, 1).run(model, optimizer)
    assert result.jump is not None and result.jump[:2] == (0, "scale")
    assert result.jump[2] == pytest.approx(abs(model.scale.item()) / before, rel=1e-5)
