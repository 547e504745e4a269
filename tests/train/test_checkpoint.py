"""Checkpoint files: written atomically and in the background, read without running code, every field validated."""

import copy
import os
import pickle
import threading
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cnntrain.config.compose import compose
from cnntrain.errors import MachineError, UserError
from cnntrain.train import checkpoint
from cnntrain.train.checkpoint import CheckpointWriter, load_weights, validate_checkpoint
from cnntrain.train.run_dir import RunDir
from cnntrain.train.schedule import Constant
from cnntrain.train.state import Progress, TrainState
from cnntrain.types import DataSpec

NAN = float("nan")
CONTENT = {"state": {"weight": torch.arange(6.0), "names": ["a", "b"], "best": {"val/top1": 0.5}}}


def test_load_returns_what_was_saved(tmp_path: Path) -> None:
    checkpoint.save(CONTENT, tmp_path / "deep" / "last.pt")
    loaded = checkpoint.load(tmp_path / "deep" / "last.pt")
    assert torch.equal(loaded["state"]["weight"], CONTENT["state"]["weight"])
    assert loaded["state"]["names"] == ["a", "b"]
    assert os.listdir(tmp_path / "deep") == ["last.pt"]


def test_a_flipped_byte_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save({"state": torch.zeros(4096)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"last\.pt"):
        checkpoint.load(path)


class Malicious:
    """Creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("touched",)


def test_other_files_are_rejected_and_run_no_code(tmp_path: Path) -> None:
    checkpoint.save(CONTENT, tmp_path / "valid.pt")
    valid = (tmp_path / "valid.pt").read_bytes()
    torch.save({"format": checkpoint.FORMAT, "state": Malicious()}, tmp_path / "malicious.pt")
    (tmp_path / "half.pt").write_bytes(valid[: len(valid) // 2])
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Malicious()))
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"format": checkpoint.FORMAT + 1, **CONTENT}, tmp_path / "version.pt")
    for name in ("malicious", "half", "page", "pickle", "list", "version", "missing"):
        with pytest.raises(UserError, match=rf"{name}\.pt"):
            checkpoint.load(tmp_path / f"{name}.pt")
    assert not Path("touched").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(CONTENT, path)
    before = path.read_bytes()

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(MachineError, match="No space left"):
        checkpoint.save({"state": torch.zeros(99)}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_weights_of_another_network_are_rejected_by_name(change: str) -> None:
    model = nn.Linear(3, 2)
    weights = dict(nn.Linear(3, 2).state_dict())
    match change:
        case "missing":
            del weights["bias"]
        case "extra":
            weights["bias2"] = torch.zeros(2)
        case "shape":
            weights["bias"] = torch.zeros(3)
        case "dtype":
            weights["bias"] = torch.zeros(2, dtype=torch.int64)
    before = model.weight.clone()
    with pytest.raises(UserError, match="bias"):
        load_weights(model, weights)
    assert torch.equal(model.weight, before)


@pytest.fixture
def state() -> TrainState:
    model = nn.Linear(3, 2)
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1), Constant(total_steps=10, steps_per_epoch=5))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An event that all writes wait for."""
    opened, write = threading.Event(), checkpoint.write

    def wait_and_write(serialized: memoryview, path: Path) -> None:
        assert opened.wait(20)
        write(serialized, path)

    monkeypatch.setattr(checkpoint, "write", wait_and_write)
    return opened


def test_the_writer_saves_the_state_at_the_time_of_the_call(
    tmp_path: Path, state: TrainState, gate: threading.Event
) -> None:
    run = RunDir(tmp_path)
    before = state.model.state_dict()["weight"].clone()
    with CheckpointWriter(run, state, {"fact": 1}, keep=0) as writer:
        state.progress.step = 7
        writer.save("last")
        with torch.no_grad():
            state.model.weight.fill_(99.0)  # pyright: ignore
        state.progress.step = 8
        assert not run.last.exists()
        gate.set()
        assert writer.last_saved == f"{run.last} (step 7)"
    content = checkpoint.load(run.last)
    assert torch.equal(content["state"]["model"]["weight"], before)
    assert content["state"]["progress"]["step"] == 7 and content["fact"] == 1


def test_the_writer_keeps_the_newest_epochs(tmp_path: Path, state: TrainState) -> None:
    run = RunDir(tmp_path)
    with CheckpointWriter(run, state, {}, keep=2) as writer:
        for epoch in (1, 2, 3):
            state.progress.epoch = epoch
            writer.save("last", "best")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "best.pt",
        "epoch-00002.pt",
        "epoch-00003.pt",
        "last.pt",
    ]
    assert checkpoint.load(run.best)["state"]["progress"]["epoch"] == 3


