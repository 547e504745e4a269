"""Judge a set-up before the time is spent: data, initialization, wiring, learning, machinery; exit code 1 on any FAIL.

`cnntrain check model=... data=...` runs every check that fits, in about a minute for a small network on a CPU
(`check.budget_s`), and prints each one's verdict, the numbers it rests on, the likely cause and the remedy. `cnntrain
check leakage gradients data=...` runs some, a topic (`cnntrain check data`) all of one kind; `checks=leakage,gradients`
says the same. `cnntrain check checkpoint=RUN` judges trained weights. `cnntrain check flip data=...` alone tells more
about the mirror partners and draws them. `check.first=true` makes a training run the checks first and stop on a FAIL.
Nothing of a run is changed. Writes check.json and pictures. docs/checks.md explains every check.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from cnntrain.checks.check_run import choose, run_checks
from cnntrain.checks.context import CheckContext
from cnntrain.checks.flip import judge_flip
from cnntrain.commands.evaluate import restore
from cnntrain.config.compose import read_command_settings, read_settings
from cnntrain.config.invocation import Invocation
from cnntrain.config.schema import EvaluateSettings, Settings
from cnntrain.data.splits import limit_rows
from cnntrain.errors import UserError
from cnntrain.plots.checks import draw_curves
from cnntrain.plots.curves import save, survive_drawing
from cnntrain.plots.flip_picture import draw_symmetry
from cnntrain.report.console import console, log_to_console
from cnntrain.report.run_logger import statistics
from cnntrain.report.table import print_findings
from cnntrain.train.checkpoint import load_validated
from cnntrain.train.optim import make_optimizer
from cnntrain.train.resume import locate_checkpoint
from cnntrain.train.run_dir import RunDir, open_run_dir, provenance
from cnntrain.train.setup import (
    Components,
    assemble,
    build_source,
    build_training_parts,
    notice,
    try_learning_rates,
)
from cnntrain.train.signals import StopFlag, stop_flag
from cnntrain.types import Finding

MOST_EXAMPLES = 20_000  # more would not make the mean shape any surer
BUDGET_OF_A_CHECKPOINT_S = 60.0
DRAWN_IMAGES = 12


def run(invocation: Invocation) -> int:
    words: list[str] = list(invocation.words)
    overrides: list[str] = []
    for override in invocation.overrides:
        if override.startswith("checks="):
            words += [word for word in override.removeprefix("checks=").strip("[]").split(",") if word]
        else:
            overrides.append(override)
    invocation = dataclasses.replace(invocation, overrides=tuple(overrides), words=tuple(words))
    if words == ["flip"]:
        settings = read_settings(overrides, invocation.config_dir)
        return 0 if check_flip(settings, invocation.line)["verdict"] != "FAIL" else 1
    choose(words)  # a slip is told before anything is read
    if any(override.startswith("checkpoint=") for override in overrides):
        about = read_command_settings(EvaluateSettings, "evaluate", overrides, invocation.config_dir)
        report = check_checkpoint(about, words, invocation.line)
    else:
        report = check(read_settings(overrides, invocation.config_dir), words, invocation.line)
    return 0 if report["verdict"] != "FAIL" else 1


def check(settings: Settings, words: Sequence[str] = (), command_line: str = "") -> dict[str, Any]:
    """What check.json holds: `verdict`, `line` and the findings with their seconds, and `run_dir`.

    Raises:
        UserError: the parts can't be built, or the data can't be read.
    """
    log_to_console()
    ends_at = time.monotonic() + settings.check.budget_s
    assembly = assemble(settings)
    with stop_flag() as stop:
        bench = build_context(assembly, ends_at, stop, command_line)
        with open_run_dir(_folder(settings.run_dir), f"check-{settings.label}") as run_folder:
            return _judge(bench, words, run_folder, command_line, settings.log.figures)


def check_checkpoint(
    settings: EvaluateSettings, words: Sequence[str] = (), command_line: str = ""
) -> dict[str, Any]:
    """As `check`, of the weights in a checkpoint."""
    log_to_console()
    ends_at = time.monotonic() + BUDGET_OF_A_CHECKPOINT_S
    assembly = restore(load_validated(locate_checkpoint(Path(settings.checkpoint), "best.pt")), settings)
    with stop_flag() as stop:
        bench = build_context(assembly, ends_at, stop, command_line, trained=True)
        with open_run_dir(_folder(settings.run_dir), "check-checkpoint") as run_folder:
            return _judge(bench, words, run_folder, command_line, pictures=True)


def build_context(
    assembly: Components, ends_at: float, stop: StopFlag, command_line: str = "", trained: bool = False
) -> CheckContext:
    """The parts of a run laid out for the checks; reads the data."""
    data = assembly.load()
    plan, _, _ = build_training_parts(assembly, data)
    splits = {"train": data.train, "val": data.val, "test": data.test}
    return CheckContext(
        spec=assembly.spec,
        task=assembly.task,
        pipeline=assembly.pipeline,
        compute=assembly.compute,
        network=assembly.model,
        make_optimizer=lambda model: make_optimizer(assembly.settings, model, assembly.compute),
        try_learning_rates=lambda plan, ends_at: try_learning_rates(assembly, data, plan, stop, ends_at),
        loaders={name: assembly.loader(split) for name, split in splits.items() if split},
        plan=plan,
        config=dataclasses.asdict(assembly.settings),
        trained=trained,
        ends_at=ends_at,
        stop=stop,
        notes=notice(assembly, data, plan, command_line),
    )


def _folder(run_dir: str | None) -> Path | None:
    return Path(run_dir) if run_dir else None


def _judge(
    bench: CheckContext, words: Sequence[str], run_folder: RunDir, command_line: str, pictures: bool
) -> dict[str, Any]:
    chosen = choose(words)
    seconds: dict[str, float] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("checks", total=len(chosen))

        def tell(finding: Finding, took_s: float) -> None:
            seconds[finding.name] = round(took_s, 2)
            progress.update(bar, advance=1, description=f"checked {finding.name}")

        findings = run_checks(bench, chosen, tell)
    report = summarize(findings)
    for row in report["findings"]:
        row["seconds"] = seconds[row["name"]]
    run_folder.write_json("run.json", provenance(command_line))
    run_folder.write_json("check.json", report)
    if pictures:
        shown = bench.plain(count=DRAWN_IMAGES)
        names = [bench.loaders["train"].examples.names[int(i)] for i in shown.index]
        with survive_drawing("the figures"):
            figure = bench.task.draw(shown.images, None, shown.truth, names, *statistics(bench.spec))
            save(figure, run_folder.figures / "images.png")
            if bench.curves:
                save(draw_curves(bench.curves), run_folder.figures / "check.png")
    print_findings(findings)
    counts = [f"{sum(f.verdict == v for f in findings)} {v}" for v in ("PASS", "WARN", "FAIL", "SKIP")]
    print(f"{report['verdict']}: {', '.join(counts)} in {sum(seconds.values()):.0f} s")
    print(f"run folder: {run_folder.path}")
    return {**report, "run_dir": str(run_folder.path)}


def check_flip(settings: Settings, command_line: str = "") -> dict[str, Any]:
    """What check.json holds: `verdict`, the findings and the pairs, with `run_dir`.

    Raises:
        UserError: the data have no keypoints, or can't be read.
    """
    log_to_console()
    source, chosen = build_source(settings)
    spec = source.spec()
    if not spec.keypoints:
        raise UserError(
            "check flip: these data have no keypoints, so nothing trades names; choose data with points"
        )
    train = source.load()["train"]
    rows = limit_rows(
        len(train), min(chosen.limit or MOST_EXAMPLES, MOST_EXAMPLES), chosen.split_seed, "train"
    )
    points, valid = (train.targets[name] for name in ("points", "valid"))
    if rows is not None:
        points, valid = points[rows], valid[rows]
    findings, symmetry = judge_flip(points, valid, spec)
    data = settings.choices["data"]
    report = {"check": "flip", "data": data, "examples": len(points), **summarize(findings)}
    mirror = enumerate(spec.flip_pairs or ())
    report["pairs"] = [
        [spec.keypoints[i], spec.keypoints[k]] for i, k in mirror if i < k < len(spec.keypoints)
    ]
    with open_run_dir(_folder(settings.run_dir), f"check-flip-{data}") as run_folder:
        run_folder.write_json("run.json", provenance(command_line))
        run_folder.write_json("check.json", report)
        if symmetry is not None and settings.log.figures:
            title = f"{report['verdict']}: mean of {len(points):,} shapes of {data}, and its mirror image"
            save(draw_symmetry(symmetry, spec, title), run_folder.figures / "flip.png")
    print_findings(findings)
    print(f"{report['verdict']}: {report['line']}")
    print(f"run folder: {run_folder.path}")
    return {**report, "run_dir": str(run_folder.path)}


def summarize(findings: list[Finding]) -> dict[str, Any]:
    """The verdict of all findings together, and the line that tells why."""
    for verdict in ("FAIL", "WARN"):
        if found := [finding for finding in findings if finding.verdict == verdict]:
            return _report(verdict, found[-1].evidence, findings)
    return _report("PASS", findings[-1].evidence, findings)


def _report(verdict: str, line: str, findings: list[Finding]) -> dict[str, Any]:
    return {"verdict": verdict, "line": line, "findings": [finding.as_dict() for finding in findings]}
