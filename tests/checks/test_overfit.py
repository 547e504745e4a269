"""`cnntrain overfit` passes for sound configurations and diagnoses planted bugs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cnntrain import compose, overfit
from cnntrain.checks.overfit import pick_examples
from cnntrain.checks.overfit_trial import SPEEDUP
from cnntrain.cli import main
from cnntrain.errors import UserError
from cnntrain.tasks.classification import Classification
from cnntrain.train.setup import build_components

PLANTED = Path(__file__).parents[1] / "bugs" / "planted"
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


def test_examples_without_labels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_labels(self: Classification, outputs: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(outputs)), torch.zeros(len(outputs))

    monkeypatch.setattr(Classification, "losses", no_labels)
    with pytest.raises(UserError, match="no labels"):
        verdict(tmp_path, "model=sound")


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
