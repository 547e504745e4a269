"""All checks in order, the functions that run them, and the report of `cnntrain check`."""

import dataclasses
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from cnntrain.checks import (
    image_checks,
    leakage,
    learning,
    lint,
    machinery,
    modes,
    outputs,
    reference_implementations,
    start,
    targets,
    wiring,
)
from cnntrain.checks.context import OUT_OF_BUDGET, CheckContext, failed, skipped
from cnntrain.checks.flip import MAX_EXAMPLES, diagnose_flip, wrong_pair
from cnntrain.config.schema import Settings
from cnntrain.data.splits import limit_rows
from cnntrain.errors import CnntrainError, UserError, suggest
from cnntrain.plots.charts import plot_flip_symmetry
from cnntrain.plots.curves import plot_check_curves
from cnntrain.plots.figure import log_plot_errors, save_figure
from cnntrain.randomness import fork_generators
from cnntrain.report.console import console, log_to_console, print_findings
from cnntrain.train.device import full_float32
from cnntrain.train.optim import make_optimizer
from cnntrain.train.prepare import resolve_plan, run_range_test
from cnntrain.train.run_dir import RunDir, open_run_dir, provenance
from cnntrain.train.setup import Components, build_components, build_source, split_data
from cnntrain.train.signals import StopFlag, stop_flag
from cnntrain.types import Finding

CHECKPOINT_BUDGET_S = 60.0
IMAGES_IN_FIGURE = 12

Check = Callable[[CheckContext], Finding]

# By topic, cheap checks first. The command line accepts names of checks and of topics.
CHECKS: dict[str, dict[str, Check]] = {
    "config": {"config": lint.config_agrees},
    "data": {
        "normalized inputs": image_checks.normalized_inputs,
        "layout": image_checks.layout,
        "channel order": image_checks.channel_order,
        "blank images": image_checks.blank_images,
        "validation": image_checks.validation_is_constant,
        "leakage": leakage.leakage,
        "classes": targets.classes,
        "points": targets.points,
        "masks": targets.masks,
        "flip": targets.flip,
        "augmentation": image_checks.augmentation,
    },
    "start": {
        "initial loss": start.initial_loss,
        "answers differ": start.answers_differ,
        "activations": start.activations,
        "dead units": start.dead_units,
        "pixels seen": start.pixels_seen,
    },
    "wiring": {
        "registered": wiring.registered,
        "shared weights": wiring.shared_weights,
        "frozen": wiring.frozen,
        "optimizer": wiring.optimizer,
        "gradients": wiring.gradients,
        "examples apart": outputs.examples_apart,
        "batch order": outputs.batch_order,
        "output layer": outputs.output_layer,
        "modes": modes.modes,
        "loss scale": outputs.loss_scale,
        "loss sees labels": outputs.loss_sees_labels,
        "loss sign": outputs.loss_sign,
        "derivative": reference_implementations.derivative,
        "loop": reference_implementations.loop_agrees,
    },
    "learning": {
        "weight decay": learning.weight_decay,
        "one example": learning.one_example,
        "eight examples": learning.eight_examples,
        "learning rate": learning.learning_rate,
        "generalizes": learning.generalizes,
        "batch norm gap": modes.batch_norm_gap,
    },
    "machinery": {
        "repeat": machinery.repeat,
        "workers": machinery.workers,
        "precision": machinery.precision,
        "memory layout": machinery.memory_layout,
        "reload": machinery.reload,
    },
}
SKIPPED_IF_TRAINED = {*CHECKS["start"], "one example", "eight examples", "learning rate"}
SKIPPED_WITHOUT_TIME = CHECKS["machinery"]


def select_checks(words: Sequence[str]) -> dict[str, Check]:
    """Return the checks with these names or topics, in the order in which they run; without words, all checks.

    Spaces in names are typed as dashes.

    Raises:
        UserError: a word is neither a check nor a topic.
    """
    names = [name.replace(" ", "-") for topic in CHECKS.values() for name in topic]
    valid = [*CHECKS, *names, "all"]
    for word in words:
        if word not in valid:
            raise UserError(
                f"check: unknown check {word!r}{suggest(word, valid)}; the checks are {', '.join(names)}, and the "
                f"topics {', '.join(CHECKS)}"
            )
    return {
        name: check
        for topic, checks in CHECKS.items()
        for name, check in checks.items()
        if not words or {"all", topic, name.replace(" ", "-")} & set(words)
    }


