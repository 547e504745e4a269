"""Killed processes and concurrent processes: no state is lost, and runs do not overwrite each other."""

import csv
import random
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from tests.fork_server import ForkServer
from tests.runs import assert_same_run

STEPS = 12
# AdamW with 5.6 million weights: a checkpoint of 64 MiB, so that writing it takes a measurable time.
LARGE = (
    *("model=mlp", "model.values.width=75000", f"steps={STEPS}", "batch_size=16", "checkpoint.every_steps=1"),
    *("data.limit=120", "threads=1", "log.figures=false", "log.tensorboard=false"),
)


def state(run: str) -> dict[str, torch.Tensor]:
    content = torch.load(f"{run}/checkpoints/last.pt", weights_only=True)["state"]
    moments = {f"{i} {name}": value for i, s in content["optimizer"]["state"].items() for name, value in s.items()}
    return {**content["model"], **moments}


def assert_same_bits(run: str, other: str) -> None:
    one, two = state(run), state(other)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.long
def test_a_run_killed_at_random_times_ends_with_the_same_bits(cnntrain) -> None:
    kills = 50
    started = time.monotonic()
    cnntrain.end(cnntrain.start(*LARGE, "run_dir=whole"), 0)
    whole_s = time.monotonic() - started
    assert Path("whole/checkpoints/last.pt").stat().st_size > 64 * 2**20
    rng = random.Random(kills)
    last, resumed = Path("run/checkpoints/last.pt"), 0
    for _ in range(kills):
        if last.exists() and torch.load(last, weights_only=True)["state"]["progress"]["finished"]:
            last.unlink()  # finished before the kill: start again
        process = cnntrain.start(*LARGE, "run_dir=run", "resume=auto")
        try:
            # Startup takes most of the time and writes nothing: kill after it.
            process.wait(whole_s * rng.uniform(0.6, 1.05))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), stderr
        resumed += "resume: state from" in stderr
    done = cnntrain(*LARGE, "run_dir=run", "resume=auto")
    assert_same_bits("run", "whole")
    assert sorted(p.name for p in last.parent.iterdir()) == ["best.pt", "last.pt"], (
        "temporary files of killed processes are removed"
    )
    print(f"{kills} kills, {resumed} resumed; {done.stderr.splitlines()[0]}")


@dataclass(frozen=True)
class Kill:
    """The time of a SIGKILL: the `call`-th call of a function of the program; see tests/fork_server.py."""

    at: str
    call: int
    when: str = "before"
    whom: str = "group"


# Six steps per epoch; every second one is saved. Functions are named by the module that calls them.
SMALL = (
    *("model=mlp", "model.values.width=8", "data.limit=200", "batch_size=32", "epochs=3", "ema_decay=0.9"),
    *("checkpoint.every_steps=2", "checkpoint.keep=2", "threads=1", "device=cpu", "precision=fp32"),
    "log.tensorboard=false",
)
MODES = {
    "plain": (*SMALL, "log.figures=false"),
    "figures": SMALL,
    "ranks": (*SMALL, "log.figures=false", "launch.devices=2"),
    "sweep": (*SMALL, "log.figures=false", "epochs=2", "-m", "optimizer.lr=0.001,0.01"),
    "parallel sweep": (*SMALL, "log.figures=false", "-m", "optimizer.lr=0.001,0.01", "sweep.jobs=2"),
}
RUN = {  # function: number of calls in a run
    "cnntrain.io.safe_files:os.replace": 22,  # of every file that is written atomically
    "cnntrain.io.safe_files:os.fsync": 30,  # between writing and renaming
    "cnntrain.train.checkpoint:write": 16,
    "cnntrain.train.loop:set_learning_rate": 18,
    "cnntrain.train.loop:evaluate": 3,  # after the last step of an epoch
    "cnntrain.train.checkpoint:CheckpointWriter.save": 9,
    "cnntrain.report.metrics:MetricsFile.append": 3,
    "cnntrain.report.run_logger:RunLogger.log_checkpoint": 3,
    "cnntrain.train.run:_evaluate": 2,
    "cnntrain.train.run_dir:RunDir.write_json": 2,
}
RESUMING = {
    "cnntrain.commands.train:load_resume_checkpoint": 1,
    "cnntrain.commands.train:resume": 1,
    "cnntrain.commands.train:copy_best_checkpoint": 1,
    "cnntrain.train.run_dir:remove_temporaries": 1,
    "cnntrain.report.metrics:MetricsFile._rewrite": 1,
}
OF_MODE = {
    "plain": RUN | RESUMING,
    "figures": {"cnntrain.report.run_logger:save_figure": 5},
    "ranks": RUN | RESUMING,
    "sweep": RUN | RESUMING | {"cnntrain.sweep.study:Study.finish_run": 2, "cnntrain.sweep.sweep_run:make_report": 1},
    "parallel sweep": {name: RUN[name] for name in RUN if "files" not in name},
}


