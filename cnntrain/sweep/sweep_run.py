"""A sweep from its command line to its answer; read it from top to bottom."""

import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from optuna.exceptions import OptunaError

from cnntrain.config.command_text import MASK, command_text, typed, without_passwords
from cnntrain.config.invocation import Invocation
from cnntrain.errors import CnntrainError, MachineError, StoppedError, UserError
from cnntrain.io.safe_files import read_json
from cnntrain.plots.figure import log_plot_errors
from cnntrain.report.console import console, log_to_console
from cnntrain.report.table import print_rows
from cnntrain.report.tensorboard import TensorBoardWriter
from cnntrain.sweep.execute_run import SweepTarget, test_quietly
from cnntrain.sweep.plan import Repeat, Run, SweepPlan, read_plan, repeats_text
from cnntrain.sweep.results import (
    SweepReport,
    draw,
    make_report,
    ranking_rows,
    summary_lines,
    write_csv_of_runs,
    write_report,
)
from cnntrain.sweep.storage import ABOUT, JOURNAL, database_errors, open_study, storage_problem
from cnntrain.sweep.study import Outcome, Study, Trial
from cnntrain.sweep.sweep_progress import SweepProgress
from cnntrain.sweep.trial_workers import InProcessRunner, ProcessPoolRunner
from cnntrain.train.run_dir import RunDir, open_run_dir, provenance
from cnntrain.train.signals import StopFlag, stop_flag

log = logging.getLogger("cnntrain")


def run_sweep(invocation: Invocation, job: SweepTarget) -> int:
    """Run `job` for every setting that the sweep tries; the exit code: 0, or 1 when a run failed or was killed, a
    verdict was FAIL, or nothing came to its end.

    Raises:
        UserError: something is wrong that can be told before anything runs.
        StoppedError: a signal came; `resume=auto run_dir=FOLDER` goes on.
    """
    log_to_console()
    plan = read_plan(invocation, ranked=job.test is not None)
    if invocation.print_config:
        print(yaml.safe_dump(without_passwords(dataclasses.asdict(plan.base)), sort_keys=False), end="")
        return 0
    if len({repeat.split for repeat in plan.repeats}) > 1:
        log.info("each setting is trained %d times: %s", len(plan.repeats), repeats_text(plan.repeats))
    with open_run_dir(_folder(plan), "sweep") as folder, stop_flag() as stop:
        if (folder.path / ABOUT).exists() and plan.base.resume == "none":
            raise UserError(
                f"run_dir: {folder.path} already contains a sweep; continue it with resume=auto, or choose another "
                "folder"
            )
        study = open_study(plan, folder.path, None if plan.base.steps else plan.base.epochs)
        if not (folder.path / "run.json").exists():
            folder.write_json("run.json", provenance(invocation.line))
        with _told_how_to_go_on(invocation, plan, folder.path) as going_on:
            try:
                over = _work_off(plan, job, study, folder.path, stop, going_on)
            finally:
                write_csv_of_runs(folder.path, plan, study.trials())
            stop.check()
            answer = make_report(plan, study)
            again = _judge_winner(answer, job, folder.path, over)
        if plan.base.log.figures:
            with log_plot_errors("the sweep's figures"):
                answer.pictures = draw(answer, folder.path)
        write_report(answer, folder.path, invocation.line, again)
    _print(answer, study, folder.path, again)
    return _exit_code(answer)


@contextlib.contextmanager
def _told_how_to_go_on(invocation: Invocation, plan: SweepPlan, folder: Path) -> Iterator[str]:
    """Yield the command that resumes the sweep; add it to the error if a signal or a storage error ends the sweep."""
    command = invocation.line_with(run_dir=folder, resume="auto")
    command += f" (replace {MASK} by the password)" if MASK in command else ""
    try:
        yield command
    except StoppedError as error:
        number = error.exit_code - 128
        raise StoppedError(
            number,
            f"stopped by {signal.Signals(number).name}; unfinished runs are saved; to continue: {command}",
        ) from error
    except (OptunaError, *database_errors(plan.sweep.storage)) as error:
        problem = storage_problem(plan.sweep.storage or folder / JOURNAL, error)
        raise MachineError(f"{problem}\nto continue: {command}") from error


