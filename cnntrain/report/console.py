"""Console output: results and findings on standard output, log messages on standard error."""

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cnntrain.config.command_line import format_command, format_override
from cnntrain.io.streams import escape_control_characters, lenient
from cnntrain.types import Finding

Row = Mapping[str, object]

console = Console()
_VERDICT_STYLE = {"SKIP": "dim", "PASS": "green", "WARN": "yellow", "FAIL": "bold red"}  # the worst last


class _StderrHandler(logging.Handler):
    """Write to the current `sys.stderr`, so that redirection and capturing work."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        print(escape_control_characters(f"{prefix}{self.format(record)}"), file=lenient(sys.stderr))


def log_to_console() -> logging.Logger:
    """Set up and return the logger; Python warnings are logged too, without their source line."""
    log = logging.getLogger("cnntrain")
    warnings.showwarning = lambda message, *where: log.warning("%s", explain_warning(str(message)))
    if not log.handlers:
        log.addHandler(_StderrHandler())
        log.setLevel(logging.INFO)
        log.propagate = False
    return log


def silence_log() -> None:
    """Silence this process: rank 0 alone logs."""
    log_to_console().setLevel(logging.CRITICAL + 1)


def explain_warning(warning: str) -> str:
    """Rephrase a warning of PyTorch in terms of the settings if its own advice does not apply here."""
    operation, found, _ = warning.partition(" does not have a deterministic implementation")
    if not found:
        return warning
    return (
        f"deterministic=true: {operation} has no deterministic kernel on this device; runs with the same seed may "
        "differ in the last bits"
    )


def format_value(value: object) -> str:
    """Format a value: four significant digits for fractions, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return str(int(value)) if abs(value) < 1e9 and value.is_integer() else f"{value:.4g}"
    return escape_control_characters(str(value))


def format_seconds(seconds: float) -> str:
    """Format a duration: `4.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def list_columns(rows: Sequence[Row]) -> list[str]:
    """Return all keys of rows in the order of their first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def rows_table(rows: Sequence[Row], columns: Sequence[str], title: str = "") -> Table:
    """Build a table of some columns; numbers are right-aligned, missing values are shown as a dash."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in columns:
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(escape_control_characters(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(format_value(row.get(name))) for name in columns))
    return table


def print_rows(rows: Sequence[Row], title: str = "", console: Console = console) -> None:
    """Print rows as a table.

    A table wider than the terminal is printed in parts that repeat the first column. Without a terminal the width is
    unlimited.
    """
    if not console.is_terminal:
        console = Console(file=console.file, width=10_000)
    unlimited = console.options.update(width=10_000)
    columns = list_columns(rows)
    parts = [columns[:1]]
    for name in columns[1:]:
        wider = [*parts[-1], name]
        if len(wider) > 2 and console.measure(rows_table(rows, wider), options=unlimited).maximum > console.width:
            parts.append([columns[0], name])
        else:
            parts[-1] = wider
    for number, part in enumerate(parts):
        console.print(rows_table(rows, part, "" if number else title))


def markdown(rows: Sequence[Row]) -> str:
    """Format rows as a Markdown table."""
    columns = list_columns(rows)
    lines = [f"| {' | '.join(map(escape_control_characters, columns))} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = [format_value(row.get(key)).replace("|", "\\|") for key in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if columns else ""


def print_line(text: str, console: Console = console) -> None:
    """Print text without markup and without line breaks, so that paths can be copied."""
    console.print(Text(escape_control_characters(text)), soft_wrap=True)


def print_run_summary(
    results: Mapping[str, Any],
    run_dir: Path,
    monitor: str,
    console: Console = console,
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
    best, test = results.get("best") or {}, results.get("test") or {}
    rows: dict[str, dict[str, object]] = {}
    for key, value in {**best, **test}.items():
        split, _, name = key.partition("/")
        if split in ("val", "test"):
            row = rows.setdefault(name, {"metric": name, "best (validation)": None})
            row["best (validation)" if split == "val" else "test"] = value
    if rows:
        print_rows(sorted(rows.values(), key=lambda row: row["metric"] != monitor), console=console)
    facts = []
    if "epoch" in best:
        facts.append(f"best epoch {best['epoch']:.0f} by {monitor}")
    if results.get("ended_by") == "early_stopping":
        facts.append(f"early stopping after epoch {results['epochs']}")
    if "parameters" in results:
        facts.append(f"{results['parameters']:,} parameters")
    if "wall_s" in results:
        facts.append(format_seconds(results["wall_s"]))
    if results.get("images_per_s"):
        facts.append(f"{results['images_per_s']:,.0f} images/s")
    print_line(", ".join(facts), console)
    print_line(f"run folder: {run_dir}", console)
    print_line(f"look next:  {format_command(['tensorboard', '--logdir', run_dir])}", console)
    best_checkpoint = run_dir / "checkpoints" / "best.pt"
    if best_checkpoint.exists():
        command = ["cnntrain", "evaluate", *options, format_override("checkpoint", best_checkpoint)]
        if not test:  # `evaluate` uses the test set by default
            command.append("split=val" if any(name.startswith("val/") for name in best) else "split=train")
        print_line(f"            {format_command(command)}", console)


def print_findings(findings: Sequence[Finding], console: Console = console) -> None:
    """Print findings with their evidence, the worst last; WARN and FAIL also show cause, remedy and config keys."""
    for finding in sorted(findings, key=lambda finding: list(_VERDICT_STYLE).index(finding.verdict)):
        line = Text(f"{finding.verdict}  ", style=_VERDICT_STYLE[finding.verdict])
        line.append(finding.name, style="bold" if finding.verdict != "SKIP" else "dim")
        if finding.evidence:
            line.append(escape_control_characters(f": {finding.evidence}"), style="not bold default")
        console.print(line, soft_wrap=True)
        if finding.verdict in ("WARN", "FAIL"):
            keys = ", ".join(finding.keys)
            for label, text in (("likely cause", finding.cause), ("remedy", finding.remedy), ("keys", keys)):
                if text:
                    print_line(f"      {label}: {text}", console)
