"""Judge one thing that trainings often get wrong, on your own data; exit code 1 when it is wrong.

`cnntrain check flip data=...` holds the mirror partners of the keypoints against the data: pairs that undo themselves,
names that trade left for right, and a mirrored and relabelled mean shape that lies nearer to the mean shape than
with names kept or with any two points' partners exchanged. Trains nothing. Writes check.json and a picture.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnntrain.assembly import build_source
from cnntrain.checks.flip import judge_flip
from cnntrain.checks.flip_picture import draw_symmetry
from cnntrain.cli import Invocation
from cnntrain.config import read_settings
from cnntrain.data.splits import limit_rows
from cnntrain.engine.run_folder import open_run_folder, provenance
from cnntrain.errors import UserError, suggest
from cnntrain.findings import Finding
from cnntrain.report.console import log_to_console
from cnntrain.report.figures import save
from cnntrain.report.table import print_findings
from cnntrain.settings import Settings

MOST_EXAMPLES = 20_000  # more would not make the mean shape any surer


def run(invocation: Invocation) -> int:
    checks: dict[str, Callable[[Settings, str], dict[str, Any]]] = {"flip": check_flip}
    if len(invocation.words) != 1:
        raise UserError(
            f"check: needs one name of a check ({', '.join(checks)}), as: cnntrain check flip data=..."
        )
    word = invocation.words[0]
    if word not in checks:
        raise UserError(
            f"check: no check {word!r}{suggest(word, list(checks))} (there is {', '.join(checks)})"
        )
    settings = read_settings(invocation.overrides, invocation.config_dir)
    return 0 if checks[word](settings, invocation.line)["verdict"] != "FAIL" else 1


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
    points, visible = (train.targets[name] for name in ("points", "visible"))
    if rows is not None:
        points, visible = points[rows], visible[rows]
    findings, symmetry = judge_flip(points, visible, spec)
    data = settings.choices["data"]
    report = {"check": "flip", "data": data, "examples": len(points), **summarise(findings)}
    mirror = enumerate(spec.mirror or ())
    report["pairs"] = [
        [spec.keypoints[i], spec.keypoints[k]] for i, k in mirror if i < k < len(spec.keypoints)
    ]
    folder = Path(settings.run_dir) if settings.run_dir else None
    with open_run_folder(folder, f"check-flip-{data}") as run_folder:
        run_folder.write_json("run.json", provenance(command_line))
        run_folder.write_json("check.json", report)
        if symmetry is not None and settings.log.pictures:
            title = f"{report['verdict']}: mean of {len(points):,} shapes of {data}, and its mirror image"
            save(draw_symmetry(symmetry, spec, title), run_folder.figures / "flip.png")
    print_findings(findings)
    print(f"{report['verdict']}: {report['line']}")
    print(f"run folder: {run_folder.path}")
    return {**report, "run_dir": str(run_folder.path)}


def summarise(findings: list[Finding]) -> dict[str, Any]:
    """The verdict of all findings together, and the line that tells why."""
    for verdict in ("FAIL", "WARN"):
        if found := [finding for finding in findings if finding.verdict == verdict]:
            return _report(verdict, found[-1].evidence, findings)
    return _report("PASS", findings[-1].evidence, findings)


def _report(verdict: str, line: str, findings: list[Finding]) -> dict[str, Any]:
    return {"verdict": verdict, "line": line, "findings": [finding.as_dict() for finding in findings]}
