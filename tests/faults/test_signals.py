"""Asked to stop, a run saves and ends with 128 + the signal's number, in training, validation and checks."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

LAST = Path("run/checkpoints/last.pt")


def progress() -> dict[str, float]:
    return torch.load(LAST, weights_only=True)["state"]["progress"]


def children(pid: int) -> list[int]:
    """Return the descendants of `pid`, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found += [int(stat.parent.name), *children(int(stat.parent.name))]
    return found


@pytest.mark.slow
def test_a_terminated_run_with_workers_resumes_with_the_same_bits(cnntrain, wait_for, make_images) -> None:
    root = make_images(count=40)
    common = (
        f"model=mlp threads=1 data=image_folder data.root={root} data.size=8 data.cache=none "
        "data.workers=2 batch_size=4 augment=flip log.figures=false log.tensorboard=false"
    ).split()
    run = cnntrain.start(*common, "epochs=100000", "run_dir=run", "early_stopping=100000", "schedule=constant")
    wait_for(LAST.exists, run)
    workers = children(run.pid)
    assert len(workers) >= 2
    asked = time.monotonic()
    os.killpg(run.pid, signal.SIGTERM)
    done = cnntrain.end(run, 143)
    assert time.monotonic() - asked < 10 and "resume=auto" in done.stderr
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()], "orphans"
    epochs = int(progress()["epoch"]) + 1
    cnntrain(*common, f"epochs={epochs}", "schedule=constant", "run_dir=run", "resume=auto", "data.workers=0")
    cnntrain(*common, f"epochs={epochs}", "schedule=constant", "run_dir=whole", "data.workers=0")
    files = [f"{run}/checkpoints/last.pt" for run in ("run", "whole")]
    one, other = (torch.load(file, weights_only=True)["state"]["model"] for file in files)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_run_interrupted_in_validation_saves_its_state(cnntrain, wait_for) -> None:
    """90 % are validation images; the last checkpoint of the epoch shows that training is nearly over."""
    run = cnntrain.start(
        *(
            "model=mlp model.values.width=75000 threads=1 log.figures=false log.tensorboard=false "
            "data.val_fraction=0.9 batch_size=4 checkpoint.every_steps=35 epochs=1 run_dir=run"
        ).split(),
    )
    wait_for(LAST.exists, run)
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    asked = time.monotonic()
    cnntrain.end(run, 130)
    assert time.monotonic() - asked < 10
    assert progress()["batch"] == 36 and not progress()["finished"]


@pytest.mark.slow
def test_a_second_interrupt_kills_the_run(cnntrain, wait_for) -> None:
    run = cnntrain.start(
        *(
            "model=mlp model.values.width=200000 threads=1 log.figures=false log.tensorboard=false "
            "batch_size=800 checkpoint.every_steps=1 epochs=100 run_dir=run"
        ).split(),
    )
    wait_for(LAST.exists, run)
    while run.poll() is None:  # impatient fingers: Python hears of a signal when an operation of torch's is over
        run.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert run.returncode == -signal.SIGINT, "it saved first"
    assert progress()["step"] >= 1


@pytest.mark.slow
def test_sighup_stops_a_run_except_under_nohup(cnntrain, wait_for) -> None:
    """Standard error is a pipe without a reader."""
    endless = (*cnntrain.quick, "epochs=1000000", "schedule=constant", "run_dir=run", "resume=auto")
    run = cnntrain.start(*endless)
    wait_for(LAST.exists, run)
    run.stderr.close()
    os.killpg(run.pid, signal.SIGHUP)
    assert run.wait(30) == 128 + signal.SIGHUP
    stopped_at = progress()["step"]
    run = cnntrain.start(*endless, around=("nohup",))
    wait_for(lambda: progress()["step"] > stopped_at, run)
    run.send_signal(signal.SIGHUP)
    saved_at = progress()["step"]
    wait_for(lambda: progress()["step"] > saved_at, run)
    run.send_signal(signal.SIGTERM)
    cnntrain.end(run, 143)


@pytest.mark.slow
def test_sigusr1_stops_a_run_only_under_slurm(cnntrain, wait_for) -> None:
    endless = (*cnntrain.quick, "epochs=1000000", "run_dir=run", "resume=auto")
    run = cnntrain.start(*endless, SLURM_JOB_ID="17")
    wait_for(LAST.exists, run)
    run.send_signal(signal.SIGUSR1)
    cnntrain.end(run, 128 + signal.SIGUSR1)


@pytest.mark.slow
def test_a_check_can_be_stopped(cnntrain, wait_for) -> None:
    run = cnntrain.start(
        "overfit",
        *cnntrain.quick,
        "model.values.width=75000",
        "optimizer.lr=1e-9",
        "overfit.steps=1000000",
        "run_dir=run",
    )
    wait_for(Path("run/run.json").exists, run)
    time.sleep(1)
    run.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in cnntrain.end(run, 143, timeout_s=30).stderr
