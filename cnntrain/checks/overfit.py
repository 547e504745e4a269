"""`cnntrain overfit`: learn one example (or a few), and report whether everything from pixels to optimizer works."""

import copy
import dataclasses
import logging
from typing import Any

import torch
from torch import Tensor

from cnntrain.checks.context import calibrate_norms
from cnntrain.checks.overfit_trial import OverfitResult, OverfitTrial, diagnose, diagnose_pace
from cnntrain.config.schema import Settings
from cnntrain.data.load import DataSplits
from cnntrain.data.loader import Loader
from cnntrain.errors import UserError
from cnntrain.plots.curves import plot_overfit_curve
from cnntrain.plots.figure import log_plot_errors, save_figure
from cnntrain.report.console import log_to_console, print_findings
from cnntrain.train.evaluate import predict_batch
from cnntrain.train.optim import make_optimizer
from cnntrain.train.prepare import resolve_plan
from cnntrain.train.run_dir import open_run_dir, provenance
from cnntrain.train.setup import Components, build_components
from cnntrain.train.signals import stop_flag
from cnntrain.types import Batch, Finding

log = logging.getLogger("cnntrain")
CALIBRATION_IMAGES = 32
METRICS_SHOWN = 2
SWITCHED_OFF = (
    "overfit: switched off: augmentation, dropout, mixing, label smoothing, weight decay and the schedule "
    "(the learning rate stays at its peak)"
)


def overfit(settings: Settings, command_line: str = "") -> dict[str, Any]:
    """Overfit the first training examples and write overfit.json; return its content and `run_dir`.

    The content is `verdict`, `steps`, `loss`, `metrics`, `cause`, and the findings behind them.

    Raises:
        UserError: the components cannot be built, the data cannot be read, or the examples have no labels.
    """
    log_to_console()
    optimizer_settings = dict(settings.optimizer)
    if "weight_decay" in optimizer_settings:
        optimizer_settings["weight_decay"] = 0.0
    settings = dataclasses.replace(settings, augment={}, optimizer=optimizer_settings)
    components = build_components(settings)
    data = components.load(augmented=False)
    if settings.optimizer.get("lr") == "auto":
        resolve_plan(components, data)  # replaces `auto` by a learning rate
    optimizer = make_optimizer(components.settings, components.model, components.compute)
    with open_run_dir(settings.run_dir, f"overfit-{settings.label}") as run_folder, stop_flag() as stop:
        run_folder.write_json("run.json", provenance(command_line))
        batch, other, example = pick_examples(components, data, settings.overfit.examples)
        outputs = predict_batch(components.model, batch.images, components.compute).detach()
        if components.task.loss(outputs, batch.truth, training=False)[1] == 0:
            raise UserError(f"overfit: {example}: no labels to learn; try a larger overfit.examples")
        log.info(SWITCHED_OFF)
        initial_model = copy.deepcopy(components.model)
        trial = OverfitTrial(
            components.task,
            components.compute,
            batch,
            other,
            settings.overfit.steps,
            freeze=bool(settings.model.get("freeze")),
            stop=stop,
        )

        def run_faster(max_steps: int) -> OverfitResult:
            optimizer = make_optimizer(components.settings, initial_model, components.compute)
            for group in optimizer.param_groups:
                group["lr"] *= 10
            return dataclasses.replace(trial, max_steps=max_steps).run(initial_model, optimizer)

        result = trial.run(components.model, optimizer)
        findings = diagnose(result, example)
        if all(finding.verdict != "FAIL" for finding in findings):
            findings.append(diagnose_pace(result, len(batch), run_faster, settings.overfit.strict))
        report = summarize(result, findings, example, measure(components, batch))
        run_folder.write_json("overfit.json", report)
        if settings.log.figures:
            title = f"{report['verdict']}: {example}"
            with log_plot_errors("the loss"):
                figure = plot_overfit_curve(result.losses, result.floor, result.uninformed, title)
                save_figure(figure, run_folder.figures / "overfit.png")
    print_findings([finding for finding in findings if finding.verdict != "PASS"])
    print(f"{report['verdict']}: {report['line']}")
    print(f"run folder: {run_folder.path}")
    return {**report, "run_dir": str(run_folder.path)}


def pick_examples(components: Components, data: DataSplits, count: int) -> tuple[Batch, Batch, str]:
    """Return the first `count` training examples, one with another target, and a display name of the first ones.

    Also calibrates the norms of the model on the first training images.
    """
    loader = components.loader(data.train)
    first = _read(components, loader, torch.arange(min(len(loader), max(CALIBRATION_IMAGES, count))))
    components.model.to(memory_format=components.compute.memory_format)
    images = first.images[:CALIBRATION_IMAGES]
    if norms := calibrate_norms(components.model, images):
        log.info("overfit: %d norms calibrated on %d training images, then frozen", norms, len(images))
    last, labels = len(first) - 1, data.train.targets.get("label")
    row = next((row for row in range(1, len(first)) if not first.same_target(0, row)), last)
    other = first.take(slice(row, row + 1))
    if labels is not None and first.same_target(0, row):  # files are often sorted by class: search the whole split
        rows = (labels != labels[0]).nonzero()[:1, 0]
        other = _read(components, loader, rows) if len(rows) else other
    batch = first.take(slice(0, count))
    name = data.train.names[int(batch.index[0])]
    return batch, other, name if len(batch) == 1 else f"{name} and {len(batch) - 1} more"


def _read(components: Components, loader: Loader, rows: Tensor) -> Batch:
    """Return training examples, normalized but not augmented."""
    batch = components.pipeline.eval_transform(next(iter(loader.batches(rows, len(rows)))))
    images = batch.images.contiguous(memory_format=components.compute.memory_format)
    return dataclasses.replace(batch, images=images)


@torch.no_grad()
def measure(components: Components, batch: Batch) -> dict[str, float]:
    """Return the task's metrics on the examples that were learned."""
    outputs = predict_batch(components.model, batch.images, components.compute)
    meter = components.task.meter()
    meter.update(outputs, batch.truth, *components.task.loss(outputs, batch.truth, training=False))
    return {name: value for name, value in meter.compute().items() if name != "loss"}


def summarize(
    result: OverfitResult, findings: list[Finding], example: str, metrics: dict[str, float]
) -> dict[str, Any]:
    """Return the content of overfit.json."""
    worst = next((f for verdict in ("FAIL", "WARN") for f in findings if f.verdict == verdict), None)
    steps, loss = len(result.losses) - 1, result.losses[-1]
    if worst:
        line = f"{worst.cause} ({example}{f', {steps} steps' if result.reached_at is None else ''})"
    else:
        shown = "".join(f", {name} {metrics[name]:.3g}" for name in list(metrics)[:METRICS_SHOWN])
        losses = f"{result.losses[0]:.4g} -> {loss:.4g}"
        line = f"{example} learned in {result.reached_at} steps (loss {losses}{shown})"
    return {
        "verdict": worst.verdict if worst else "PASS",
        "steps": steps if result.reached_at is None else result.reached_at,
        "loss": loss,
        "metrics": metrics,
        "cause": worst.cause if worst else None,
        "line": line,
        "example": example,
        "findings": [finding.as_dict() for finding in findings],
        "losses": result.losses,
    }
