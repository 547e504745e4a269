"""Tables of plain rows on the terminal: results of a run, of a sweep, and findings."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cnntrain.config.command_text import command_text, override
from cnntrain.io.streams import printable
from cnntrain.report.progress import seconds_text
from cnntrain.types import Finding

_VERDICT_STYLE = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red", "SKIP": "dim"}


def rows_table(
    rows: Sequence[Mapping[str, object]], title: str = "", columns: Sequence[str] | None = None
) -> Table:
    """Rows of the same kind as a table; numbers to the right, absent values as a dash.

    Args:
        columns: which keys, in which order; null: all, in the order in which they turn up.
    """
    columns = list(columns) if columns else list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in columns:
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(printable(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(value_text(row.get(name))) for name in columns))
    return table


def value_text(value: object) -> str:
    """A cell as people read it: four digits of a fraction, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return (
            str(int(value)) if value == value and abs(value) < 1e9 and value == int(value) else f"{value:.4g}"
        )
    return printable(str(value))


def print_rows(
    rows: Sequence[Mapping[str, object]],
    title: str = "",
    columns: Sequence[str] | None = None,
    console: Console | None = None,
) -> None:
    """Print `rows_table`; where the output is no terminal, as wide as it needs. A table that is wider than the terminal
    is printed in parts, each with the first column, so that no number is broken."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=10_000)
    columns = list(columns) if columns else list(dict.fromkeys(key for row in rows for key in row))
    for place, part in enumerate(_fitting(rows, columns, console)):
        console.print(rows_table(rows, "" if place else title, part))


def _fitting(rows: Sequence[Mapping[str, object]], columns: list[str], console: Console) -> list[list[str]]:
    """The columns in parts that fit the console's width, each beginning with the first column."""
    unlimited = console.options.update(width=10_000)
    parts = [columns[:1]]
    for name in columns[1:]:
        wider = [*parts[-1], name]
        if (
            len(wider) > 2
            and console.measure(rows_table(rows, "", wider), options=unlimited).maximum > console.width
        ):
            parts.append([columns[0], name])
        else:
            parts[-1] = wider
    return parts


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(map(printable, columns))} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = [value_text(row.get(key)).replace("|", "\\|") for key in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if columns else ""


def print_run_summary(
    results: Mapping[str, object],
    run_dir: Path,
    monitor: str,
    console: Console | None = None,
    options: Sequence[str] = (),
) -> None:
    """The end of a run: best epoch on validation beside the test set, the cost, and where to look next.

    Args:
        results: as in results.json: `best` and `test`, each metrics by name or None; `parameters`, `epochs`,
            `wall_s`, `images_per_s`.
        monitor: metric that chose the best epoch.
        options: of the command that code of the user's own needs, as `--config-dir mine`; for the next command.
    """
    console = console or Console()
    best, test = _metrics(results.get("best")), _metrics(results.get("test"))
    names = list(dict.fromkeys(k.split("/", 1)[1] for k in (*best, *test) if k.startswith(("val/", "test/"))))
    rows = []
    for name in sorted(names, key=lambda n: n != monitor):
        row = {"metric": name, "best (validation)": best.get(f"val/{name}")}
        if test:
            row["test"] = test.get(f"test/{name}", test.get(name))
        rows.append(row)
    if rows:
        print_rows(rows, console=console)
    facts = []
    if "epoch" in best:
        facts.append(f"best epoch {int(float(str(best['epoch'])))} by {monitor}")
    if results.get("ended_by") == "early_stopping":
        facts.append(f"early stopping after epoch {results['epochs']}")
    if "parameters" in results:
        facts.append(f"{results['parameters']:,} parameters")
    if "wall_s" in results:
        facts.append(seconds_text(float(str(results["wall_s"]))))
    if results.get("images_per_s"):
        facts.append(f"{float(str(results['images_per_s'])):,.0f} images/s")
    _print(console, ", ".join(facts))
    _print(console, f"run folder: {run_dir}")
    _print(console, f"look next:  {command_text(['tensorboard', '--logdir', run_dir])}")
    best_checkpoint = run_dir / "checkpoints" / "best.pt"
    if best_checkpoint.exists():
        # evaluate takes the test set unless another split is named; a run without one printed a command that failed.
        splits = ["split=val" if any(name.startswith("val/") for name in best) else "split=train"]
        evaluate = [
            "cnntrain",
            "evaluate",
            *options,
            override("checkpoint", best_checkpoint),
            *(splits if not test else []),
        ]
        _print(console, f"            {command_text(evaluate)}")


def print_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Verdicts, worst last where the eye rests; each with its evidence, and cause and remedy where it isn't a
    pass."""
    console = console or Console()
    order = {"SKIP": 0, "PASS": 1, "WARN": 2, "FAIL": 3}
    for finding in sorted(findings, key=lambda f: order[f.verdict]):
        line = Text(f"{finding.verdict}  ", style=_VERDICT_STYLE[finding.verdict])
        line.append(finding.name, style="bold" if finding.verdict != "SKIP" else "dim")
        if finding.evidence:
            line.append(printable(f": {finding.evidence}"), style="not bold default")
        console.print(line, soft_wrap=True)
        if finding.verdict in ("WARN", "FAIL"):
            for label, text in (("likely cause", finding.cause), ("remedy", finding.remedy)):
                if text:
                    _print(console, f"      {label}: {text}")
            if finding.keys:
                _print(console, f"      keys: {', '.join(finding.keys)}")


def _print(console: Console, text: str) -> None:
    """Text as it is: no markup, and no breaks that would spoil a path for copying."""
    console.print(Text(printable(text)), soft_wrap=True)


def _metrics(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