def run_checks(
    context: CheckContext, selected: dict[str, Check], on_finding: Callable[[Finding, float], None]
) -> list[Finding]:
    """Run checks and return their findings. Random states and the gradient mode of the caller are preserved.

    Args:
        on_finding: called with each finding and the duration of its check in seconds.
    """
    findings: list[Finding] = []
    for name, check in selected.items():
        context.stop.check()
        started = time.perf_counter()
        # Checks that train use the run's precision. The others compare numbers, for which TensorFloat-32 is too coarse.
        precision = nullcontext() if name in CHECKS["learning"] else full_float32()
        with preserve_random_state(context.compute.device), precision:
            context.reseed(name)
            finding = dataclasses.replace(_run_check(name, check, context), name=name)
        findings.append(finding)
        on_finding(finding, time.perf_counter() - started)
    return findings


def _run_check(name: str, check: Check, context: CheckContext) -> Finding:
    """Run one check. An exception raised by user code becomes a FAIL, so that the other checks still run."""
    if context.trained and name in SKIPPED_IF_TRAINED:
        return skipped("the weights come from a checkpoint")
    if context.seconds_left <= 0 and name in SKIPPED_WITHOUT_TIME:
        return skipped(OUT_OF_BUDGET)
    try:
        return check(context)
    except CnntrainError:
        raise
    except Exception as error:  # user code may raise anything
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        message = (str(error).splitlines() or [""])[0]
        cause = "the network, the loss or the data raised an exception during this check"
        remedy = "look at the other findings; set HYDRA_FULL_ERROR=1 to see the traceback"
        return failed(f"{type(error).__name__}: {message}", cause, remedy, "model", "task")


@contextmanager
def preserve_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random states of torch (CPU and `device`), NumPy and Python, and the gradient mode."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with fork_generators(device), torch.enable_grad():
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def check(settings: Settings, words: Sequence[str] = (), command_line: str = "") -> dict[str, Any]:
    """Run checks on a configuration; return the content of check.json and `run_dir`.

    The content is `verdict`, `line`, and `findings` with their seconds.

    Args:
        words: names of checks and topics; empty for all.

    Raises:
        UserError: the components cannot be built, or the data cannot be read.
    """
    log_to_console()
    deadline = time.monotonic() + settings.check.budget_s
    components = build_components(settings)
    with stop_flag() as stop:
        context = build_context(components, deadline, stop, command_line)
        with open_run_dir(settings.run_dir, f"check-{settings.label}") as run_folder:
            return _run_and_report(context, words, run_folder, command_line, settings.log.figures)


def check_checkpoint(
    components: Components, run_dir: str | None, words: Sequence[str] = (), command_line: str = ""
) -> dict[str, Any]:
    """Like `check`, for components with the weights of a checkpoint."""
    log_to_console()
    deadline = time.monotonic() + CHECKPOINT_BUDGET_S
    with stop_flag() as stop:
        context = build_context(components, deadline, stop, command_line, trained=True)
        with open_run_dir(run_dir, "check-checkpoint") as run_folder:
            return _run_and_report(context, words, run_folder, command_line, figures=True)


def build_context(
    components: Components, deadline: float, stop: StopFlag, command_line: str = "", trained: bool = False
) -> CheckContext:
    """Read the data and return the context of the checks."""
    data = components.load()
    plan = resolve_plan(components, data)
    splits = {"train": data.train, "val": data.val, "test": data.test}
    return CheckContext(
        spec=components.spec,
        task=components.task,
        pipeline=components.pipeline,
        compute=components.compute,
        model=components.model,
        make_optimizer=lambda model: make_optimizer(components.settings, model, components.compute),
        run_range_test=lambda plan, deadline: run_range_test(components, data, plan, stop, deadline),
        loaders={name: components.loader(split) for name, split in splits.items() if split},
        plan=plan,
        config=dataclasses.asdict(components.settings),
        trained=trained,
        deadline=deadline,
        stop=stop,
        config_warnings=lint.lint(components, data, plan, command_line),
    )


