"""Train a network, choose its best epoch on validation data, and use the test set once, at the end.

`train` is the command word that may be left out: `cnntrain model=resnet18 data=fashion_mnist` trains.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

from cnntrain.assembly import Assembly, assemble, build_training_parts, notice
from cnntrain.cli import Invocation
from cnntrain.commands.evaluate import evaluate_checkpoint
from cnntrain.config import compose, read_settings, swept_by_itself
from cnntrain.data.load import Data
from cnntrain.data.store import Loader
from cnntrain.data.stream import explain_worker_error
from cnntrain.engine import checkpoint
from cnntrain.engine.combine import synchronise_norms
from cnntrain.engine.ema import MovingAverage
from cnntrain.engine.evaluate import evaluate
from cnntrain.engine.keeper import Keeper
from cnntrain.engine.loop import Silent, fit
from cnntrain.engine.plan import Plan
from cnntrain.engine.ranks import ALONE, Place, Ranks, find_place
from cnntrain.engine.run_folder import RunFolder, open_run_folder, provenance
from cnntrain.engine.signals import StopFlag, stop_flag
from cnntrain.engine.state import TrainState
from cnntrain.errors import CheckFailedError, DivergedError, StoppedError, UserError
from cnntrain.expectations import judge_expectations, parse_expectation
from cnntrain.processes import check_processes, uses_gpus
from cnntrain.report.console import log_to_console, silence_log
from cnntrain.report.journal import RunJournal, statistics
from cnntrain.report.table import print_findings, print_run_summary
from cnntrain.resume import bring_best, keep_choices, resume
from cnntrain.saved import (
    checkpoint_facts,
    differences,
    find_checkpoint,
    finished_results,
    flat,
    load_weights,
    read_saved,
    run_folder_of,
)
from cnntrain.settings import EvaluateSettings, Settings, parse
from cnntrain.spec import Batch
from cnntrain.tasks.meter import Worst

if TYPE_CHECKING:
    from cnntrain.engine.launch import Home

log = logging.getLogger("cnntrain")
MISTAKES_SHOWN = 24


def run(invocation: Invocation) -> int:
    if invocation.words:
        raise UserError(f"train: {invocation.words[0]!r} is no override; write KEY=VALUE, as model=resnet18")
    if invocation.multirun:
        if find_place():
            raise UserError(
                "-m: a sweep is one process; start it without torchrun or srun, with launch.devices=N"
            )
        from cnntrain.sweep.perform import Job  # imports optuna, which a single run does without
        from cnntrain.sweep.run import run_sweep

        return run_sweep(invocation, Job(train_trial, test_trial))
    settings = read_settings(invocation.overrides, invocation.config_dir)
    if swept := swept_by_itself(settings, invocation.overrides):
        raise UserError(
            f"sweep.over: this config sweeps over {', '.join(swept)}; add -m, or give each one value"
        )
    if invocation.print_config:
        print(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False), end="")
        return 0
    results = train(settings, invocation.line)
    findings = []
    if settings.expect and results:
        experiment = [o for o in invocation.overrides if o.startswith("experiment=")]
        own = dataclasses.asdict(read_settings(experiment, invocation.config_dir))
        changed = [
            key
            for key, _, _ in differences(own, dataclasses.asdict(settings))
            if key.split(".")[0] != "expect"
        ]
        findings = judge_expectations(settings.expect, results, changed)
        print_findings(findings)
    return 1 if any(finding.verdict == "FAIL" for finding in findings) else 0


def train(
    settings: Settings,
    command_line: str = "",
    test: bool = True,
    watch: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train as `settings` say, in a run folder of its own; what results.json holds, with `run_dir`.

    Args:
        test: whether the test set is used at the end; a sweep keeps it for its winner.
        watch: shown every epoch's row, as in metrics.csv; what it raises ends the training, its state saved.

    With `launch.devices` above 1 it starts as many processes, which train together; started by torchrun or srun it is
    one of them, and all but the first return {}.

    Raises:
        UserError, DivergedError, MachineError, StoppedError: see cnntrain.errors.
        ElsewhereError: another process failed, and has said why.
    """
    log_to_console()
    if place := find_place():
        check_processes(settings, place)
        with _joined(place, settings) as ranks:
            return _train(settings, command_line, test, watch, ranks)
    if settings.launch.devices == 1:
        return _train(settings, command_line, test, watch, ALONE)
    check_processes(settings, None)
    from cnntrain.engine.launch import launch  # what a single process does without

    return launch(_one_of_several, settings.launch.devices, settings, command_line, test, watch=watch)


def _one_of_several(home: "Home", settings: Settings, command_line: str, test: bool) -> dict[str, Any]:
    """A process that `train` started."""
    from cnntrain.engine.launch import in_rank

    def work() -> dict[str, Any]:
        log_to_console()
        with _joined(home.place(), settings, launched=True, end=home.end) as ranks:
            return _train(settings, command_line, test, home.watch if home.rows else None, ranks)

    return in_rank(home, work)


