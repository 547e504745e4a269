"""Learn one single example by heart and give a verdict: does everything from the pixels to the optimizer work?

`cnntrain overfit model=... data=...`. Augmentation, dropout, mixing, label smoothing and weight decay are off; the
configured optimizer runs at its learning rate, constant. Exit code 0 when the example was learned, 1 when not; then the
likely cause is named. Where a higher learning rate is much faster, the verdict is WARN and the exit code 0;
`overfit.strict=true` makes it a FAIL. Writes overfit.json and a picture. `overfit.examples=8` learns a few.
"""

import copy
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.checks.overfit import Trial, calibrate_norms, judge, judge_pace, learn_by_heart
from cnntrain.config.compose import read_settings
from cnntrain.config.invocation import Invocation
from cnntrain.config.schema import Settings
from cnntrain.data.load import Data
from cnntrain.data.loader import Loader
from cnntrain.errors import UserError
from cnntrain.plots.curves import learning, save, survive_drawing
from cnntrain.report.console import log_to_console
from cnntrain.report.table import print_findings
from cnntrain.train.optim import make_optimizer
from cnntrain.train.run_dir import open_run_dir, provenance
from cnntrain.train.setup import Components, assemble, build_training_parts
from cnntrain.train.signals import stop_flag
from cnntrain.types import Batch, Finding

log = logging.getLogger("cnntrain")
CALIBRATION_IMAGES = 32
METRICS_SHOWN = 2
WHAT_IS_OFF = (
    "overfit: switched off: augmentation, dropout, mixing, label smoothing, weight decay and the schedule "
    "(the learning rate stays at its peak)"
)


def run(invocation: Invocation) -> int:
    if invocation.words:
        raise UserError(
            f"overfit: {invocation.words[0]!r} is no override; write KEY=VALUE, as model=resnet18"
        )
    if invocation.multirun:
        from cnntrain.sweep.execute_run import SweepTarget  # imports optuna, which a single run does without
        from cnntrain.sweep.sweep_run import run_sweep

        return run_sweep(invocation, SweepTarget(overfit_trial))
    settings = read_settings(invocation.overrides, invocation.config_dir)
    return 1 if overfit(settings, invocation.line)["verdict"] == "FAIL" else 0


def overfit(settings: Settings, command_line: str = "") -> dict[str, Any]:
    """What overfit.json holds: `verdict`, `steps`, `loss`, `metrics`, `cause` and the findings behind them.

    Raises:
        UserError: the parts can't be built, or the data can't be read.
    """
    log_to_console()
    quiet = {name: value for name, value in settings.optimizer.items() if name != "weight_decay"}
    settings = dataclasses.replace(
        settings,
        augment={},
        optimizer={**quiet, "weight_decay": 0.0} if "weight_decay" in settings.optimizer else quiet,
    )
    assembly = assemble(settings)
    frozen = [n for n, p in assembly.model.named_parameters() if not p.requires_grad]
    data = assembly.load(augmented=False)
    if settings.optimizer.get("lr") == "auto":
        build_training_parts(assembly, data)  # finds it
    optimizer = make_optimizer(assembly.settings, assembly.model, assembly.compute)
    folder = Path(settings.run_dir) if settings.run_dir else None
    with open_run_dir(folder, f"overfit-{settings.label}") as run_folder, stop_flag() as stop:
        run_folder.write_json("run.json", provenance(command_line))
        batch, other, example = pick_examples(assembly, data, settings.overfit.examples)
        log.info(WHAT_IS_OFF)
        start = copy.deepcopy(assembly.model)

        def attempt(model: nn.Module, optimizer: Optimizer, steps: int) -> Trial:
            return learn_by_heart(
                model, assembly.task, optimizer, batch, other, assembly.compute, steps,
                frozen if settings.model.get("freeze") else (), stop,
            )  # fmt: skip

        def attempt_faster(steps: int) -> Trial:
            optimizer = make_optimizer(assembly.settings, start, assembly.compute)
            for group in optimizer.param_groups:
                group["lr"] *= 10
            return attempt(start, optimizer, steps)

        trial = attempt(assembly.model, optimizer, settings.overfit.steps)
        findings = judge(trial, example)
        if all(finding.verdict != "FAIL" for finding in findings):
            findings.append(judge_pace(trial, len(batch), attempt_faster, settings.overfit.strict))
        report = summarize(trial, findings, example, measure(assembly, batch))
        run_folder.write_json("overfit.json", report)
        if settings.log.figures:
            title = f"{report['verdict']}: {example}"
            with survive_drawing("the loss"):
                save(
                    learning(trial.losses, trial.floor, trial.uninformed, title),
                    run_folder.figures / "overfit.png",
                )
    print_findings([finding for finding in findings if finding.verdict != "PASS"])
    print(f"{report['verdict']}: {report['line']}")
    print(f"run folder: {run_folder.path}")
    return {**report, "run_dir": str(run_folder.path)}