def finish(server: ForkServer, mode: str, folder: str, *kills: Kill) -> int:
    """Run with each of the kills, then to the end; return the number of kills whose call was reached."""
    words, killed = (*MODES[mode], f"run_dir={folder}", "resume=auto"), 0
    for kill in kills:
        done = server.run(*words, kill=asdict(kill))
        # The other ranks end with exit code 4 if a rank is killed.
        assert done.returncode in (0, 4 if mode == "ranks" else -signal.SIGKILL), done.stderr
        killed += done.returncode != 0
    done = server.run(*words)
    assert done.returncode == 0, done.stderr
    return killed


def assert_same(mode: str, folder: str, whole: str = "whole") -> None:
    names = ("last", "best") if "sweep" in mode else ("last", "best", "epoch-00002", "epoch-00003")
    runs = sorted(path.parents[1].relative_to(whole) for path in Path(whole).rglob("last.pt"))
    assert len(runs) == (2 if "sweep" in mode else 1)
    for run in runs:
        assert_same_run(Path(whole, run), Path(folder, run), names)
        names_left = {path.name for path in Path(folder, run).rglob("*") if path.is_file()}
        assert names_left == {path.name for path in Path(whole, run).rglob("*") if path.is_file()}
    if "sweep" in mode:
        assert ranking(folder) == ranking(whole)


def ranking(folder: str) -> list[dict[str, str]]:
    with Path(folder, "results.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if "time" not in k and "_s" not in k} for row in csv.DictReader(file)]
    return sorted(rows, key=lambda row: sorted(row.items()))


SAMPLE = {
    "while writing a checkpoint": (
        "plain",
        (Kill("cnntrain.io.safe_files:os.replace", 5), Kill("cnntrain.io.safe_files:os.fsync", 9)),
    ),
    "between row and checkpoint": ("plain", (Kill("cnntrain.report.metrics:MetricsFile.append", 2, "after"),)),
    "between last.pt and best.pt": ("plain", (Kill("cnntrain.train.checkpoint:write", 3, "after"),)),
    "after the last step": ("plain", (Kill("cnntrain.train.loop:evaluate", 3),)),
    "before the results": ("plain", (Kill("cnntrain.train.run_dir:RunDir.write_json", 2),)),
    "while resuming": (
        "plain",
        (Kill("cnntrain.train.loop:set_learning_rate", 12), Kill("cnntrain.commands.train:resume", 1, "after")),
    ),
    "while drawing figures": ("figures", (Kill("cnntrain.report.run_logger:save_figure", 3),)),
    "in a sweep": (
        "sweep",
        (Kill("cnntrain.report.metrics:MetricsFile.append", 3), Kill("cnntrain.sweep.study:Study.finish_run", 1)),
    ),
    "with two ranks": ("ranks", (Kill("cnntrain.report.metrics:MetricsFile.append", 2, whom="process"),)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_run_killed_at_a_chosen_call_ends_like_an_unbroken_run(name: str, fork_server: ForkServer) -> None:
    mode, kills = SAMPLE[name]
    finish(fork_server, mode, "whole")
    assert finish(fork_server, mode, "broken", *kills) == len(kills)
    assert_same(mode, "broken")


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "kills"), [("plain", 60), ("figures", 10), ("sweep", 15), ("ranks", 10), ("parallel sweep", 5)]
)
def test_a_hundred_kills_at_random_calls(mode: str, kills: int, fork_server: ForkServer) -> None:
    """One to three kills per run, some of them while it resumes."""
    rng, done, runs = random.Random(kills), 0, 0
    finish(fork_server, mode, "whole")
    while done < kills:
        planned = []
        for _ in range(min(rng.randint(1, 3), kills - done)):
            at, most = rng.choice(list(OF_MODE[mode].items()))
            whom = "process" if mode == "ranks" else "group"
            planned.append(Kill(at, rng.randint(1, most), rng.choice(("before", "after")), whom))
        runs += 1
        killed = finish(fork_server, mode, f"run{runs}", *planned)
        done += killed
        assert_same(mode, f"run{runs}")
    print(f"{mode}: {done} kills of {runs} runs")


@pytest.mark.slow
def test_a_second_process_is_rejected_until_the_first_is_dead(cnntrain, wait_for) -> None:
    endless = (*cnntrain.quick, "epochs=1000000", "run_dir=run", "resume=auto")
    first = cnntrain.start(*endless)
    wait_for(Path("run/checkpoints/last.pt").exists, first)
    assert "another process is using run" in cnntrain(*endless, code=2).stderr
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = cnntrain(
        *cnntrain.quick, "epochs=1000000", "early_stopping=1", "optimizer.lr=0", "run_dir=run", "resume=auto"
    )
    assert "resume: state from" in done.stderr


@pytest.mark.slow
def test_runs_started_at_the_same_time_have_separate_folders(cnntrain) -> None:
    runs = [cnntrain.start(*cnntrain.quick, "epochs=1") for _ in range(4)]
    for run in runs:
        cnntrain.end(run, 0)
    folders = [path.parent for path in Path("outputs").rglob("results.json")]
    assert len(folders) == len(set(folders)) == 4
    assert all((folder / "checkpoints" / "last.pt").exists() for folder in folders)