def _run_and_report(
    context: CheckContext, words: Sequence[str], run_folder: RunDir, command_line: str, figures: bool
) -> dict[str, Any]:
    selected = select_checks(words)
    seconds: dict[str, float] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("checks", total=len(selected))

        def on_finding(finding: Finding, duration_s: float) -> None:
            seconds[finding.name] = round(duration_s, 2)
            progress.update(bar, advance=1, description=f"checked {finding.name}")

        findings = run_checks(context, selected, on_finding)
    report = summarize(findings)
    for row in report["findings"]:
        row["seconds"] = seconds[row["name"]]
    counts = [f"{sum(f.verdict == v for f in findings)} {v}" for v in ("PASS", "WARN", "FAIL", "SKIP")]
    report["line"] = f"{', '.join(counts)} in {sum(seconds.values()):.0f} s"
    result = _write_and_print(report, findings, run_folder, command_line)
    if figures:
        batch = context.eval_batch(count=IMAGES_IN_FIGURE)
        names = [context.loaders["train"].examples.names[int(i)] for i in batch.index]
        with log_plot_errors("the figures"):
            figure = context.task.draw(batch.images, None, batch.truth, names)
            save_figure(figure, run_folder.figures / "images.png")
            if context.curves:
                save_figure(plot_check_curves(context.curves), run_folder.figures / "check.png")
    return result


def _write_and_print(
    report: dict[str, Any], findings: list[Finding], run_folder: RunDir, command_line: str
) -> dict[str, Any]:
    run_folder.write_json("run.json", provenance(command_line))
    run_folder.write_json("check.json", report)
    print_findings(findings)
    print(f"{report['verdict']}: {report['line']}")
    print(f"run folder: {run_folder.path}")
    return {**report, "run_dir": str(run_folder.path)}


def check_flip(settings: Settings, command_line: str = "") -> dict[str, Any]:
    """Check the flip pairs of a dataset; return the content of check.json and `run_dir`.

    Raises:
        UserError: the dataset has no keypoints, or cannot be read.
    """
    log_to_console()
    source, (_, data_settings) = build_source(settings), split_data(settings)
    spec = source.spec()
    if not spec.keypoints:
        raise UserError("check flip: this dataset has no keypoints; choose one that has, for example data=toy_faces")
    train = source.load()["train"]
    limit = min(data_settings.limit or MAX_EXAMPLES, MAX_EXAMPLES)
    rows = limit_rows(len(train), limit, data_settings.split_seed, "train")
    points, valid = (train.targets[name] for name in ("points", "valid"))
    if rows is not None:
        points, valid = points[rows], valid[rows]
    findings, symmetry = diagnose_flip(points, valid, spec)
    data, names = settings.choices["data"], spec.keypoints
    report = {"check": "flip", "data": data, "examples": len(points), **summarize(findings)}
    pairs = [(i, partner) for i, partner in enumerate(spec.flip_pairs or ()) if i < partner < len(names)]
    report["pairs"] = [[names[i], names[partner]] for i, partner in pairs]
    with open_run_dir(settings.run_dir, f"check-flip-{data}") as run_folder:
        result = _write_and_print(report, findings, run_folder, command_line)
        if symmetry is not None and settings.log.figures:
            title = f"{report['verdict']}: mean of {len(points):,} shapes of {data}, and its mirror image"
            shapes, distances = (symmetry.shape, symmetry.mirrored), (symmetry.unswapped, symmetry.swapped)
            figure = plot_flip_symmetry(*shapes, distances, spec, wrong_pair(symmetry) or (), title)
            save_figure(figure, run_folder.figures / "flip.png")
    return result


def summarize(findings: list[Finding]) -> dict[str, Any]:
    """Return the worst verdict, the evidence of the last finding with it, and all findings."""
    verdicts = {finding.verdict for finding in findings}
    worst = next((verdict for verdict in ("FAIL", "WARN") if verdict in verdicts), "PASS")
    line = next((f.evidence for f in reversed(findings) if worst in ("PASS", f.verdict)), "")
    return {"verdict": worst, "line": line, "findings": [finding.as_dict() for finding in findings]}
