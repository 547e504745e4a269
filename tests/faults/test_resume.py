"""Resuming: the state comes from the checkpoint, the settings from the command line; the log reports changes."""

import csv
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow


def weights(run: str) -> dict[str, torch.Tensor]:
    state = torch.load(f"{run}/checkpoints/last.pt", weights_only=True)["state"]
    return {**state["model"], **{f"{i}": s["exp_avg"] for i, s in state["optimizer"]["state"].items()}}


def metrics(run: str) -> list[list[str]]:
    """Return the cells of metrics.csv without throughput."""
    with Path(run, "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    throughput = rows[0].index("images_per_s")
    return [[cell for i, cell in enumerate(row) if i != throughput] for row in rows]


def test_settings_that_do_not_fit_the_state_are_rejected(cnntrain, trained: Path) -> None:
    again = (*cnntrain.quick, "epochs=2", "run_dir=run", "resume=auto")
    said = cnntrain.refused(*again, "seed=1", "batch_size=32", "accumulate=2", "optimizer=sgd", "model.activation=tanh")
    assert "seed: was 0, is 1" in said and "more difference" in said and len(said.splitlines()) <= 10
    said = cnntrain.refused(*again, "data.val_fraction=0.2")
    assert "another dataset" in said and "data.val_fraction: was 0.1, is 0.2" in said


def test_a_new_learning_rate_applies_and_is_logged(cnntrain, trained: Path) -> None:
    done = cnntrain(
        *cnntrain.quick,
        *"epochs=2 run_dir=run resume=auto optimizer.lr=0.5 schedule=constant device=cpu log.every_steps=7".split(),
    )
    assert "optimizer.lr was 0.001 and is 0.5" in done.stderr
    assert "state from run/checkpoints/last.pt" in done.stderr and "log.every_steps" not in done.stderr
    rows = metrics("run")
    assert [row[rows[0].index("lr")] for row in rows[1:]][-1] == "0.5"
    assert [row[0] for row in rows] == ["epoch", "1", "2"]


def test_a_run_resumed_in_another_folder_equals_an_unbroken_run(cnntrain) -> None:
    common = (*cnntrain.quick, "schedule=constant", "ema_decay=0.9", "early_stopping=9")
    cnntrain(*common, "epochs=1", "run_dir=first")
    cnntrain(*common, "epochs=3", "run_dir=second", "resume=first")
    cnntrain(*common, "epochs=3", "run_dir=whole")
    one, other = weights("second"), weights("whole")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert metrics("second")[1:] == metrics("whole")[2:]
