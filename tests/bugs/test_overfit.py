"""`overfit` must pass what is sound, and name what is broken."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnntrain import compose, overfit
from cnntrain.assembly import assemble
from cnntrain.commands.overfit import pick_examples

PLANTED = Path(__file__).parent / "planted"
QUICK = ("log.pictures=false", "threads=1")


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
    for split, label, colour in [("train", "a", 120), ("train", "b", 10), ("val", "a", 0), ("val", "b", 9)]:
        folder = tmp_path / "data" / split / label
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (colour + number,) * 3).save(folder / f"{number}.png")
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
    from cnntrain.cli import main

    base = ["overfit", *QUICK, f"--config-dir={PLANTED}"]
    assert main([*base, "model=sound", f"run_dir={tmp_path / 'good'}"]) == 0
    assert main([*base, "model=detached", f"run_dir={tmp_path / 'bad'}"]) == 1
    assert (tmp_path / "good" / "overfit.json").exists()


def test_several_examples(tmp_path: Path) -> None:
    assert verdict(tmp_path, "model=sound", "overfit.examples=8")["verdict"] == "PASS"
    many = verdict(
        tmp_path, "model=sound", "overfit.examples=40", "overfit.steps=1", f"run_dir={tmp_path / 'many'}"
    )
    assert many["example"].endswith("and 39 more")


def test_files_sorted_by_class(tmp_path: Path) -> None:
    """All that lie near the first are of its class: another has to be fetched from further on."""
    for label, grey in (("dark", 40), ("light", 200)):
        (tmp_path / "data" / "train" / label).mkdir(parents=True)
        for number in range(60):
            noise = np.random.default_rng(number).integers(-30, 30, (8, 8))
            Image.fromarray((grey + noise).astype(np.uint8)).save(
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
    "masks, sum": ["data=toy_shapes", "task.loss=sum", "data.size=32"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_TASKS)
def test_points_and_masks_are_learned_too(tmp_path: Path, name: str) -> None:
    result = verdict(tmp_path, *OTHER_TASKS[name], "data.train_count=40", "data.test_count=1")
    assert result["verdict"] == "PASS", result["line"]
    assert ("miou" if "masks" in name else "error_px") in result["line"]