@pytest.mark.parametrize("when", ["in the next call", "at the end"])
def test_the_writer_raises_errors_of_the_background_thread(tmp_path: Path, state: TrainState, when: str) -> None:
    run = RunDir(tmp_path)
    run.last.mkdir(parents=True)  # a folder in place of the file
    writer = CheckpointWriter(run, state, {}, keep=0)
    writer.save("last")
    with pytest.raises(MachineError, match=r"last\.pt"):
        writer.save("best") if when == "in the next call" else writer.__exit__(None, None, None)
    assert not list(run.checkpoints.glob("*.tmp"))


def test_a_disabled_writer_writes_nothing(tmp_path: Path, state: TrainState) -> None:
    run = RunDir(tmp_path)
    with CheckpointWriter(run, state, {}, keep=1, enabled=False) as writer:
        state.progress.step = 3
        writer.save("last")
        assert writer.last_saved.endswith("(step 3)")
    assert not run.checkpoints.exists()


@cache
def config() -> dict[str, Any]:
    return compose("config", ("model=mlp",))


def content() -> dict[str, Any]:
    """Return the valid content of a training run's checkpoint."""
    progress = asdict(Progress(epoch=1, step=5, best={"epoch": 1.0, "step": 5.0, "val/top1": NAN}))
    state = {
        "model": {"weight": torch.zeros(2)},
        "ema": None,
        "optimizer": {},
        "schedule": {},
        "scaler": None,
        "progress": progress,
        "meter": {},
    }
    keypoints = {"keypoints": ("left", "right"), "flip_pairs": (1, 0), "skeleton": ((0, 1),)}
    spec = asdict(DataSpec(1, 8, 8, classes=("a", "b"), **keypoints, mean=(0.5,), std=(0.2,)))
    resolved = {"precision": "fp32", "threads": 1, "processes": 1}
    return {
        "state": state,
        "config": copy.deepcopy(config()),
        "spec": spec,
        "fingerprint": "10-abc",
        "resolved": resolved,
        "monitor": ("top1", "max"),
        "versions": {},
    }


def test_valid_content_is_accepted_unchanged() -> None:
    valid = content()
    checked = validate_checkpoint(valid)
    assert checked["state"] == valid["state"] and checked["config"] == valid["config"]
    assert checked["spec"] == valid["spec"] and checked["resolved"] == valid["resolved"]
    assert DataSpec(**checked["spec"]) == DataSpec(**valid["spec"])


def test_missing_fields_get_their_defaults() -> None:
    older = content()
    del older["config"]["check"], older["config"]["log"]["tensorboard"], older["resolved"], older["monitor"]
    del older["state"]["ema"], older["state"]["scaler"], older["state"]["progress"]["finished"]
    older["spec"] = {"channels": 1, "height": 8, "width": 8, "classes": ["a", "b"]}
    checked = validate_checkpoint(older)
    assert checked["config"] == config() and checked["resolved"] == {} and checked["state"]["ema"] is None
    assert DataSpec(**checked["spec"]).classes == ("a", "b")
    assert checked["state"]["progress"]["finished"] is False