@contextlib.contextmanager
def _joined(place: Place, settings: Settings, **more: Any) -> Iterator[Ranks]:
    from cnntrain.engine.group import joined

    if place.rank:
        silence_log()
    with joined(place, uses_gpus(settings.device), **more) as ranks:
        yield ranks


def _train(
    settings: Settings,
    command_line: str,
    test: bool,
    watch: Callable[[dict[str, float]], None] | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """One process's training: the only one's, or its part of several's."""
    source = find_checkpoint(settings)
    saved = read_saved(source) if source else None
    folder = Path(settings.run_dir) if settings.run_dir else run_folder_of(source) if source else None
    if saved and folder and (done := finished_results(saved, folder, settings)):
        log.info("%s: this run is finished, nothing to do (a larger epochs= would go on)", source)
        return done
    for name, wanted in (settings.expect or {}).items():
        parse_expectation(name, wanted)
    found = ranks.gather(saved["state"]["progress"]["step"] if saved else None)
    if len(set(found)) > 1:
        raise UserError(
            f"resume: not all processes see the same checkpoint (steps {found}); use a shared folder"
        )
    if settings.check.first and saved is None and ranks.leads:
        _check_first(settings, command_line)
    assembly = assemble(keep_choices(settings, saved) if saved else settings, ranks=ranks)
    data = assembly.load()
    if not test:
        data.test = None
    plan, state = _prepare(assembly, data)
    settings = dataclasses.replace(  # which may have been `auto`
        settings, batch_size=plan.batch_size, optimizer=assembly.settings.optimizer
    )
    for finding in notice(assembly, data, plan, command_line):
        log.warning("config: %s: %s; %s", finding.evidence, finding.cause, finding.remedy)
    if saved and source:
        resume(state, saved, source, assembly, data)
    ranks.copy_weights(state.model)
    with (
        _run_folder(folder, settings.label, ranks) as run,
        stop_flag(ranks.stop if ranks.count > 1 else None) as stop,
    ):  # all that can be refused has been
        if not ranks.leads:
            _train_in(run, assembly, data, plan, state, stop, None)
            return {}
        if saved is None and run.last.exists():
            raise UserError(
                f"run_dir: {run.path} got a run of another process meanwhile; choose another folder"
            )
        if source and not run.best.exists():
            bring_best(source, run.best, state)
        (run.path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
        run.write_json("run.json", provenance(command_line))
        results = _train_in(run, assembly, data, plan, state, stop, watch)
        run.write_json("results.json", results)
    print_run_summary(results, run.path, assembly.task.monitor[0])
    return {**results, "run_dir": str(run.path)}


@contextlib.contextmanager
def _run_folder(folder: Path | None, label: str, ranks: Ranks) -> Iterator[RunFolder]:
    """The run's folder, which the leader holds; the others only know its name."""
    if not ranks.leads:
        yield RunFolder(Path(ranks.tell(None)))
        return
    with open_run_folder(folder, label) as run:
        ranks.tell(str(run.path))
        yield run


def _check_first(settings: Settings, command_line: str) -> None:
    """All checks, in a folder `check` of the run's (or one of their own).

    Raises:
        CheckFailedError: one of them failed.
    """
    from cnntrain.commands.check import check

    folder = str(Path(settings.run_dir) / "check") if settings.run_dir else None
    report = check(dataclasses.replace(settings, run_dir=folder), (), command_line)
    if failed := [finding["name"] for finding in report["findings"] if finding["verdict"] == "FAIL"]:
        raise CheckFailedError(
            f"check.first: {', '.join(failed)} failed (above, and in {report['run_dir']}), so the training was not "
            "begun; mend it, or set check.first=false"
        )


def train_trial(
    settings: Settings, command_line: str, watch: Callable[[dict[str, float]], None]
) -> dict[str, Any]:
    """One run of a sweep, which leaves the test set alone."""
    return train(settings, command_line, test=False, watch=watch)


def test_trial(settings: Settings, command_line: str) -> dict[str, float]:
    """The test set's metrics by the best checkpoint in the run's folder."""
    defaults = compose("evaluate", ("checkpoint=here",))
    defaults.pop("choices")
    about = dataclasses.replace(
        parse(EvaluateSettings, defaults), checkpoint=str(settings.run_dir), device=settings.device,
        threads=settings.threads, trusted_packages=settings.trusted_packages,
    )  # fmt: skip
    return evaluate_checkpoint(about, command_line)


def _prepare(assembly: Assembly, data: Data) -> tuple[Plan, TrainState]:
    """How long to train, and the training at its start."""
    settings, compute = assembly.settings, assembly.compute
    plan, optimizer, schedule = build_training_parts(assembly, data)
    if compute.ranks.count > 1 and compute.device.type == "cuda":
        assembly.model = synchronise_norms(assembly.model)
    compute.place(assembly.model)
    state = TrainState(
        assembly.model,
        optimizer,
        schedule,
        torch.amp.GradScaler(compute.device.type) if compute.precision == "fp16" else None,
        MovingAverage(assembly.model, settings.ema_decay) if settings.ema_decay else None,
    )
    return plan, state


def _train_in(
    run: RunFolder,
    assembly: Assembly,
    data: Data,
    plan: Plan,
    state: TrainState,
    stop: StopFlag,
    watch: Callable[[dict[str, float]], None] | None,
) -> dict[str, Any]:
    settings, compute, task = assembly.settings, assembly.compute, assembly.task
    facts, ranks = checkpoint_facts(assembly, data), assembly.compute.ranks

    training = assembly.loader(data.train, augmented=True)
    validation = assembly.loader(data.val) if data.val else None
    with (
        Keeper(run, state, facts, settings.checkpoint.keep, ranks.leads) as save,
        _journal(run, assembly, plan, state, watch) if ranks.leads else contextlib.nullcontext() as journal,
    ):
        hparams = flat(
            {
                k: v
                for k, v in facts["config"].items()
                if k not in ("run_dir", "resume", "log", "expect", "sweep")
            }
        )
        if journal:
            journal.start(hparams, (run.path / "config.yaml").read_text(), data.test is not None)
        try:
            told = journal or Silent()
            fit(state, training, validation, assembly.pipeline, task, compute, plan, told, save, stop)
        except StoppedError as error:
            how = f"its state is saved; to go on: the same command with run_dir={run.path} resume=auto"
            raise StoppedError(
                error.exit_code - 128, f"{error} at step {state.progress.step}; {how}"
            ) from error
        except DivergedError as error:
            raise DivergedError(f"{error}\nlast good checkpoint: {save.last_good}") from error
        except (RuntimeError, OSError, EOFError) as error:
            # A worker's death shows wherever the main process is.
            explained = explain_worker_error(error, assembly.data_settings.timeout_s)
            if explained is None:
                raise
            raise explained from error

        best = state.judged
        save.flush()
        if ranks.leads:
            kept = checkpoint.load(run.best)["state"]
            load_weights(best, kept["average"] or kept["model"])
        ranks.copy_weights(best)
        judged = validation or training
        meter, worst = _judge(best, assembly, judged, plan, stop)
        test = {}
        if data.test is not None:
            test_meter, _ = _judge(best, assembly, assembly.loader(data.test), plan, stop)
            test = {f"test/{name}": value for name, value in test_meter.compute().items()}
        if not journal:
            return {}
        mistakes = _draw_mistakes(best, assembly, judged, worst) if settings.log.pictures else None
        split = "validation" if validation else "training"
        journal.finish(best, meter, mistakes, split, state.progress.best, test, state.progress.step)
    return _summary(state, best, test)


def _journal(
    run: RunFolder,
    assembly: Assembly,
    plan: Plan,
    state: TrainState,
    watch: Callable[[dict[str, float]], None] | None,
) -> RunJournal:
    progress, settings = state.progress, assembly.settings
    return RunJournal(
        run.path,
        assembly.task,
        assembly.spec,
        plan.total_steps,
        -(-plan.total_steps // plan.steps_per_epoch),
        progress.step,
        progress.epoch,
        settings.log.tensorboard,
        settings.log.pictures,
        watch,
    )


def _judge(model: nn.Module, assembly: Assembly, loader: Loader, plan: Plan, stop: StopFlag):
    """Metrics over a split, and which of its examples are answered worst."""
    worst, ranks = Worst(MISTAKES_SHOWN), assembly.compute.ranks

    def look(batch: Batch, outputs: Tensor) -> None:
        worst.update(assembly.task.mistake_score(outputs, batch.truth), batch.index)

    meter = evaluate(
        model, loader, assembly.pipeline, assembly.task, assembly.compute, plan.batch_size, plan.limit_batches,
        stop, look,
    )  # fmt: skip
    for rank, (scores, rows) in enumerate(ranks.gather(worst.state()) if ranks.count > 1 else ()):
        if rank != ranks.rank and len(scores):
            worst.update(scores, rows)
    return meter, worst


@torch.no_grad()
def _draw_mistakes(model: nn.Module, assembly: Assembly, loader: Loader, worst: Worst):
    """The answers that are wrong with the most confidence, as a figure; None when all are right."""
    rows = worst.rows()
    if not len(rows):
        return None
    batch = assembly.pipeline.plain(next(iter(loader.batches(rows, len(rows)))))
    model.eval()
    outputs = model(batch.images.contiguous(memory_format=assembly.compute.memory_format)).float()
    names = [loader.examples.names[row] for row in batch.index.tolist()]
    return assembly.task.draw(batch.images, outputs, batch.truth, names, *statistics(assembly.spec))


def _summary(state: TrainState, model: nn.Module, test: Mapping[str, float]) -> dict[str, Any]:
    """What results.json holds."""
    progress = state.progress
    best = {name: value for name, value in progress.best.items() if not name.startswith("images_per_s")}
    parameters = sum(p.numel() for p in model.parameters())
    statistics_count = sum(
        b.numel() for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))
    )
    return {
        "parameters": parameters,
        "parameters_keras": parameters + statistics_count,
        "epochs": progress.epoch,
        "steps": progress.step,
        "wall_s": round(progress.wall_s, 3),
        "images_per_s": round(progress.images / max(progress.wall_s, 1e-9), 1),
        "best": {**best, "epoch": int(best["epoch"]), "step": int(best["step"])},
        "test": dict(test) or None,
    }
