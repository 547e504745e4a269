"""Tables on the terminal: results of a run, of a sweep, and findings."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cnntrain.config.command_line import command_text, override
from cnntrain.io.streams import printable
from cnntrain.report.progress import seconds_text
from cnntrain.types import Finding

_VERDICT_STYLE = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red", "SKIP": "dim"}


def rows_table(rows: Sequence[Mapping[str, object]], title: str = "", columns: Sequence[str] | None = None) -> Table:
    """Build a table from rows; numbers are right-aligned, missing values are shown as a dash.

    Args:
        columns: keys to show, in order; default: all, in the order of their first appearance.
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
    """Format a cell: four significant digits for fractions, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return str(int(value)) if value == value and abs(value) < 1e9 and value == int(value) else f"{value:.4g}"
    return printable(str(value))


def print_rows(
    rows: Sequence[Mapping[str, object]],
    title: str = "",
    columns: Sequence[str] | None = None,
    console: Console | None = None,
) -> None:
    """Print rows as a table.

    A table wider than the terminal is printed in parts that repeat the first column. Without a terminal the width is
    unlimited.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=10_000)
    columns = list(columns) if columns else list(dict.fromkeys(key for row in rows for key in row))
    for number, part in enumerate(_split_columns(rows, columns, console)):
        console.print(rows_table(rows, "" if number else title, part))


def _split_columns(rows: Sequence[Mapping[str, object]], columns: list[str], console: Console) -> list[list[str]]:
    """Split the columns into parts that fit the console's width; each part starts with the first column."""
    unlimited = console.options.update(width=10_000)
    parts = [columns[:1]]
    for name in columns[1:]:
        wider = [*parts[-1], name]
        if len(wider) > 2 and console.measure(rows_table(rows, "", wider), options=unlimited).maximum > console.width:
            parts.append([columns[0], name])
        else:
            parts[-1] = wider
    return parts


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """Format rows as a Markdown table."""
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
    """Print the results of a run: best validation epoch, test set, cost, and the commands to look further.

    Args:
        results: content of results.json: `best` and `test` (metrics by name, or None), `parameters`, `epochs`,
            `wall_s`, `images_per_s`.
        monitor: metric that selected the best epoch.
        options: command-line options that user code needs, for example `--config-dir mine`; added to the printed
            command.
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
        # `evaluate` uses the test set by default. For a run without test set the split must be named.
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
    """Print findings with their evidence, the worst last; WARN and FAIL also show cause, remedy and config keys."""
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
    """Print text without markup and without line breaks, so that paths can be copied."""
    console.print(Text(printable(text)), soft_wrap=True)


def _metrics(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
