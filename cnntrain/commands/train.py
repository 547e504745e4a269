"""Train a network, select its best epoch on validation data, and use the test set once, at the end.

`train` is the default command: `cnntrain model=resnet18 data=fashion_mnist` trains.
"""

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cnntrain.checks.lint import lint
from cnntrain.commands.evaluate import evaluate_checkpoint
from cnntrain.config.command_line import Invocation, chosen_options, without_passwords
from cnntrain.config.compose import read_command_settings, read_settings
from cnntrain.config.schema import EvaluateSettings, Settings
from cnntrain.errors import CheckFailedError, UserError
from cnntrain.io.safe_files import read_text, run_folder_of
from cnntrain.io.streams import flush_or_discard
from cnntrain.report.compare import judge_expectations, parse_expectation
from cnntrain.report.console import log_to_console, print_findings, print_run_summary, silence_log
from cnntrain.report.run_logger import RunLogger
from cnntrain.sweep.search_space import swept_by_config
from cnntrain.train.checkpoint import CheckpointWriter, checkpoint_metadata
from cnntrain.train.distributed import SINGLE, RankInfo, World, check_launch, rank_from_env, replica_tensors, uses_gpus
from cnntrain.train.loop import Logger
from cnntrain.train.optim import learning_rate_at
from cnntrain.train.prepare import prepare_training
from cnntrain.train.resume import (
    changed_settings,
    copy_best_checkpoint,
    find_run_dir,
    finished_results,
    flatten_settings,
    keep_resolved_values,
    load_resume_checkpoint,
    resume,
    run_identity,
)
from cnntrain.train.run import fit_and_test
from cnntrain.train.run_dir import RunDir, lock_run_dir, needs_lock, open_run_dir, provenance
from cnntrain.train.setup import build_components
from cnntrain.train.signals import stop_flag

if TYPE_CHECKING:
    from cnntrain.train.launch import WorkerContext

log = logging.getLogger("cnntrain")
EpochCallback = Callable[[dict[str, float]], None]  # takes the row of metrics.csv after each epoch
NO_HPARAMS = ("run_dir", "resume", "log", "expect", "sweep")  # settings not shown in the HParams tab


def run(invocation: Invocation) -> int:
    if invocation.multirun:
        if rank_from_env():
            raise UserError("-m: a sweep is one process; start it without torchrun or srun, with launch.devices=N")
        # Imported here because they import optuna, which a single run does not need.
        from cnntrain.sweep.run_workers import SweepTarget
        from cnntrain.sweep.sweep_run import run_sweep

        return run_sweep(invocation, SweepTarget(train_run, evaluate_run))
    settings = read_settings(invocation.overrides, invocation.config_dir)
    if swept := swept_by_config(settings, invocation.overrides):
        raise UserError(f"sweep.over: this config sweeps over {', '.join(swept)}; add -m, or give each one value")
    results = train(settings, invocation.command_line)
    findings = []
    if settings.expect and results:
        experiment = [o for o in invocation.overrides if o.startswith("experiment=")]
        own = dataclasses.asdict(read_settings(experiment, invocation.config_dir))
        changed = [
            key for key, _, _ in changed_settings(own, dataclasses.asdict(settings)) if key.split(".")[0] != "expect"
        ]
        findings = judge_expectations(settings.expect, results, changed)
        print_findings(findings)
    return 1 if any(finding.verdict == "FAIL" for finding in findings) else 0


def train(
    settings: Settings, command_line: str = "", test: bool = True, on_epoch: EpochCallback | None = None
) -> dict[str, Any]:
    """Train and return the content of results.json plus `run_dir`.

    If `launch.devices` is above 1, start that many ranks. Under torchrun or srun, this process is one of the ranks, and
    all ranks but rank 0 return {}.

    Args:
        test: evaluate the test set at the end; a sweep does so only for its winner.
        on_epoch: called after each epoch; an exception ends the run with its state saved.
    """
    log_to_console()
    if info := rank_from_env():
        check_launch(settings, info)
        with _joined(info, settings) as world:
            return _train(settings, command_line, test, on_epoch, world)
    if settings.launch.devices == 1:
        return _train(settings, command_line, test, on_epoch, SINGLE)
    check_launch(settings, None)
    from cnntrain.train.launch import launch  # slow to import

    return launch(_launched, settings.launch.devices, settings, command_line, test, on_epoch=on_epoch)


