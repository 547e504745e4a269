"""Run a sweep, from the command line to the report."""

import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from cnntrain.config.command_line import MASK, Invocation, format_command, format_overrides, without_passwords
from cnntrain.errors import CnntrainError, MachineError, StoppedError, UserError
from cnntrain.io.safe_files import read_json
from cnntrain.plots.figure import log_plot_errors
from cnntrain.report.console import log_to_console, print_rows
from cnntrain.report.tensorboard import TensorBoardWriter
from cnntrain.sweep.plan import PlannedRun, SweepPlan, read_plan, repeats_text
from cnntrain.sweep.results import (
    SweepReport,
    draw_figures,
    make_report,
    ranking_rows,
    summary_lines,
    write_report,
    write_results_csv,
)
from cnntrain.sweep.run_workers import InProcessRunner, ProcessPoolRunner, SweepTarget, run_log
from cnntrain.sweep.study import SWEEP_FILE, Study, open_study, storage_errors, storage_problem
from cnntrain.sweep.sweep_progress import SweepProgress
from cnntrain.train.run_dir import RunDir, open_run_dir, provenance
from cnntrain.train.signals import StopFlag, stop_flag

log = logging.getLogger("cnntrain")


def run_sweep(invocation: Invocation, target: SweepTarget) -> int:
    """Run `target` for every trial of the sweep and report the results.

    Returns:
        Exit code: 1 if a run failed or was killed, a verdict is FAIL, or no run completed; else 0.

    Raises:
        UserError: a setting is invalid; raised before anything runs.
        StoppedError: a signal requested a stop; `resume=auto run_dir=FOLDER` continues the sweep.
        MachineError: the storage failed.
    """
    log_to_console()
    plan = read_plan(invocation, ranked=target.test is not None)
    if invocation.print_config:
        print(yaml.safe_dump(without_passwords(dataclasses.asdict(plan.base)), sort_keys=False), end="")
        return 0
    if len({repeat.split for repeat in plan.repeats}) > 1:
        log.info("each trial is trained %d times: %s", len(plan.repeats), repeats_text(plan.repeats))
    with open_run_dir(_sweep_folder(plan), "sweep") as run_dir, stop_flag() as stop:
        folder = run_dir.path
        if (folder / SWEEP_FILE).exists() and plan.base.resume == "none":
            raise UserError(
                f"run_dir: {folder} already contains a sweep; continue it with resume=auto, or choose another folder"
            )
        study = open_study(plan, folder)
        if not (folder / "run.json").exists():
            run_dir.write_json("run.json", provenance(invocation.command_line))
        with _errors_with_resume_command(invocation, plan, folder) as resume_command:
            try:
                complete = _run_trials(target, study, stop, resume_command)
            finally:
                write_results_csv(folder, study.trials())
            stop.check()
            report = make_report(study)
            winner_command = _test_winner(report, target, folder, complete)
        if plan.base.log.figures:
            with log_plot_errors("the sweep's figures"):
                report.figures = draw_figures(report, folder)
        write_report(report, folder, invocation.command_line, winner_command)
    _print_report(report, study, folder, winner_command)
    outcomes = [outcome for trial in report.trials for outcome in trial.outcomes.values()]
    # A diverged run is a result, the worst one. A failed or killed run has none.
    failed = any(o.status in ("failed", "killed") or o.metrics.get("verdict") == "FAIL" for o in outcomes)
    return 1 if failed or not any(o.status == "done" for o in outcomes) else 0


@contextlib.contextmanager
def _errors_with_resume_command(invocation: Invocation, plan: SweepPlan, folder: Path) -> Iterator[str]:
    """Yield the command that resumes the sweep; add it to the error if a signal or a storage error ends the sweep."""
    command = invocation.command_line_with(run_dir=folder, resume="auto")
    command += f" (replace {MASK} by the password)" if MASK in command else ""
    try:
        yield command
    except StoppedError as error:
        number = error.signal_number
        name = signal.Signals(number).name
        message = f"stopped by {name}; unfinished runs are saved; to continue: {command}"
        raise StoppedError(number, message) from error
    except storage_errors(plan.sweep.storage) as error:
        raise MachineError(f"{storage_problem(plan, folder, error)}\nto continue: {command}") from error


def _sweep_folder(plan: SweepPlan) -> Path | None:
    """Return the folder given by `run_dir` or `resume`; None for a new folder under outputs/."""
    resume, run_dir = plan.base.resume, plan.base.run_dir
    if resume not in ("none", "auto"):
        if not Path(resume, SWEEP_FILE).is_file():
            raise UserError(f"resume: {resume} contains no sweep; to continue a sweep use resume=auto run_dir=FOLDER")
        return Path(resume)
    if resume == "auto" and not run_dir:
        raise UserError(
            "resume: auto continues the sweep in run_dir, but run_dir is not set; add run_dir=FOLDER, or name the "
            "sweep with resume=FOLDER"
        )
    return Path(run_dir) if run_dir else None


