"""Killed at any instant, and several at once: nothing is lost, nobody gets in another's way."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

STEPS = 12
# AdamW over 5.6 million weights: a state of 64 MiB, which takes a while to write.
PADDED = ("model=mlp", "model.values.width=75000", f"steps={STEPS}", "batch_size=16", "checkpoint.every_steps=1",
          "data.limit=120", "threads=1", "log.pictures=false", "log.tensorboard=false")  # fmt: skip


def state(run: str) -> dict[str, torch.Tensor]:
    content = torch.load(f"{run}/checkpoints/last.pt", weights_only=True)["state"]
    moments = {
        f"{i} {name}": value for i, s in content["optimizer"]["state"].items() for name, value in s.items()
    }
    return {**content["model"], **moments}


def assert_same_bits(run: str, other: str) -> None:
    one, two = state(run), state(other)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize(
    "kills", [pytest.param(5, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.long)]
)
def test_killed_at_random_instants_a_run_ends_with_the_same_bits(cnntrain, kills: int) -> None:
    started = time.monotonic()
    cnntrain(*PADDED, "run_dir=whole")
    whole_s = time.monotonic() - started
    assert Path("whole/checkpoints/last.pt").stat().st_size > 64 * 2**20
    draw = random.Random(kills)
    last, resumed = Path("run/checkpoints/last.pt"), 0
    for _ in range(kills):
        if last.exists() and torch.load(last, weights_only=True)["state"]["progress"]["finished"]:
            last.unlink()  # finished before its kill came: begin again
        process = cnntrain.start(*PADDED, "run_dir=run", "resume=auto")
        try:
            # Most of a run's time is its start, where there is nothing to break: aim at the rest.
            process.wait(whole_s * draw.uniform(0.6, 1.05))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), said
        resumed += "resume: state from" in said
    done = cnntrain(*PADDED, "run_dir=run", "resume=auto")
    assert_same_bits("run", "whole")
    assert sorted(p.name for p in last.parent.iterdir()) == ["best.pt", "last.pt"], (
        "temporaries of dead runs are removed"
    )
    print(f"{kills} kills, {resumed} resumed; {done.stderr.splitlines()[0]}")


@pytest.mark.slow
def test_the_second_process_in_a_folder_is_refused_and_a_dead_ones_lock_is_free(cnntrain, wait_for) -> None:
    endless = (*cnntrain.quick, "epochs=1000000", "run_dir=run", "resume=auto")
    first = cnntrain.start(*endless)
    wait_for(Path("run/checkpoints/last.pt").exists, first)
    assert "another process is at work in run" in cnntrain(*endless, code=2).stderr
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = cnntrain(
        *cnntrain.quick, "epochs=1000000", "early_stopping=1", "optimizer.lr=0", "run_dir=run", "resume=auto"
    )
    assert "resume: state from" in done.stderr


@pytest.mark.slow
def test_four_runs_started_at_once_have_a_folder_each(cnntrain) -> None:
    runs = [cnntrain.start(*cnntrain.quick, "epochs=1") for _ in range(4)]
    for run in runs:
        cnntrain.end(run, 0)
    folders = [path.parent for path in Path("outputs").rglob("results.json")]
    assert len(folders) == len(set(folders)) == 4
    assert all((folder / "checkpoints" / "last.pt").exists() for folder in folders)