def _ending_key(saved: Mapping[str, Any], settings: Settings) -> str:
    """Return the setting that ends a finished run now; the run may have been trained with others."""
    patience = settings.early_stopping
    if patience is not None and saved["state"]["progress"]["epochs_since_best"] >= patience:
        return "early_stopping"
    return "steps" if settings.steps else "epochs"


def _launched(context: "WorkerContext", settings: Settings, command_line: str, test: bool) -> dict[str, Any]:
    """Train as one of the ranks that `train` started."""
    from cnntrain.train.launch import run_rank

    def work() -> dict[str, Any]:
        log_to_console()
        with _joined(context.rank_info(), settings, launched=True, end=context.end) as world:
            return _train(settings, command_line, test, context.on_epoch if context.metrics_pipe else None, world)

    return run_rank(context, work)


@contextlib.contextmanager
def _joined(info: RankInfo, settings: Settings, **more: Any) -> Iterator[World]:
    from cnntrain.train.process_group import join_process_group

    if info.rank:
        silence_log()
    with join_process_group(info, uses_gpus(settings.device), settings.launch.timeout_s, **more) as world:
        yield world


def _train(
    settings: Settings, command_line: str, test: bool, on_epoch: EpochCallback | None, world: World
) -> dict[str, Any]:
    """Train in this process, which is a single process or one of several ranks."""
    folder = find_run_dir(settings)
    # Lock before reading: a process that still trains in this folder may write a newer state at any time.
    locked = world.is_main and folder is not None and needs_lock(folder)
    with lock_run_dir(folder) if folder and locked else contextlib.nullcontext():
        world.barrier()
        return _train_in(folder, locked, settings, command_line, test, on_epoch, world)


def _train_in(
    folder: Path | None,
    locked: bool,
    settings: Settings,
    command_line: str,
    test: bool,
    on_epoch: EpochCallback | None,
    world: World,
) -> dict[str, Any]:
    """Train in `folder`, which is locked if it contains a run."""
    source, saved = load_resume_checkpoint(settings) or (None, None)
    if saved and folder and (done := finished_results(saved, folder, settings)):
        key = _ending_key(saved, settings)
        log.info("%s: this run is finished, nothing to do; give a larger %s= to train on", source, key)
        return done
    for name, wanted in (settings.expect or {}).items():
        parse_expectation(name, wanted)
    found = world.all_gather(saved["state"]["progress"]["step"] if saved else None)
    if len(set(found)) > 1:
        raise UserError(f"resume: the ranks see different checkpoints (steps {found}); use a shared folder")
    if settings.check.first and saved is None and world.is_main:
        _check_first(settings, command_line)
    chosen = keep_resolved_values(settings, saved, world) if saved else settings
    components = build_components(chosen, world=world, resumes=saved is not None)
    # The checkpoint's config has the configured values; the resolved values of `auto` are stored beside it.
    configured = {"precision": settings.precision, "threads": settings.threads}
    components.settings = dataclasses.replace(components.settings, **configured)
    data = components.load()
    if not test:
        data.test = None
    plan, state = prepare_training(components, data)
    settings = components.settings  # with the values of `auto` and those that follow from pretrained weights
    for finding in lint(components, data, plan, command_line):
        log.warning("config: %s: %s; %s", finding.evidence, finding.cause, finding.remedy)
    best = None
    if saved and source:
        best = resume(state, saved, source, components, data)
        state.progress.best = world.broadcast(state.progress.best)  # only rank 0 may see the best checkpoint
        if not state.progress.best and not state.progress.batch and state.progress.step >= plan.total_steps:
            raise UserError(
                f"resume: best.pt beside {source} is missing, and nothing is left to train; give a larger epochs= to "
                "train on and select a best epoch again"
            )
    world.broadcast_(list(replica_tensors(state).values()))
    with (
        _run_folder(folder, settings.label, world, locked) as run_dir,
        stop_flag(world.stop if world.size > 1 else None) as stop,
    ):  # all checks that can refuse the run are done
        if world.is_main:
            if saved is None and run_dir.last.exists():
                raise UserError(f"run_dir: another process has started a run in {run_dir.path}; choose another folder")
            if best:
                copy_best_checkpoint(best, run_dir.best)
            config = without_passwords(dataclasses.asdict(settings))
            run_dir.write_text("config.yaml", yaml.safe_dump(config, sort_keys=False))
            run_dir.write_json("run.json", {**provenance(command_line), "data": data.fingerprint})
        same_folder = source is not None and run_folder_of(source).resolve() == run_dir.path.resolve()
        metadata = checkpoint_metadata(components, data, run_identity(saved, same_folder))

        def learning_rate(step: int) -> float:
            return learning_rate_at(state.optimizer, state.schedule, step)

        with (
            CheckpointWriter(run_dir, state, metadata, settings.checkpoint.keep, world.is_main) as writer,
            RunLogger(run_dir.path, components, plan, state.progress, on_epoch, learning_rate)
            if world.is_main
            else contextlib.nullcontext(Logger()) as logger,
        ):
            if isinstance(logger, RunLogger):
                hparams = {key: value for key, value in metadata["config"].items() if key not in NO_HPARAMS}
                logger.start(flatten_settings(hparams), read_text(run_dir.path / "config.yaml"), data.test is not None)
            results = fit_and_test(components, data, plan, state, writer, logger, stop)
        if not world.is_main:
            return {}
        run_dir.write_json("results.json", results)
    _print_summary(results, run_dir.path, components.task.monitor[0], command_line)
    return {**results, "run_dir": str(run_dir.path)}