def _folder(plan: SweepPlan) -> Path | None:
    """Where the sweep lives, as `run_dir` or `resume` say; None for a new folder under outputs/."""
    if plan.base.resume not in ("none", "auto"):
        folder = Path(plan.base.resume)
        if not (folder / ABOUT).is_file():
            raise UserError(f"resume: {folder} holds no sweep; resume=auto run_dir=FOLDER goes on with one")
        return folder
    if plan.base.resume == "auto" and not plan.base.run_dir:
        raise UserError(
            "resume: auto continues the sweep in run_dir, but run_dir is not set; add run_dir=FOLDER, or name the "
            "sweep with resume=FOLDER"
        )
    return Path(plan.base.run_dir) if plan.base.run_dir else None


def _work_off(
    plan: SweepPlan, job: SweepTarget, study: Study, folder: Path, stop: StopFlag, going_on: str
) -> bool:
    """Run trials until none is left or a stop is requested.

    Returns True if the sweep is complete: all trials have run, here and on other machines, or its time budget is used
    up.

    Args:
        going_on: the command that resumes the sweep.
    """
    board, queue = SweepProgress(plan), RunQueue(plan, study, folder)
    monitor, jobs = plan.monitor[0] if plan.monitor else None, plan.sweep.jobs
    for trial in study.trials():
        for outcome in trial.outcomes.values():
            board.note(outcome, trial.number, trial.values)
    deadline = math.inf if plan.sweep.timeout_s is None else time.monotonic() + plan.sweep.timeout_s

    def report(run: Run, epoch: int, value: float) -> bool:
        """Report a metric after an epoch; return True if the run should be pruned. The first repeat decides."""
        board.epoch(run, epoch, value)
        return (
            plan.sweep.pruner != "none"
            and run.repeat == plan.repeats[0]
            and study.report(run.trial, epoch, value)
        )

    pool = (
        ProcessPoolRunner(job.run, monitor, report, jobs)
        if jobs > 1
        else InProcessRunner(job.run, monitor, report)
    )
    try:
        with board:
            while True:
                if stop.number is not None:
                    queue.close("stopped")
                    pool.stop()
                elif time.monotonic() > deadline:
                    queue.close(f"sweep.timeout_s={plan.sweep.timeout_s:g} is over")
                while pool.free and (run := queue.next()):
                    board.started(run)
                    board.to_come = queue.left
                    pool.start(run)
                if not pool.busy:
                    break
                for run, outcome in pool.ended():
                    if outcome.status == "stopped":
                        continue  # it goes on when the sweep does
                    queue.ended(run, outcome)
                    board.to_come = queue.left
                    board.ended(run, outcome)
                    write_csv_of_runs(folder, plan, study.trials())
                    if outcome.status in ("failed", "killed") and plan.sweep.on_error == "stop":
                        queue.close("sweep.on_error=stop")
    except StoppedError:
        queue.close("stopped")
        raise
    finally:
        pool.close()
        if queue.closed not in ("", "stopped") and queue.left:
            log.info("%s: no further runs are started; to continue: %s", queue.closed, going_on)
    return time.monotonic() > deadline or all(trial.state == "ended" for trial in study.trials())


@dataclass
class _Open:
    """An unfinished trial: its waiting repeats and its running repeats."""

    trial: Trial
    waiting: list[Repeat]
    running: set[Repeat] = field(default_factory=set)


