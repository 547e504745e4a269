"""Sweeps run as subprocesses: parallel jobs, kills, resumes, and their HParams in TensorBoard."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fork_server import ForkServer

pytestmark = pytest.mark.slow

COMMAND = shutil.which("cnntrain", path=os.path.dirname(sys.executable)) or shutil.which("cnntrain")
RunSweep = Callable[..., tuple[str, str]]
QUICK = ("threads=1", "log.figures=false", "log.tensorboard=false")
NETS = """
import os, signal
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, num_outputs, image_size, fault):
        super().__init__()
        self.fault, self.fc = fault, nn.Linear(image_size[0] * image_size[1], num_outputs)
    def forward(self, x):
        if x.device.type == "cpu" and type(x) is torch.Tensor:
            if self.fault == "raises":
                raise IndexError("invalid index")
            if self.fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
        return self.fc(x.flatten(1)) / (0 if self.fault == "diverges" else 1)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    assert COMMAND, "the package is not installed: pip install -e ."
    return subprocess.Popen(
        [COMMAND, "-m", *QUICK, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def run_sweep(fork_server: ForkServer) -> RunSweep:
    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        done = fork_server.run("-m", *QUICK, *arguments)
        assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout, done.stderr

    return run


def read_results(folder: str = "s") -> list[dict[str, str]]:
    with Path(folder, "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def results_without_time(folder: str) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "time_s"} for row in read_results(folder)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, f"the process ended early: {process.communicate()}"


def count_epochs(pattern: str) -> int:
    """Count the finished epochs of the runs whose folders match a pattern."""
    return sum(max(len(path.read_text().splitlines()) - 1, 0) for path in Path("s").glob(f"{pattern}/metrics.csv"))


def test_parallel_jobs_distinguish_a_kill_an_error_and_a_divergence(run_sweep: RunSweep) -> None:
    Path("mine/model").mkdir(parents=True)
    Path("mine/faulty.py").write_text(NETS)
    Path("mine/model/faulty.yaml").write_text("_target_: faulty.Net\nfault: none\n")
    settings = ("--config-dir", "mine", "model=faulty", "epochs=1", "data.limit=200", "run_dir=s", "sweep.jobs=2")
    _, err = run_sweep(*settings, "model.fault=none,dies,raises,diverges,absent", code=1)
    rows = {row["model.fault"]: row for row in read_results()}
    assert [row["status"] for row in rows.values()] == ["done", "killed", "failed", "diverged", "done"]
    assert rows["dies"]["error"].startswith("killed by signal 9")
    assert rows["raises"]["error"] == "IndexError: invalid index"
    assert float(rows["none"]["val/top1"]) == float(rows["absent"]["val/top1"])
    assert "error: model.fault=dies: killed: killed by signal 9" in err and "Traceback" not in err
    assert "Traceback" in Path("s/002-raises/log.txt").read_text()


def test_parallel_jobs_give_the_results_of_one_process(run_sweep: RunSweep) -> None:
    settings = ("model=mlp,lenet5", "seed=0,1", "epochs=2", "data.limit=200")
    run_sweep(*settings, "sweep.jobs=2", "run_dir=two")
    run_sweep(*settings, "run_dir=one")
    assert results_without_time("two") == results_without_time("one")


@pytest.mark.parametrize("jobs", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_sweep_killed_twice_resumes_to_the_same_results(jobs: int, run_sweep: RunSweep) -> None:
    settings = ("model=lenet5", "optimizer.lr=0.001,0.002,0.004,0.008", "epochs=5", f"sweep.jobs={jobs}")
    for pattern in ("00[01]-*", "00[23]-*"):
        process = start(*settings, "run_dir=s", "resume=auto")
        before = count_epochs(pattern)
        wait_for(lambda pattern=pattern, before=before: count_epochs(pattern) > before, process)
        process.kill()
        process.communicate()
    out, _ = run_sweep(*settings, "run_dir=s", "resume=auto")
    assert "best: " in out
    assert any("resume: state from" in path.read_text() for path in Path("s").glob("*/log.txt"))
    run_sweep(*settings, "run_dir=whole")
    assert len(read_results()) == 4 and results_without_time("s") == results_without_time("whole")
    for metrics in Path("whole").glob("*/metrics.csv"):
        assert read_metrics(Path("s") / metrics.parent.name / "metrics.csv") == read_metrics(metrics)


def read_metrics(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("signal_number", "jobs"), [pytest.param(signal.SIGINT, 1, marks=pytest.mark.long), (signal.SIGTERM, 2)]
)
def test_a_stopped_sweep_saves_and_resumes(signal_number: signal.Signals, jobs: int, run_sweep: RunSweep) -> None:
    settings = ("model=lenet5", "optimizer.lr=0.001,0.002", "epochs=4", f"sweep.jobs={jobs}", "run_dir=s")
    process = start(*settings)
    wait_for(lambda: count_epochs("*") > 0, process)
    process.send_signal(signal_number)
    process.communicate()
    assert process.returncode == 128 + signal_number
    assert "stopped" not in {row["status"] for row in read_results()}
    run_sweep(*settings, "resume=auto")
    assert [row["status"] for row in read_results()] == ["done", "done"]
    assert all(count_epochs(f"00{number}-*") == 4 for number in range(2))


def test_tensorboard_shows_one_row_per_run(
    serve: Callable[[Path, int], contextlib.AbstractContextManager[str]],
    hparams: Callable[..., Any],
    run_sweep: RunSweep,
) -> None:
    space = ("model=mlp,lenet5", "optimizer.lr=0.01,0.003")
    run_sweep(*space, "log.tensorboard=true", "epochs=2", "data.limit=200", "run_dir=s")
    with serve(Path("s"), 4) as address:
        names, rows = hparams(address)
    assert {"optimizer.lr", "choices.model", "seed"} <= names and not any("sweep" in name for name in names)
    assert len(rows) == 4
    shown = {(row["choices.model"], f"{row['optimizer.lr']:g}"): metrics["best/top1"] for row, metrics in rows}
    expected = {(row["model"], row["optimizer.lr"]): float(row["val/top1"]) for row in read_results()}
    assert shown == pytest.approx(expected)
    assert sum(json.loads(p.read_text())["test"] is not None for p in Path("s").glob("*/results.json")) == 1