def _print_summary(results: Mapping[str, Any], folder: Path, metric: str, command_line: str) -> None:
    """Print the results; an output that cannot be written (a full disk) is a warning."""
    options = chosen_options(command_line, ("--config-dir", "trusted_packages"))
    lost = None
    try:
        print_run_summary(results, folder, metric, options=options)
    except BrokenPipeError:
        raise
    except OSError as error:
        lost = error
    if lost := flush_or_discard(sys.stdout) or lost:
        log.warning("standard output: %s; the results are in %s", lost.strerror, folder / "results.json")


@contextlib.contextmanager
def _run_folder(folder: Path | None, label: str, world: World, locked: bool) -> Iterator[RunDir]:
    """Open the run folder in rank 0; the other ranks only get its path."""
    if not world.is_main:
        yield RunDir(Path(world.broadcast(None)))
        return
    with open_run_dir(folder, label, trains=True, locked=locked) as run_dir:
        world.broadcast(str(run_dir.path))
        yield run_dir


def _check_first(settings: Settings, command_line: str) -> None:
    """Run all checks in the subfolder `check` of the run folder, or in a new folder; raise if one fails."""
    from cnntrain.checks.check_run import check

    folder = str(Path(settings.run_dir) / "check") if settings.run_dir else None
    report = check(dataclasses.replace(settings, run_dir=folder), (), command_line)
    if failed := [finding["name"] for finding in report["findings"] if finding["verdict"] == "FAIL"]:
        raise CheckFailedError(
            f"check.first: {', '.join(failed)} failed (see above, and {report['run_dir']}); training was not "
            "started. Fix the cause, or set check.first=false"
        )


def train_run(settings: Settings, command_line: str, on_epoch: EpochCallback) -> dict[str, Any]:
    """Train one run of a sweep, without the test set."""
    return train(settings, command_line, test=False, on_epoch=on_epoch)


def evaluate_run(settings: Settings, command_line: str) -> dict[str, float]:
    """Return the test metrics of the best checkpoint of a run."""
    defaults = read_command_settings(EvaluateSettings, "evaluate", ("checkpoint=best.pt",))
    own = {name: getattr(settings, name) for name in ("device", "threads", "trusted_packages")}
    return evaluate_checkpoint(dataclasses.replace(defaults, checkpoint=str(settings.run_dir), **own), command_line)
