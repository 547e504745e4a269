"""Progress of a sweep on a terminal and in a log file."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from cnntrain.sweep.plan import Repeat, SweepPlan
from cnntrain.sweep.study import Outcome
from cnntrain.sweep.sweep_progress import SweepProgress

OUTCOMES = [
    Outcome("done", 0.91, {"epoch": 3, "val/top1": 0.91}, time_s=4.0),
    Outcome("done", 0.95, {"epoch": 2, "val/top1": 0.95}, time_s=4.0),
    Outcome("killed", error="killed by signal 9", time_s=1.0),
    Outcome("pruned", 0.3, time_s=2.0),
]


def run_outcomes(plan: SweepPlan, console: Console) -> SweepProgress:
    progress = SweepProgress(plan, console)
    with progress:
        progress.pending = 2
        for seed, outcome in enumerate(OUTCOMES):
            values = {"model": "mlp", "optimizer.lr": f"0.{seed}1234567890"}
            run = plan.make_run(seed, values, Repeat(seed), Path("s"))
            progress.start_run(run)
            progress.update_run(run, 1, 0.5)
            progress.finish_run(run, outcome)
        progress.start_run(dataclasses.replace(run, trial=9))
        progress.update_run(dataclasses.replace(run, trial=9), 7, 0.123)
        drawn = Console(file=io.StringIO(), width=110)
        drawn.print(progress._draw())
        assert isinstance(drawn.file, io.StringIO)
        progress.drawn = drawn.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    return progress


def test_a_log_has_a_line_per_run_and_errors_immediately(plan: Callable[..., SweepPlan]) -> None:
    console = Console(file=io.StringIO(), width=80)
    run_outcomes(plan("model=mlp,lenet5"), console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("[1/3] model=mlp optimizer.lr=0.01235: done val/top1 0.91, 4.0 s, about")
    assert "error: model=mlp optimizer.lr=0.2123: killed: killed by signal 9" in lines
    assert any(line.startswith("[4/6]") and "pruned" in line for line in lines)


def test_the_table_shows_running_runs_the_best_setting_and_the_time_left(plan: Callable[..., SweepPlan]) -> None:
    terminal = Console(file=io.StringIO(), width=110, force_terminal=True)
    drawn = run_outcomes(plan("model=mlp,lenet5"), terminal).drawn  # pyright: ignore[reportAttributeAccessIssue]
    assert "sweep of 7 runs: 1 running, 2 done, 1 killed, 1 pruned, 2 pending" in drawn
    assert "best so far: val/top1 0.95 (model=mlp optimizer.lr=0.1123)" in drawn
    assert "0.123" in drawn and "running" in drawn and "left" in drawn


def test_lower_is_better_with_mode_min(plan: Callable[..., SweepPlan]) -> None:
    plan_ = plan("model=mlp,lenet5")
    progress = SweepProgress(dataclasses.replace(plan_, monitor=("nme", "min")), Console(file=io.StringIO()))
    for trial, value in enumerate((0.3, 0.1, 0.2)):
        progress.count(Outcome("done", value), trial, {"model": str(value)})
    assert progress.best == (0.1, "model=0.1")


def test_the_best_setting_is_selected_by_its_mean(plan: Callable[..., SweepPlan]) -> None:
    progress = SweepProgress(plan("model=mlp,lenet5", "data.folds=3"), Console(file=io.StringIO()))
    for trial, values in enumerate([(0.5, 0.99, 0.4), (0.7, 0.7, 0.7), (0.98, 0.98)]):
        for value in values:
            progress.count(Outcome("done", value), trial, {"model": str(trial)})
    assert progress.best is not None and progress.best[1] == "model=1"
