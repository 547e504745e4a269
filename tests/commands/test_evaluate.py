"""Judging a checkpoint on other files, and what its examples.csv says."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnntrain.cli import main
from cnntrain.commands.evaluate import _hardest_first

GREYS = {"ape": 10, "bee": 130, "cow": 250}
QUICK = ("model=mlp", "data=image_folder", "data.size=8", "threads=1", "log.figures=false", "log.tensorboard=false")


def make_folder(name: str, *classes: str) -> Path:
    """Flat pictures, each class of a gray of its own."""
    for label in classes:
        for split, count in (("train", 12), ("test", 4)):
            place = Path(name) / split / label
            place.mkdir(parents=True)
            for number in range(count):
                gray = np.full((8, 8, 3), GREYS[label] + number % 5, np.uint8)
                Image.fromarray(gray).save(place / f"{number}.png")
    return Path(name)


@pytest.fixture
def run() -> Callable[..., int]:
    make_folder("all", "ape", "bee", "cow")
    assert main([*QUICK, "data.root=all", "epochs=15", "batch_size=8", "optimizer.lr=0.01", "run_dir=run"]) == 0
    return lambda root: main(["evaluate", "checkpoint=run", f"data.root={root}", "run_dir=out", "threads=1"])


def table() -> list[dict[str, str]]:
    with Path("out/examples.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_classes_keep_the_ids_of_the_checkpoint(run: Callable[..., int]) -> None:
    """A folder without bees: its cows are still the checkpoint's."""
    assert run(make_folder("fewer", "ape", "cow")) == 0
    rows = table()
    assert len(rows) == 8 and {row["true"] for row in rows} == {"ape", "cow"}
    assert all(row["true"] == row["predicted"] for row in rows)


def test_unknown_classes_are_rejected(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    make_folder("new", "ape", "bee", "cow")
    shutil.move("new/train/bee", "new/train/wasp")
    shutil.move("new/test/bee", "new/test/wasp")
    assert run("new") == 2
    assert "'wasp'" in capsys.readouterr().err


def test_training_runs_are_not_overwritten(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("run/results.json").read_bytes()
    assert main(["evaluate", "checkpoint=run", "run_dir=run", "threads=1"]) == 2
    assert "run_dir" in capsys.readouterr().err
    assert Path("run/results.json").read_bytes() == before


def test_rows_without_a_loss_come_last() -> None:
    losses = [0.1, float("nan"), 3.0, float("nan"), 1.0]
    rows = sorted(({"loss": loss} for loss in losses), key=_hardest_first)
    assert [row["loss"] for row in rows[:3]] == [3.0, 1.0, 0.1]
