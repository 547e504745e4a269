"""`cnntrain overfit` passes for sound configurations and diagnoses planted bugs."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cnntrain import compose, overfit
from cnntrain.checks.context import backward
from cnntrain.checks.overfit import pick_examples
from cnntrain.checks.overfit_trial import (
    FAST_STEPS,
    MAX_STEPS_FOR_ONE,
    SPEEDUP,
    OverfitResult,
    OverfitTrial,
    diagnose_pace,
)
from cnntrain.cli import main
from cnntrain.tasks.classification import Classification
from cnntrain.train.device import Compute
from cnntrain.train.setup import build_components
from cnntrain.types import Batch, DataSpec

PLANTED = Path(__file__).parent / "planted"
QUICK = ("log.figures=false", "threads=1")


def verdict(tmp_path: Path, *overrides: str) -> dict:
    return overfit(compose(*QUICK, f"run_dir={tmp_path / 'run'}", *overrides, config_dir=PLANTED))


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "torch"])
def test_sound_network_passes_quickly(tmp_path: Path, optimizer: str) -> None:
    result = verdict(tmp_path, "model=sound", f"optimizer={optimizer}")
    assert result["verdict"] == "PASS", result["line"]
    assert result["steps"] <= 100
    assert result["cause"] is None
    assert result["metrics"]["top1"] == 1 and result["line"].endswith("top1 1, top5 1)")


# Overrides, the first finding that fails, and what its cause must name.
BROKEN = {
    "detached layer": (["model=detached"], "gradients", "first.weight, first.bias"),
    "frozen first layer": (["model=frozen_first"], "frozen", "first.weight, first.bias"),
    "flipped sign": (["model=sound", "task=flipped_sign"], "loss sign", ""),
    "learning rate 0": (["model=sound", "optimizer.lr=0"], "learning rate", ""),
    "learning rate 1e6, AdamW": (["model=sound", "optimizer.lr=1e6"], "steady", "1e+06"),
    "learning rate 1e6, SGD": (["model=sound", "optimizer=sgd", "optimizer.lr=1e6"], "steady", "1e+06"),
    "outputs ignore the image": (["model=ignores_image"], "image matters", ""),
    "loss ignores the target": (["model=sound", "task=blind_to_label"], "label", ""),
    "dead ReLUs": (["model=dead_relus"], "rectifiers", ""),
    "softmax before cross-entropy": (["model=softmax_inside"], "logits", "softmax"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_planted_bug_is_diagnosed(tmp_path: Path, name: str) -> None:
    overrides, expected, subject = BROKEN[name]
    result = verdict(tmp_path, *overrides)
    failures = [finding for finding in result["findings"] if finding["verdict"] == "FAIL"]
    assert result["verdict"] == "FAIL" and failures[0]["name"] == expected
    assert result["cause"] == failures[0]["cause"] and subject in failures[0]["cause"] + failures[0]["remedy"]
    assert failures[0]["keys"]


def test_a_blank_image_fails(tmp_path: Path) -> None:
    for split, label, color in [("train", "a", 120), ("train", "b", 10), ("val", "a", 0), ("val", "b", 9)]:
        folder = tmp_path / "data" / split / label
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (color + number,) * 3).save(folder / f"{number}.png")
    result = verdict(
        tmp_path,
        "model=sound",
        "data=image_folder",
        f"data.root={tmp_path / 'data'}",
        "data.size=8",
        "task.binary=false",
    )
    assert result["verdict"] == "FAIL"
    assert next(f["name"] for f in result["findings"] if f["verdict"] == "FAIL") == "image"


def test_verdict_sets_exit_code_and_is_written(tmp_path: Path) -> None:
    base = ["overfit", *QUICK, f"--config-dir={PLANTED}"]
    assert main([*base, "model=sound", f"run_dir={tmp_path / 'good'}"]) == 0
    assert main([*base, "model=detached", f"run_dir={tmp_path / 'bad'}"]) == 1
    assert (tmp_path / "good" / "overfit.json").exists()


@pytest.mark.parametrize(("strict", "verdict", "code"), [("false", "WARN", 0), ("true", "FAIL", 1)])
def test_slow_learning_reports_a_faster_rate(tmp_path: Path, strict: str, verdict: str, code: int) -> None:
    slow = ("overfit", *QUICK, "model=mlp", "optimizer.lr=2e-4", f"overfit.strict={strict}")
    assert main([*slow, f"run_dir={tmp_path / 'slow'}"]) == code
    report = json.loads((tmp_path / "slow" / "overfit.json").read_text())
    (pace,) = [finding for finding in report["findings"] if finding["name"] == "pace"]
    assert report["verdict"] == pace["verdict"] == verdict and pace["keys"] == ["optimizer.lr"]
    assert report["cause"] == pace["cause"] and "optimizer.lr=0.002" in pace["cause"]
    assert main([*slow, "optimizer.lr=2e-3", f"run_dir={tmp_path / 'fast'}"]) == 0
    assert json.loads((tmp_path / "fast" / "overfit.json").read_text())["steps"] < report["steps"] / SPEEDUP


def result_of(steps: int | None, **more: float) -> OverfitResult:
    result = OverfitResult(0.0, 2.3, 0.046, [2.3, 0.01], steps, learning_rate=0.1, output_difference=1.0)
    return dataclasses.replace(result, pixel_deviation=1.0, gradient_share={"w": 1.0}, **more)


@pytest.mark.parametrize(
    ("steps", "examples", "faster", "verdict"),
    [
        (FAST_STEPS, 1, None, "PASS"),
        (FAST_STEPS + 50, 1, result_of(FAST_STEPS // SPEEDUP), "WARN"),
        (FAST_STEPS + 50, 1, result_of(None), "PASS"),
        (
            FAST_STEPS + 50,
            1,
            result_of(FAST_STEPS // SPEEDUP, largest_output=1e4),
            "PASS",
        ),  # a failing trial is no remedy
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


def test_norms_are_measured_with_two_host_copies_per_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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


def test_small_gradients_survive_fp16() -> None:
    """As in training, the loss is scaled before the backward pass and the gradients after it."""
    model = nn.Linear(2, 1, bias=False)
    images = torch.full((1, 2), 1e-4, dtype=torch.float16)
    output = nn.functional.linear(images, model.weight.half()).float().sum()  # as under autocast
    backward(output * 1e-4, model, Compute(torch.device("cpu"), "fp16", channels_last=False))
    assert model.weight.grad is not None
    assert model.weight.grad[0].tolist() == pytest.approx([1e-8, 1e-8], rel=0.01)


def test_several_examples(tmp_path: Path) -> None:
    assert verdict(tmp_path, "model=sound", "overfit.examples=8")["verdict"] == "PASS"
    many = verdict(tmp_path, "model=sound", "overfit.examples=40", "overfit.steps=1", f"run_dir={tmp_path / 'many'}")
    assert many["example"].endswith("and 39 more")


def test_other_example_in_files_sorted_by_class(tmp_path: Path) -> None:
    """If all examples near the first have its class, one of another class is found further on."""
    for label, gray in (("dark", 40), ("light", 200)):
        (tmp_path / "data" / "train" / label).mkdir(parents=True)
        for number in range(60):
            noise = np.random.default_rng(number).integers(-30, 30, (8, 8))
            Image.fromarray((gray + noise).astype(np.uint8)).save(
                tmp_path / "data" / "train" / label / f"{number:02}.png"
            )
    overrides = (
        "model=mlp",
        "data=image_folder",
        f"data.root={tmp_path / 'data'}",
        "data.size=8",
        "data.channels=1",
    )
    assert verdict(tmp_path, *overrides)["verdict"] == "PASS"
    components = build_components(compose(*QUICK, *overrides))
    batch, other, name = pick_examples(components, components.load(), 1)
    assert batch.targets["label"].tolist() == [0] and other.targets["label"].tolist() == [1] and "dark" in name


OTHER_TASKS = {
    "wing": ["data=toy_faces"],
    "mse": ["data=toy_faces", "task.loss=mse"],
    "l1": ["data=toy_faces", "task.loss=l1"],
    "smooth_l1": ["data=toy_faces", "task.loss=smooth_l1"],
    "heat maps": ["data=toy_faces", "task.head=heatmap", "model=unet_small", "data.size=32"],
    "masks": ["data=toy_shapes", "data.size=32"],
    "masks, sum": ["data=toy_shapes", "task.loss=ce_dice", "data.size=32"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_TASKS)
def test_keypoints_and_masks_are_learned(tmp_path: Path, name: str) -> None:
    result = verdict(tmp_path, *OTHER_TASKS[name], "data.train_count=40", "data.test_count=1")
    assert result["verdict"] == "PASS", result["line"]
    assert ("miou" if "masks" in name else "error_px") in result["line"]
