"""`overfit` must pass what is sound, and name what is broken."""

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
from cnntrain.checks.overfit import FASTER, SLOWEST, Trial, backward, judge_pace, learn_by_heart
from cnntrain.checks.overfit import QUICK as FEW_STEPS
from cnntrain.cli import main
from cnntrain.commands.overfit import pick_examples
from cnntrain.tasks.classification import Classification
from cnntrain.train.device import Compute
from cnntrain.train.setup import assemble
from cnntrain.types import Batch, DataSpec

PLANTED = Path(__file__).parent / "planted"
QUICK = ("log.figures=false", "threads=1")


def verdict(tmp_path: Path, *overrides: str) -> dict:
    return overfit(compose(*QUICK, f"run_dir={tmp_path / 'run'}", *overrides, config_dir=PLANTED))


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "torch"])
def test_a_sound_network_passes_quickly(tmp_path: Path, optimizer: str) -> None:
    result = verdict(tmp_path, "model=sound", f"optimizer={optimizer}")
    assert result["verdict"] == "PASS", result["line"]
    assert result["steps"] <= 100
    assert result["cause"] is None
    assert result["metrics"]["top1"] == 1 and result["line"].endswith("top1 1, top5 1)")


BROKEN = {
    "detached layer": (["model=detached"], "no gradient reaches first.weight, first.bias"),
    "frozen first layer": (["model=frozen_first"], "frozen, they can't learn: first.weight, first.bias"),
    "flipped sign": (["model=sound", "task=flipped_sign"], "its sign is flipped"),
    "learning rate 0": (["model=sound", "optimizer.lr=0"], "the learning rate is 0"),
    "learning rate 1e6, AdamW": (
        ["model=sound", "optimizer.lr=1e6"],
        "learning rate (1e+06) is far too high",
    ),
    "learning rate 1e6, SGD": (
        ["model=sound", "optimizer=sgd", "optimizer.lr=1e6"],
        "learning rate (1e+06) is far too high",
    ),
    "outputs ignore the image": (["model=ignores_image"], "the output ignores the image"),
    "label never seen": (["model=sound", "task=blind_to_label"], "the loss does not depend on the label"),
    "dead ReLUs": (["model=dead_relus"], "every ReLU is dead"),
    "softmax before cross-entropy": (["model=softmax_inside"], "the outputs are probabilities already"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(tmp_path: Path, name: str) -> None:
    overrides, cause = BROKEN[name]
    result = verdict(tmp_path, *overrides)
    assert result["verdict"] == "FAIL"
    assert cause in result["cause"]


def test_a_blank_image_is_named(tmp_path: Path) -> None:
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
    assert "is blank" in result["cause"]


def test_the_verdict_is_the_exit_code_and_is_written_down(tmp_path: Path) -> None:
    base = ["overfit", *QUICK, f"--config-dir={PLANTED}"]
    assert main([*base, "model=sound", f"run_dir={tmp_path / 'good'}"]) == 0
    assert main([*base, "model=detached", f"run_dir={tmp_path / 'bad'}"]) == 1
    assert (tmp_path / "good" / "overfit.json").exists()


@pytest.mark.parametrize(("strict", "verdict", "code"), [("false", "WARN", 0), ("true", "FAIL", 1)])
def test_slow_learning_is_told_with_a_rate_that_is_fast(
    tmp_path: Path, strict: str, verdict: str, code: int
) -> None:
    slow = ("overfit", *QUICK, "model=mlp", "optimizer.lr=2e-4", f"overfit.strict={strict}")
    assert main([*slow, f"run_dir={tmp_path / 'slow'}"]) == code
    report = json.loads((tmp_path / "slow" / "overfit.json").read_text())
    (pace,) = [finding for finding in report["findings"] if finding["name"] == "pace"]
    assert report["verdict"] == pace["verdict"] == verdict and pace["keys"] == ["optimizer.lr"]
    assert report["cause"] == pace["cause"] and "optimizer.lr=0.002" in pace["cause"]
    assert main([*slow, "optimizer.lr=2e-3", f"run_dir={tmp_path / 'fast'}"]) == 0
    assert json.loads((tmp_path / "fast" / "overfit.json").read_text())["steps"] < report["steps"] / FASTER


def learned_in(steps: int | None, **more: float) -> Trial:
    trial = Trial(0.0, 2.3, 0.046, [2.3, 0.01], steps, learning_rate=0.1, output_difference=1.0)
    return dataclasses.replace(trial, pixel_deviation=1.0, gradient_share={"w": 1.0}, **more)


@pytest.mark.parametrize(
    ("steps", "examples", "faster", "verdict"),
    [
        (FEW_STEPS, 1, None, "PASS"),
        (FEW_STEPS + 50, 1, learned_in(FEW_STEPS // FASTER), "WARN"),
        (FEW_STEPS + 50, 1, learned_in(None), "PASS"),
        (
            FEW_STEPS + 50,
            1,
            learned_in(FEW_STEPS // FASTER, largest_output=1e4),
            "PASS",
        ),  # no remedy
        (SLOWEST + 1, 1, learned_in(None), "WARN"),
        (SLOWEST + 1, 8, learned_in(None), "PASS"),
        (2 * FEW_STEPS, 8, None, "PASS"),
        (4 * FEW_STEPS, 8, learned_in(FEW_STEPS // FASTER), "WARN"),
    ],
)
def test_a_trial_is_slow_where_a_higher_rate_is_much_faster(
    steps: int, examples: int, faster: Trial, verdict: str
) -> None:
    allowed: list[int] = []
    finding = judge_pace(learned_in(steps), examples, lambda most: allowed.append(most) or faster)
    assert finding.verdict == verdict
    assert allowed == ([] if steps <= FEW_STEPS * examples**0.5 else [steps // FASTER])


class Moved(nn.Module):
    """Two parameters that take part, one that does not, and a bare scale."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.idle = nn.Linear(4, 3), nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1)) * self.scale


def test_gradients_and_jumps_are_measured_by_a_few_kernels_and_one_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shares and factors are those of norms taken one by one; per step there are two copies to the host, not 15."""
    torch.manual_seed(0)
    model, images = Moved(), torch.randn(1, 1, 2, 2)
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
    learn_by_heart(
        before[0], task, torch.optim.SGD(before[0].parameters(), lr=0.01), batch, batch, compute, 1
    )
    once = sum(copies.values())
    learn_by_heart(
        before[1], task, torch.optim.SGD(before[1].parameters(), lr=0.01), batch, batch, compute, 4
    )
    assert sum(copies.values()) - 2 * once == 3 * 2
    loss = nn.functional.cross_entropy(model(images), batch.targets["label"])
    loss.backward()
    norms = {
        name: p.grad.norm().item() if p.grad is not None else 0.0 for name, p in model.named_parameters()
    }
    model.zero_grad()
    trial = learn_by_heart(model, task, optimizer, batch, batch, compute, 1)
    largest = max(norms.values())
    assert trial.gradient_share == pytest.approx({name: norm / largest for name, norm in norms.items()})
    assert trial.gradient_share["idle.weight"] == 0 and trial.jump is None


def test_a_step_that_tears_a_weight_is_measured() -> None:
    torch.manual_seed(0)
    model = Moved()
    batch = Batch(torch.randn(1, 1, 2, 2), {"label": torch.tensor([1])}, torch.zeros(1), torch.zeros(1))
    task = Classification(DataSpec(1, 2, 2, ("a", "b", "c")))
    optimizer = torch.optim.SGD(
        [{"params": model.fc.parameters(), "lr": 0.0}, {"params": [model.scale]}], lr=1e4
    )
    before = model.scale.item()
    compute = Compute(torch.device("cpu"), "fp32", channels_last=False)
    trial = learn_by_heart(model, task, optimizer, batch, batch, compute, 1)
    assert trial.jump is not None and trial.jump[:2] == (0, "scale")
    assert trial.jump[2] == pytest.approx(abs(model.scale.item()) / before, rel=1e-5)


def test_small_gradients_survive_fp16() -> None:
    """As in a training, the loss is scaled before the backward pass and the gradients after it."""
    model = nn.Linear(2, 1, bias=False)
    images = torch.full((1, 2), 1e-4, dtype=torch.float16)
    output = nn.functional.linear(images, model.weight.half()).float().sum()  # as under autocast
    backward(output * 1e-4, model, Compute(torch.device("cpu"), "fp16", channels_last=False))
    assert model.weight.grad is not None
    assert model.weight.grad[0].tolist() == pytest.approx([1e-8, 1e-8], rel=0.01)


def test_several_examples(tmp_path: Path) -> None:
    assert verdict(tmp_path, "model=sound", "overfit.examples=8")["verdict"] == "PASS"
    many = verdict(
        tmp_path, "model=sound", "overfit.examples=40", "overfit.steps=1", f"run_dir={tmp_path / 'many'}"
    )
    assert many["example"].endswith("and 39 more")


def test_files_sorted_by_class(tmp_path: Path) -> None:
    """All that lie near the first are of its class: another has to be fetched from further on."""
    for label, gray in (("dark", 40), ("light", 200)):
        (tmp_path / "data" / "train" / label).mkdir(parents=True)
        for number in range(60):
            noise = np.random.default_rng(number).integers(-30, 30, (8, 8))
            Image.fromarray((gray + noise).astype(np.uint8)).save(
                tmp_path / "data" / "train" / label / f"{number:02}.png"
            )
    asked = (
        "model=mlp",
        "data=image_folder",
        f"data.root={tmp_path / 'data'}",
        "data.size=8",
        "data.channels=1",
    )
    assert verdict(tmp_path, *asked)["verdict"] == "PASS"
    assembly = assemble(compose(*QUICK, *asked))
    batch, other, name = pick_examples(assembly, assembly.load(), 1)
    assert (
        batch.targets["label"].tolist() == [0] and other.targets["label"].tolist() == [1] and "dark" in name
    )


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
def test_points_and_masks_are_learned_too(tmp_path: Path, name: str) -> None:
    result = verdict(tmp_path, *OTHER_TASKS[name], "data.train_count=40", "data.test_count=1")
    assert result["verdict"] == "PASS", result["line"]
    assert ("miou" if "masks" in name else "error_px") in result["line"]
