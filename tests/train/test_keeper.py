"""Checkpoints are written beside the training: of the instant of the call, in order, and all by the end."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from cnntrain.errors import MachineError
from cnntrain.train import checkpoint
from cnntrain.train.keeper import CheckpointWriter
from cnntrain.train.run_dir import RunDir
from cnntrain.train.schedule import Constant
from cnntrain.train.state import TrainState


@pytest.fixture
def state() -> TrainState:
    model = nn.Linear(3, 2)
    return TrainState(
        model, torch.optim.SGD(model.parameters(), lr=0.1), Constant(total_steps=10, steps_per_epoch=5)
    )


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    opened, write = threading.Event(), checkpoint.write

    def wait_and_write(packed: memoryview, path: Path) -> None:
        assert opened.wait(20)
        write(packed, path)

    monkeypatch.setattr(checkpoint, "write", wait_and_write)
    return opened


def test_the_state_is_that_of_the_call(tmp_path: Path, state: TrainState, gate: threading.Event) -> None:
    run = RunDir(tmp_path)
    before = state.model.state_dict()["weight"].clone()
    with CheckpointWriter(run, state, {"fact": 1}, keep=0) as save:
        state.progress.step = 7
        save("last")
        with torch.no_grad():
            state.model.weight.fill_(99.0)  # pyright: ignore
        state.progress.step = 8
        assert not run.last.exists()
        gate.set()
        assert save.last_good == f"{run.last} (step 7)"
    kept = checkpoint.load(run.last)
    assert torch.equal(kept["state"]["model"]["weight"], before)
    assert kept["state"]["progress"]["step"] == 7 and kept["fact"] == 1


def test_all_are_there_at_the_end_and_the_newest_are_kept(
    tmp_path: Path, state: TrainState, gate: threading.Event
) -> None:
    run = RunDir(tmp_path)
    gate.set()
    with CheckpointWriter(run, state, {}, keep=2) as save:
        for epoch in (1, 2, 3):
            state.progress.epoch = epoch
            save("last", "best")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "best.pt", "epoch-00002.pt", "epoch-00003.pt", "last.pt",
    ]  # fmt: skip
    assert checkpoint.load(run.best)["state"]["progress"]["epoch"] == 3


@pytest.mark.parametrize("later", ["by the next call", "at the end"])
def test_what_could_not_be_written_is_told(tmp_path: Path, state: TrainState, later: str) -> None:
    run = RunDir(tmp_path)
    run.last.mkdir(parents=True)  # a folder is in the way
    save = CheckpointWriter(run, state, {}, keep=0)
    save("last")
    with pytest.raises(MachineError, match="can't write the checkpoint"):
        save("best") if later == "by the next call" else save.__exit__(None, None, None)
    assert not list(run.checkpoints.glob("*.tmp"))


def test_of_several_processes_only_the_leader_writes(tmp_path: Path, state: TrainState) -> None:
    run = RunDir(tmp_path)
    with CheckpointWriter(run, state, {}, keep=1, writes=False) as save:
        state.progress.step = 3
        save("last")
        assert save.last_good.endswith("(step 3)")
    assert not run.checkpoints.exists()