def _run_trials(target: SweepTarget, study: Study, stop: StopFlag, resume_command: str) -> bool:
    """Run trials until none is left, the time budget is used up, or a stop is requested.

    Returns True if the sweep is complete: all trials have finished, here and on other machines, or its time budget is
    used up.
    """
    plan, progress = study.plan, SweepProgress(study.plan)
    for trial in study.trials():
        for outcome in trial.outcomes.values():
            progress.count(outcome, trial.number, trial.values)
    deadline = math.inf if plan.sweep.timeout_s is None else time.monotonic() + plan.sweep.timeout_s
    closed = ""  # why no further runs are started

    def should_prune(run: PlannedRun, epoch: int, value: float) -> bool:
        progress.update_run(run, epoch, value)
        return study.should_prune(run, epoch, value)

    arguments = target.run, plan.monitor[0] if plan.monitor else None, should_prune
    jobs = plan.sweep.jobs
    runner = ProcessPoolRunner(*arguments, jobs) if jobs > 1 else InProcessRunner(*arguments)
    try:
        with progress:
            while True:
                if stop.number is not None:
                    closed = closed or "stopped"
                    runner.stop()
                elif time.monotonic() > deadline:
                    closed = closed or f"sweep.timeout_s={plan.sweep.timeout_s:g} is over"
                while not closed and len(runner.running) < jobs and (run := study.next_run()):
                    progress.start_run(run)
                    progress.pending = study.num_pending
                    runner.start(run)
                if not runner.running:
                    break
                for run, outcome in runner.collect_finished():
                    if outcome.status == "stopped":
                        continue  # the run continues when the sweep is resumed
                    study.finish_run(run, outcome)
                    progress.pending = study.num_pending
                    progress.finish_run(run, outcome)
                    write_results_csv(study.folder, study.trials())
                    if outcome.status in ("failed", "killed") and plan.sweep.on_error == "stop":
                        closed = closed or "sweep.on_error=stop"
    finally:
        runner.close()
    if closed not in ("", "stopped") and study.num_pending:
        log.info("%s: no further runs are started; to continue: %s", closed, resume_command)
    return time.monotonic() > deadline or all(trial.is_finished for trial in study.trials())


def _test_winner(report: SweepReport, target: SweepTarget, folder: Path, complete: bool) -> str | None:
    """Evaluate the winner's runs on the test set if the sweep is complete; return the command of the first of them."""
    if not report.ranking or target.test is None:
        return None
    winner, plan = report.ranking[0], report.plan
    runs = [plan.make_run(winner.trial.number, winner.trial.values, repeat, folder) for repeat in winner.values]
    # Runs without results.json belong to another machine.
    if complete and all((run.folder / "results.json").is_file() for run in runs):
        try:
            report.test = [_test_metrics(run, target, plan.base.log.tensorboard) for run in runs]
        except CnntrainError as error:  # usually because the dataset has no test set
            log.info("no test metrics for the best trial: %s", str(error).splitlines()[0])
    return runs[0].command


def _test_metrics(run: PlannedRun, target: SweepTarget, tensorboard: bool) -> dict[str, float]:
    """Return the test metrics from the run's results.json; evaluate and store them there if they are missing."""
    remedy = f"{run.command} {format_overrides(run_dir=run.folder, resume='auto')} rewrites it"
    results = read_json(run.folder / "results.json", remedy)
    if not results.get("test"):
        assert target.test is not None
        with run_log(run):
            results["test"] = target.test(run.settings(), run.command)
        RunDir(run.folder).write_json("results.json", results)
        if tensorboard:
            with TensorBoardWriter(run.folder) as events:
                events.scalars(results["test"], results["steps"])
    return results["test"]


def _print_report(report: SweepReport, study: Study, folder: Path, winner_command: str | None) -> None:
    rows = ranking_rows(report)
    for row in rows:
        row.update({key: value[:60] for key, value in row.items() if isinstance(value, str)})
    print_rows(rows, title="sweep")
    for line in summary_lines(report):
        print(line)
    if study.num_duplicates:
        print(f"duplicate draws of the sampler, not trained again: {study.num_duplicates}")
    if winner_command:
        print(f"to repeat a run of the best trial: {winner_command}")
    print(f"sweep folder: {folder} (results.md, results.csv{', figures/' if report.figures else ''})")
    if report.plan.base.log.tensorboard and report.ranking:
        print(f"look next:    {format_command(['tensorboard', '--logdir', folder])}")
