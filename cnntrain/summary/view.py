"""Print and save summaries: tables, bar charts, CSV and JSON files."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from cnntrain.io import safe_files as files
from cnntrain.summary.layer_table import Convention, ModelSummary, Row
from cnntrain.types import format_shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BAR_WIDTH = 12  # characters
_MAX_ROWS = 45  # more are folded by default
_MAX_BARS = 40
_TOTALS = ("parameters", "trainable", "statistics", "folded", "multiply_adds", "elements", "activations_kib")
_CONVENTIONS: dict[Convention, str] = {
    "torch": "parameters as torch counts them",
    "keras": "parameters as Keras counts them: with BatchNorm's running mean and variance",
    "folded": "parameters after folding BatchNorm into the convolutions",
}
_DEPTH = (
    "depth: convolutions and dense layers on the longest path; a depthwise convolution directly followed by a 1x1 "
    "convolution counts as one"
)


def print_summaries(
    summaries: Sequence[ModelSummary],
    folder: Path | None = None,
    depth: int | None = None,
    convention: Convention = "torch",
    console: Console | None = None,
    figures: bool = True,
) -> list[Path]:
    """Print the table of one network, or one row per network; return the paths of the files that were written.

    Args:
        folder: is created. One network: layers.csv (every row, not folded), summary.json and summary.png. Several:
            comparison.csv, comparison.json, and one PNG file per network.
        depth: number of parts of a layer's name that are kept when rows are folded; None folds large networks to a
            page, 0 shows every row.
        figures: write PNG files.
    """
    console = console or Console()
    if not console.is_terminal:  # files and pipes get whole columns
        console = Console(file=console.file, width=200)
    rows = compare(summaries, convention)
    content: object = rows
    table, data, names = "comparison.csv", "comparison.json", [summary.name for summary in summaries]
    if len(summaries) == 1:
        (summary,) = summaries
        table_depth = fitting_depth(summary.rows) if depth is None else depth or None
        console.print(format_layer_table(summary, table_depth, convention))
        console.print("\n".join(parameter_lines(summary, convention)), highlight=False)
        rows, content = [csv_row(row, convention) for row in summary.rows], summary.as_dict(convention)
        table, data, names = "layers.csv", "summary.json", ["summary"]
    else:
        console.print(comparison_table(rows, convention))
    if folder is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with files.open_atomic_text(folder / table, sync=False) as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    files.write_text(folder / data, json.dumps(content, indent=2) + "\n")
    written = [folder / table, folder / data]
    for i, (name, summary) in enumerate(zip(names, summaries, strict=True) if figures else ()):
        number = f"-{names[: i + 1].count(name)}" if names.count(name) > 1 else ""
        written.append(folder / f"{name}{number}.png")
        with files.open_atomic(written[-1], sync=False) as image:
            draw_bars(summary, depth or None, convention).savefig(image, dpi=130, format="png")
    return written


def fold(rows: Sequence[Row], depth: int | None) -> list[Row]:
    """Merge consecutive rows whose names agree in their first `depth` parts; None changes nothing.

    A merged row has the sums of the counts, and the output and the receptive field of the last row.
    """
    if depth is None:
        return list(rows)
    return [_merge(list(group), depth) for _, group in groupby(rows, lambda row: _stem(row, depth))]


def _stem(row: Row, depth: int) -> str:
    return ".".join(row.name.split("#")[0].split(".")[:depth])


def _merge(group: list[Row], depth: int) -> Row:
    if len(group) == 1:
        return group[0]
    last = next((row for row in reversed(group) if row.ran), group[-1])
    totals = {name: sum(getattr(row, name) for row in group) for name in _TOTALS}
    return replace(last, name=_stem(last, depth), kind=f"{len(group)} layers", notation="", **totals)


def fitting_depth(rows: Sequence[Row], max_rows: int = _MAX_ROWS) -> int | None:
    """Return the largest depth that folds to at most `max_rows` rows; None if no folding is necessary."""
    if len(rows) <= max_rows:
        return None
    deepest = max(row.name.count(".") + 1 for row in rows)
    return next((d for d in range(deepest, 0, -1) if len(fold(rows, d)) <= max_rows), 1)


def format_layer_table(summary: ModelSummary, depth: int | None = None, convention: Convention = "torch") -> Table:
    """Return the table of a network, folded to `depth`, with totals in the footer."""
    total = max(summary.multiply_adds, 1)
    title = f"{summary.name} on {_times(summary.input_shape)}, depth {summary.depth}"
    table = Table(title=title, caption=caption(summary, convention), show_footer=True, pad_edge=False)
    table.add_column("layer", "total", no_wrap=True)
    table.add_column("kind")
    table.add_column("C K P S D G")
    for header, footer in (
        ("output", _times(summary.output_shape)),
        ("parameters", f"{summary.parameters(convention):,}"),
        ("multiply-adds", f"{summary.multiply_adds:,}"),
        ("KiB", f"{summary.activations_kib:,.1f}"),
        ("field", _field(summary)),
    ):
        table.add_column(header, footer, justify="right", no_wrap=True)
    for header in ("jump", "start", "share"):
        table.add_column(header, justify="right")
    table.add_column("", no_wrap=True)
    for row in fold(summary.rows, depth):
        table.add_row(
            row.name,
            row.kind,
            row.notation,
            _times(row.output_shape),
            f"{row.count(convention):,}" if row.count(convention) else "",
            f"{row.multiply_adds:,}" if row.multiply_adds else "",
            f"{row.activations_kib:,.1f}" if row.activations_kib else "",
            field_text(row),
            _numbers(row.jump),
            _numbers(row.start),
            f"{row.multiply_adds / total:.1%}" if row.multiply_adds else "",
            Bar(total, 0, row.multiply_adds, width=_BAR_WIDTH) if row.multiply_adds else "",
        )
    return table


def parameter_lines(summary: ModelSummary, convention: Convention = "torch") -> list[str]:
    """Return lines with total, trainable and non-trainable parameters; Keras counts running statistics as the latter.

    With folded BatchNorm only the total is shown, because a folded network is not trained.
    """
    total = summary.parameters(convention)
    lines = [f"Total parameters: {total:,}"]
    if convention != "folded":
        lines.append(f"Trainable parameters: {summary.trainable:,}")
        lines.append(f"Non-trainable parameters: {total - summary.trainable:,}")
    return lines


def comparison_table(rows: Sequence[dict[str, object]], convention: Convention = "torch") -> Table:
    """Return a table of the rows that `compare` returns."""
    table = Table(pad_edge=False, caption=f"{_CONVENTIONS[convention]}\n{_DEPTH}")
    for column in rows[0] if rows else ():
        table.add_column(column, justify="left" if column == "network" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int | float) else str(value) for value in row.values()))
    return table


def compare(summaries: Sequence[ModelSummary], convention: Convention = "torch") -> list[dict[str, object]]:
    """Return one row per network: input, depth, parameters, multiply-adds, memory, receptive field."""
    return [
        {
            "network": summary.name,
            "input": _times(summary.input_shape),
            "output": _times(summary.output_shape),
            "depth": summary.depth,
            "parameters": summary.parameters(convention),
            "multiply_adds": summary.multiply_adds,
            "activations_kib": round(summary.activations_kib, 1),
            "receptive_field": _field(summary),
        }
        for summary in summaries
    ]


def caption(summary: ModelSummary, convention: Convention) -> str:
    """Return the conventions of a table, and what its numbers leave out."""
    lines = [
        f"one image, float32; multiply-adds without bias; {_CONVENTIONS[convention]}",
        "field: receptive field in pixels, the largest over all paths, without the statistics of norms; 'all': the "
        "whole image",
        _DEPTH,
    ]
    if summary.uncounted:
        lines.append("multiply-adds not counted: " + ", ".join(summary.uncounted))
    if summary.unfollowed:
        lines.append("receptive field unknown after: " + ", ".join(summary.unfollowed))
    unused = [row.name for row in summary.rows if not row.ran]
    if unused:
        lines.append("not used in validation, but parameters are counted: " + ", ".join(unused[:6]))
    return "\n".join(lines)


def field_text(row: Row) -> str:
    """Return `67`; `all`; or `all (299)` if a global pool on one path reads everything, and the other paths 299 px."""
    if row.receptive_field is None or row.local_field is None:
        return "?" if row.ran and row.output_shape else ""
    if row.whole:
        return "all" if row.jump is None else f"all ({_times(row.local_field)})"
    return _times(row.local_field)


def _field(summary: ModelSummary) -> str:
    return "?" if summary.unfollowed else _times(summary.receptive_field)


def _times(shape: Sequence[int] | None) -> str:
    if not shape:
        return ""
    if len(shape) == 2 and shape[0] == shape[1]:
        return str(shape[0])
    return format_shape(shape)


def _numbers(values: Sequence[float] | None) -> str:
    if values is None:
        return ""
    shown = [_number(value) for value in values]
    return shown[0] if len(set(shown)) == 1 else "x".join(shown)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def csv_row(row: Row, convention: Convention = "torch") -> dict[str, object]:
    """Return a row for CSV: shapes as 64x56x56, parameters by the convention."""
    values = asdict(row) | {"parameters": row.count(convention)}
    del values["folded"]
    return {
        name: "x".join(map(_number, value)) if isinstance(value, tuple) else value for name, value in values.items()
    }


def draw_bars(summary: ModelSummary, depth: int | None = None, convention: Convention = "torch") -> Figure:
    """Draw bar charts of memory, parameters and multiply-adds by layer, folded to `depth`; None: to fit on a page."""
    from matplotlib.figure import Figure

    rows = fold(summary.rows, depth if depth is not None else fitting_depth(summary.rows, _MAX_BARS))
    rows = [row for row in rows if row.activations_kib or row.count(convention) or row.multiply_adds]
    parameters, total = [row.count(convention) / 1e3 for row in rows], summary.parameters(convention) / 1e3
    charts = (
        ("memory (KiB)", "#4878cf", [row.activations_kib for row in rows], summary.activations_kib),
        ("parameters (thousands)", "#6acc65", parameters, total),
        ("multiply-adds (millions)", "#d65f5f", [r.multiply_adds / 1e6 for r in rows], summary.multiply_adds / 1e6),
    )
    figure = Figure(figsize=(13, 2.2 + 0.24 * len(rows)), layout="constrained")
    figure.suptitle(f"{summary.name} on {_times(summary.input_shape)}", fontweight="bold")
    for axes, (title, color, values, total) in zip(figure.subplots(1, 3, sharey=True), charts, strict=True):
        bars = axes.barh(range(len(rows)), values, color=color, height=0.75)
        axes.set_title(f"{title}: {total:,.1f}")
        axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, 1.18 * (max(values, default=0) or 1))
        texts = [f"{value:,.1f}" if value < 100 else f"{value:,.0f}" for value in values]
        axes.bar_label(bars, [text if value else "" for text, value in zip(texts, values, strict=True)], fontsize=7)
    figure.axes[0].invert_yaxis()
    return figure