def test_defaults_do_not_replace_saved_settings() -> None:
    older = content()
    older["config"]["log"] = {"every_steps": config()["log"]["every_steps"] + 1}
    checked = validate_checkpoint(older)["config"]["log"]
    assert checked == {**config()["log"], "every_steps": config()["log"]["every_steps"] + 1}


def test_the_number_of_pixels_is_limited() -> None:
    bad = content()
    bad["spec"] = {"channels": 4096, "height": 256, "width": 256}
    validate_checkpoint(bad)
    bad["spec"]["width"] = 257
    with pytest.raises(UserError, match="4096 x 256 x 257"):
        validate_checkpoint(bad)


INVALID = {
    "state": [None, [], 5],
    "config": [None, "x", []],
    "spec": [None, [], 5],
    "fingerprint": [None, []],
    "resolved": [[], 5],
    "monitor": [5, "top1", ["top1"], ["top1", "most"], [None, "max"]],
    "state.model": [None, [], {"weight": 5}, {5: torch.zeros(1)}, {"w": torch.zeros(1, dtype=torch.complex64)}],
    "state.ema": [5, {"weight": None}],
    "state.optimizer": [None, []],
    "state.scaler": [5],
    "state.meter": [None, {"loss": 1.0}],
    "state.schedule": [None, {"best": "x"}, {"best": NAN}, {"best": True}],
    "state.progress": [None, [], {"evil": 1}],
    "state.progress.step": ["x", None, -1, 0.5, NAN, 2**60, True],
    "state.progress.batch": [-1, 2**60],
    "state.progress.wall_s": [NAN, -1.0, "x"],
    "state.progress.best": [5, {"epoch": 1.0}, {"epoch": "x", "step": 1.0}, {"epoch": NAN, "step": 1.0}],
    "state.progress.finished": [1, "yes"],
    "spec.channels": [0, -1, "3", None, 10**9],
    "spec.height": [0, 10**9, 8.5, True],
    "spec.width": [0, 2**20],
    "spec.classes": ["ab", [[]], 5],
    "spec.keypoints": ["ab", [None]],
    "spec.flip_pairs": [[0], [0, 2], [0, -1], 5],
    "spec.skeleton": [[0], [[0]], [[0, 2]], 5],
    "spec.per_pixel": [1, "x"],
    "spec.hflip_ok": [1, None],
    "spec.ignore_index": ["x", 2**40],
    "spec.mean": [[NAN], [0.1, 0.2], ["x"], 5],
    "spec.std": [[0.0], [NAN], [-1.0], [float("inf")], "x"],
    "spec.evil": [5],
    "config.model": [5, None, "mlp", {"_target_": "torch.nn.Identity", "width": [torch.zeros(0)]}],
    "config.data": [5],
    "config.batch_size": ["auto", "${oc.env:HOME}", 0, None],
    "config.choices": [5, None],
    "config.epochs": ["x", 0],
    "config.log": [5],
    "config.precision": ["fp8"],
    "config.evil": [5],
    "config.trusted_packages": ["os"],
    "resolved.precision": ["fp8", 5],
    "resolved.threads": [0, 10**6, "x"],
    "resolved.processes": [0, "x"],
}


@pytest.mark.parametrize("path", INVALID)
def test_an_invalid_field_is_rejected_by_its_name(path: str) -> None:
    for value in INVALID[path]:
        bad = content()
        *parents, name = path.split(".")
        parent = bad
        for key in parents:
            parent = parent[key]
        parent[name] = value
        with pytest.raises(UserError, match=name):
            validate_checkpoint(bad)


@pytest.mark.parametrize(
    "path", ["state", "state.model", "config", "config.model", "config.choices", "spec", "fingerprint"]
)
def test_a_missing_required_field_is_rejected(path: str) -> None:
    bad = content()
    *parents, name = path.split(".")
    parent = bad
    for key in parents:
        parent = parent[key]
    del parent[name]
    with pytest.raises(UserError, match=name):
        validate_checkpoint(bad)