class RunQueue:
    """Choose the next run. With a pruner, the other repeats of a setting wait until its first run was not pruned."""

    def __init__(self, plan: SweepPlan, study: Study, folder: Path) -> None:
        self.plan, self.study, self.folder = plan, study, folder
        self.closed = ""
        self._open: dict[int, _Open] = {}

    def next(self) -> Run | None:
        """A run to begin now, or None."""
        while not self.closed:
            for each in self._open.values():
                if each.waiting and not self._held(each):
                    repeat = each.waiting.pop(0)
                    each.running.add(repeat)
                    return self.plan.run(each.trial.number, each.trial.values, repeat, self.folder)
            trial = self.study.ask()
            if trial is None:
                return None
            pruned = any(outcome.status == "pruned" for outcome in trial.outcomes.values())
            waiting = [each for each in self.plan.repeats if each not in trial.outcomes and not pruned]
            self._open[trial.number] = _Open(trial, waiting)
            self._close_if_over(trial.number)
        return None

    def ended(self, run: Run, outcome: Outcome) -> None:
        """Write down how a run ended; its setting is told once all its runs have."""
        self.study.record(run.trial, run.repeat, outcome)
        each = self._open[run.trial]
        each.running.discard(run.repeat)
        if outcome.status == "pruned":
            each.waiting.clear()
        self._close_if_over(run.trial)

    def close(self, reason: str) -> None:
        """Begin nothing more."""
        self.closed = self.closed or reason

    @property
    def left(self) -> int:
        """Runs that have not begun, at most."""
        begun = sum(len(each.waiting) for each in self._open.values())
        return begun + self.study.waiting * len(self.plan.repeats)

    def _held(self, each: _Open) -> bool:
        return self.plan.sweep.pruner != "none" and self.plan.repeats[0] in each.running

    def _close_if_over(self, number: int) -> None:
        each = self._open[number]
        if not each.waiting and not each.running:
            self.study.finish(number)
            del self._open[number]


def _judge_winner(answer: SweepReport, job: SweepTarget, folder: Path, over: bool) -> str | None:
    """Evaluate every repeat of the winning setting on the test set after the sweep; return the winner's command."""
    if not answer.standings or job.test is None:
        return None
    winner, plan = answer.standings[0], answer.plan
    runs = [plan.run(winner.trial.number, winner.trial.values, repeat, folder) for repeat in winner.values]
    if over and all((run.folder / "results.json").is_file() for run in runs):  # else another machine has them
        try:
            answer.test = [_test_metrics(run, job, plan.base.log.tensorboard) for run in runs]
        except CnntrainError as error:  # most often: these data have no test set
            log.info("the best has no figure on the test set: %s", str(error).splitlines()[0])
    return runs[0].command


def _test_metrics(run: Run, job: SweepTarget, tensorboard: bool) -> dict[str, float]:
    """The test set's metrics, from the run's results.json, where they are put when they are known."""
    results = read_json(
        run.folder / "results.json",
        f"{run.command} {typed(run_dir=run.folder, resume='auto')} rewrites it",
    )
    if not results.get("test"):
        results["test"] = test_quietly(job, run)
        RunDir(run.folder).write_json("results.json", results)
        if tensorboard:
            with TensorBoardWriter(run.folder) as events:
                events.scalars(results["test"], results["steps"])
    return results["test"]


def _print(answer: SweepReport, study: Study, folder: Path, again: str | None) -> None:
    rows = [
        {key: value[:60] if isinstance(value, str) else value for key, value in row.items()}
        for row in ranking_rows(answer)
    ]
    print_rows(rows, title="sweep", console=console)
    for line in summary_lines(answer):
        print(line)
    if study.repeats:
        print(f"{study.repeats} settings were drawn again, and not trained again")
    if again:
        print(f"to repeat a run of the best setting: {again}")
    print(f"sweep folder: {folder} (results.md, results.csv{', figures/' if answer.pictures else ''})")
    if answer.plan.base.log.tensorboard and answer.standings:
        print(f"look next:    {command_text(['tensorboard', '--logdir', folder])}")


def _exit_code(answer: SweepReport) -> int:
    """A run that diverged is a result, the worst; one that failed or was killed is none."""
    outcomes = [outcome for trial in answer.trials for outcome in trial.outcomes.values()]
    failed = any(o.status in ("failed", "killed") or o.figures.get("verdict") == "FAIL" for o in outcomes)
    return 1 if failed or not any(o.status == "done" for o in outcomes) else 0
