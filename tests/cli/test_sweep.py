"""Sweeps as commands: several worker processes, kills, signals, and their runs in TensorBoard."""

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
Finish = Callable[..., tuple[str, str]]
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
                raise IndexError("an error in user code")
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
def finish(fork_server: ForkServer) -> Finish:
    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        done = fork_server.run("-m", *QUICK, *arguments)
        assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout, done.stderr

    return run


def rows(folder: str = "s") -> list[dict[str, str]]:
    with Path(folder, "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_time(folder: str) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "time_s"} for row in rows(folder)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, f"the process ended too early: {process.communicate()}"


def epochs_done(pattern: str) -> int:
    return sum(max(len(path.read_text().splitlines()) - 1, 0) for path in Path("s").glob(f"{pattern}/metrics.csv"))


def test_killed_failed_and_diverged_runs_of_several_workers_have_different_statuses(finish: Finish) -> None:
    Path("mine/model").mkdir(parents=True)
    Path("mine/faultynets.py").write_text(NETS)
    Path("mine/model/faulty.yaml").write_text("_target_: faultynets.Net\nfault: well\n")
    arguments = ("--config-dir", "mine", "model=faulty", "epochs=1", "data.limit=200", "run_dir=s", "sweep.jobs=2")
    _, err = finish(*arguments, "model.fault=well,dies,raises,diverges,fine", code=1)
    found = {row["model.fault"]: row for row in rows()}
    assert [row["status"] for row in found.values()] == ["done", "killed", "failed", "diverged", "done"]
    assert found["dies"]["error"].startswith("killed by signal 9")
    assert found["raises"]["error"] == "IndexError: an error in user code"
    assert float(found["well"]["val/top1"]) == float(found["fine"]["val/top1"])
    assert "error: model.fault=dies: killed: killed by signal 9" in err and "Traceback" not in err
    assert "Traceback" in Path("s/002-raises/log.txt").read_text()


def test_several_workers_give_the_results_of_one_process(finish: Finish) -> None:
    arguments = ("model=mlp,lenet5", "seed=0,1", "epochs=2", "data.limit=200")
    finish(*arguments, "sweep.jobs=2", "run_dir=two")
    finish(*arguments, "run_dir=one")
    assert without_time("two") == without_time("one")


@pytest.mark.parametrize("jobs", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_sweep_that_was_killed_twice_gives_the_same_results(jobs: int, finish: Finish) -> None:
    arguments = ("model=lenet5", "optimizer.lr=0.001,0.002,0.004,0.008", "epochs=5", f"sweep.jobs={jobs}")
    for pattern in ("00[01]-*", "00[23]-*"):
        process = start(*arguments, "run_dir=s", "resume=auto")
        before = epochs_done(pattern)
        wait_for(lambda pattern=pattern, before=before: epochs_done(pattern) > before, process)
        process.kill()
        process.communicate()
    out, _ = finish(*arguments, "run_dir=s", "resume=auto")
    assert "best: " in out
    assert any("resume: state from" in path.read_text() for path in Path("s").glob("*/log.txt"))
    finish(*arguments, "run_dir=uninterrupted")
    assert len(rows()) == 4 and without_time("s") == without_time("uninterrupted")
    for run in Path("uninterrupted").glob("*/metrics.csv"):
        mine, other = (table(path) for path in (Path("s") / run.parent.name / "metrics.csv", run))
        assert mine == other


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("number", "jobs"), [pytest.param(signal.SIGINT, 1, marks=pytest.mark.long), (signal.SIGTERM, 2)]
)
def test_a_stopped_sweep_can_be_resumed(number: signal.Signals, jobs: int, finish: Finish) -> None:
    arguments = ("model=lenet5", "optimizer.lr=0.001,0.002", "epochs=4", f"sweep.jobs={jobs}", "run_dir=s")
    process = start(*arguments)
    wait_for(lambda: epochs_done("*") > 0, process)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == 128 + number
    assert "stopped" not in {row["status"] for row in rows()}
    finish(*arguments, "resume=auto")
    assert [row["status"] for row in rows()] == ["done", "done"]
    assert all(epochs_done(f"00{number}-*") == 4 for number in range(2))


def test_tensorboard_shows_one_row_per_run(
    serve: Callable[[Path, int], contextlib.AbstractContextManager[str]], get: Callable[..., Any], finish: Finish
) -> None:
    space = ("model=mlp,lenet5", "optimizer.lr=0.01,0.003")
    finish(*space, "log.tensorboard=true", "epochs=2", "data.limit=200", "run_dir=s")
    with serve(Path("s"), 4) as address:
        experiment = get(address, "plugin/hparams/experiment", {"experimentName": ""})
        shown = {info["name"] for info in experiment["hparamInfos"]}
        assert {"optimizer.lr", "choices.model", "seed"} <= shown and not any("sweep" in name for name in shown)
        query = {
            "experimentName": "",
            "allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_RUNNING", "STATUS_FAILURE"],
            "colParams": [{"metric": info["name"]} for info in experiment["metricInfos"]],
            "startIndex": 0,
            "sliceSize": 20,
        }
        groups = get(address, "plugin/hparams/session_groups", query)["sessionGroups"]
    assert len(groups) == 4
    displayed = {}
    for group in groups:
        values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        displayed[group["hparams"]["choices.model"], f"{group['hparams']['optimizer.lr']:g}"] = values["best/top1"]
    expected = {(row["model"], row["optimizer.lr"]): float(row["val/top1"]) for row in rows()}
    assert displayed == pytest.approx(expected)
    assert sum(json.loads(p.read_text())["test"] is not None for p in Path("s").glob("*/results.json")) == 1