def overfit_trial(
    settings: Settings, command_line: str, watch: Callable[[dict[str, float]], None]
) -> dict[str, Any]:
    """One run of a sweep; there are no epochs to watch."""
    return overfit(settings, command_line)


def pick_examples(assembly: Components, data: Data, count: int) -> tuple[Batch, Batch, str]:
    """The examples to learn, one with another target to compare with, and what a person calls the first.

    The choice is fixed: the first training examples. Norms are calibrated on the first few on the way.
    """
    loader = assembly.loader(data.train)
    first = _seen(assembly, loader, torch.arange(min(len(loader), max(CALIBRATION_IMAGES, count))))
    assembly.model.to(memory_format=assembly.compute.memory_format)
    images = first.images[:CALIBRATION_IMAGES]
    norms = calibrate_norms(assembly.model, images)
    if norms:
        log.info(
            "overfit: %d norms calibrated once on %d plain training images, then frozen", norms, len(images)
        )
    others = [row for row in range(1, len(first)) if not first.same_target(0, row)]
    labels = data.train.targets.get("label")
    elsewhere = [] if labels is None or others else (labels != labels[0]).nonzero()[:1, 0].tolist()
    other = (
        _seen(assembly, loader, torch.tensor(elsewhere))  # files often lie sorted by class
        if elsewhere
        else first.take(torch.tensor((others or [len(first) - 1])[:1]))
    )
    batch = first.take(torch.arange(min(count, len(first))))
    name = data.train.names[int(batch.index[0])]
    return batch, other, name if len(batch) == 1 else f"{name} and {len(batch) - 1} more"


def _seen(assembly: Components, loader: Loader, rows: Tensor) -> Batch:
    """Training examples as the network sees them, without augmentation."""
    batch = assembly.pipeline.eval_transform(next(iter(loader.batches(rows, len(rows)))))
    images = batch.images.contiguous(memory_format=assembly.compute.memory_format)
    return dataclasses.replace(batch, images=images)


@torch.no_grad()
def measure(assembly: Components, batch: Batch) -> dict[str, float]:
    """The task's metrics on the examples that were learned."""
    with assembly.compute.autocast():
        outputs = assembly.model(batch.images).float()
    meter = assembly.task.meter()
    meter.update(outputs, batch.truth, *assembly.task.loss(outputs, batch.truth, plain=True))
    return {name: value for name, value in meter.compute().items() if name != "loss"}


def summarize(
    trial: Trial, findings: list[Finding], example: str, metrics: dict[str, float]
) -> dict[str, Any]:
    wrong = next((f for verdict in ("FAIL", "WARN") for f in findings if f.verdict == verdict), None)
    steps, loss = len(trial.losses) - 1, trial.losses[-1]
    if wrong and trial.reached_at is None:
        line = f"{wrong.cause} ({example}, {steps} steps)"
    elif wrong:
        line = f"{wrong.cause} ({example})"
    else:
        shown = "".join(f", {name} {metrics[name]:.3g}" for name in list(metrics)[:METRICS_SHOWN])
        line = (
            f"{example} learned in {trial.reached_at} steps (loss {trial.losses[0]:.4g} -> {loss:.4g}{shown})"
        )
    return {
        "verdict": wrong.verdict if wrong else "PASS",
        "steps": steps if trial.reached_at is None else trial.reached_at,
        "loss": loss,
        "metrics": metrics,
        "cause": wrong.cause if wrong else None,
        "line": line,
        "example": example,
        "findings": [finding.as_dict() for finding in findings],
        "losses": trial.losses,
    }
