"""Train a network, choose its best epoch on validation data, and use the test set once, at the end.

`train` is the command word that may be left out: `cnntrain model=resnet18 data=fashion_mnist` trains.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from cnntrain.assembly import Assembly, assemble, build_training_parts
from cnntrain.cli import Invocation
from cnntrain.config import read_settings
from cnntrain.data.load import Data
from cnntrain.data.store import Loader
from cnntrain.data.stream import explain_worker_error
from cnntrain.engine import checkpoint
from cnntrain.engine.ema import MovingAverage
from cnntrain.engine.evaluate import evaluate
from cnntrain.engine.loop import Plan, fit
from cnntrain.engine.run_folder import RunFolder, open_run_folder, provenance
from cnntrain.engine.signals import StopFlag, stop_flag
from cnntrain.engine.state import TrainState
from cnntrain.errors import UserError
from cnntrain.expectations import judge_expectations, parse_expectation
from cnntrain.report.console import log_to_console
from cnntrain.report.journal import RunJournal, statistics
from cnntrain.report.table import print_findings, print_run_summary
from cnntrain.saved import (
    checkpoint_facts,
    differences,
    find_checkpoint,
    finished_results,
    flat,
    load_weights,
    resume,
    run_folder_of,
)
from cnntrain.settings import Settings
from cnntrain.spec import Batch
from cnntrain.sweep import run_sweep
from cnntrain.tasks.meter import Worst

log = logging.getLogger("cnntrain")
MISTAKES_SHOWN = 24


def run(invocation: Invocation) -> int:
    if invocation.words:
        raise UserError(f"train: {invocation.words[0]!r} is no override; write KEY=VALUE, as model=resnet18")
    if invocation.multirun:
        return run_sweep(invocation, train)
    settings = read_settings(invocation.overrides, invocation.config_dir)
    if invocation.print_config:
        print(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False), end="")
        return 0
    results = train(settings, invocation.line)
    findings = []
    if settings.expect:
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


def train(settings: Settings, command_line: str = "") -> dict[str, Any]:
    """Train as `settings` say, in a run folder of its own; what results.json holds, with `run_dir`.

    Raises:
        UserError, DivergedError, MachineError, StoppedError: see cnntrain.errors.
    """
    log_to_console()
    source = find_checkpoint(settings)
    saved = checkpoint.load(source) if source else None
    folder = Path(settings.run_dir) if settings.run_dir else run_folder_of(source) if source else None
    if saved and folder and (done := finished_results(saved, folder, settings)):
        log.info("%s: this run is finished, nothing to do (a larger epochs= would go on)", source)
        return done
    for name, wanted in (settings.expect or {}).items():
        parse_expectation(name, wanted)
    assembly = assemble(settings)
    data = assembly.load()
    plan, state = _prepare(assembly, data, saved)
    with (
        open_run_folder(folder, settings.label) as run,
        stop_flag() as stop,
    ):  # all that can be refused has been
        if saved is None and run.last.exists():
            raise UserError(
                f"run_dir: {run.path} got a run of another process meanwhile; choose another folder"
            )
        (run.path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
        run.write_json("run.json", provenance(command_line))
        results = _train_in(run, assembly, data, plan, state, stop)
        run.write_json("results.json", results)
    print_run_summary(results, run.path, assembly.task.monitor[0])
    return {**results, "run_dir": str(run.path)}


def _prepare(assembly: Assembly, data: Data, saved: Mapping[str, Any] | None) -> tuple[Plan, TrainState]:
    """How long to train, and where the training stands: at its start, or where the checkpoint left it."""
    settings, compute = assembly.settings, assembly.compute
    plan, optimizer, schedule = build_training_parts(assembly, data)
    assembly.model.to(memory_format=compute.memory_format)
    state = TrainState(
        assembly.model,
        optimizer,
        schedule,
        torch.amp.GradScaler(compute.device.type) if compute.precision == "fp16" else None,
        MovingAverage(assembly.model, settings.ema_decay) if settings.ema_decay else None,
    )
    if saved:
        resume(state, saved, assembly, data)
    return plan, state


def _train_in(
    run: RunFolder, assembly: Assembly, data: Data, plan: Plan, state: TrainState, stop: StopFlag
) -> dict[str, Any]:
    settings, compute, task = assembly.settings, assembly.compute, assembly.task
    facts = checkpoint_facts(assembly, data)

    def save(name: str) -> None:
        checkpoint.save({"state": state.state_dict(), **facts}, run.checkpoints / f"{name}.pt")

    training = assembly.loader(data.train, augmented=True)
    validation = assembly.loader(data.val) if data.val else None
    with _journal(run, assembly, plan, state) as journal:
        hparams = flat(
            {k: v for k, v in facts["config"].items() if k not in ("run_dir", "resume", "log", "expect")}
        )
        journal.start(hparams, (run.path / "config.yaml").read_text(), data.test is not None)
        try:
            fit(state, training, validation, assembly.pipeline, task, compute, plan, journal, save, stop)
        except (RuntimeError, OSError, EOFError) as error:
            # A worker's death shows wherever the main process is.
            explained = explain_worker_error(error, assembly.data_settings.timeout_s)
            if explained is None:
                raise
            raise explained from error

        best = state.judged
        kept = checkpoint.load(run.best)["state"]
        load_weights(best, kept["average"] or kept["model"])
        judged = validation or training
        meter, worst = _judge(best, assembly, judged, plan, stop)
        test = {}
        if data.test is not None:
            test_meter, _ = _judge(best, assembly, assembly.loader(data.test), plan, stop)
            test = {f"test/{name}": value for name, value in test_meter.compute().items()}
        mistakes = _draw_mistakes(best, assembly, judged, worst) if settings.log.pictures else None
        journal.finish(best, meter, mistakes, state.progress.best, test, state.progress.step)
    return _summary(state, best, test)


def _journal(run: RunFolder, assembly: Assembly, plan: Plan, state: TrainState) -> RunJournal:
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
    )


def _judge(model: nn.Module, assembly: Assembly, loader: Loader, plan: Plan, stop: StopFlag):
    """Metrics over a split, and which of its examples are answered worst."""
    worst = Worst(MISTAKES_SHOWN)

    def look(batch: Batch, outputs: Tensor) -> None:
        worst.update(assembly.task.mistake_score(outputs, batch.truth), batch.index)

    meter = evaluate(
        model, loader, assembly.pipeline, assembly.task, assembly.compute, plan.batch_size, plan.limit_batches,
        stop, look,
    )  # fmt: skip
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
