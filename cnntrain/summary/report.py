"""Everything that `inspect` shows and writes, in one call."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cnntrain.io import safe_files as files
from cnntrain.summary.layer_table import Convention, ModelSummary, Row
from cnntrain.summary.picture import draw_bars
from cnntrain.summary.view import (
    compare,
    comparison_table,
    fitting_depth,
    layer_table,
    parameter_lines,
    print_table,
)


def report(
    anatomies: ModelSummary | Sequence[ModelSummary],
    folder: Path | None = None,
    depth: int | None = None,
    convention: Convention = "torch",
    console: Console | None = None,
    pictures: bool = True,
) -> list[Path]:
    """Print one network's table, or a row each for several; with a folder, write CSV, JSON, pictures.

    Args:
        depth: parts of a layer's name that are kept when rows are folded; None folds big networks to a page,
            0 shows every row.
        folder: made when it isn't there. One network: layers.csv (every row, not folded), anatomy.json
            and anatomy.png. Several: comparison.csv, comparison.json, and each one's picture.
        pictures: draw the PNG files.

    Returns:
        the paths of the files written.
    """
    opened = [anatomies] if isinstance(anatomies, ModelSummary) else list(anatomies)
    if len(opened) == 1:
        chosen = fitting_depth(opened[0].rows) if depth is None else depth or None
        print_table(layer_table(opened[0], chosen, convention), console)
        for line in parameter_lines(opened[0], convention):
            (console or Console()).print(line, highlight=False)
    else:
        print_table(comparison_table(opened, convention), console)
    if folder is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    if len(opened) == 1:
        (anatomy,) = opened
        rows: list[dict[str, object]] = [flat(row, convention) for row in anatomy.rows]
        written = [write_csv(folder / "layers.csv", rows)]
        written.append(write_json(folder / "anatomy.json", anatomy.as_dict(convention)))
        if pictures:
            written.append(_write_picture(folder / "anatomy.png", anatomy, depth, convention))
        return written
    rows = compare(opened, convention)
    written = [write_csv(folder / "comparison.csv", rows), write_json(folder / "comparison.json", rows)]
    if not pictures:
        return written
    names = [a.name for a in opened]
    files = [n if names.count(n) == 1 else f"{n}-{names[: i + 1].count(n)}" for i, n in enumerate(names)]
    drawn = [
        _write_picture(folder / f"{file}.png", a, depth, convention)
        for file, a in zip(files, opened, strict=True)
    ]
    return [*written, *drawn]


def flat(row: Row, convention: Convention = "torch") -> dict[str, object]:
    """A row of the CSV: shapes as 64x56x56, the parameters by the chosen convention."""
    values = row.as_dict() | {"parameters": row.count(convention)}
    del values["folded"]
    return {
        name: "x".join(f"{n:g}" for n in value)
        if isinstance(value, tuple)
        else ""
        if value is None
        else value
        for name, value in values.items()
    }


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    with files.replacing_text(path, sync=False) as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: Path, value: object) -> Path:
    files.write_text(path, json.dumps(value, indent=2) + "\n")
    return path


def _write_picture(path: Path, anatomy: ModelSummary, depth: int | None, convention: Convention) -> Path:
    content = io.BytesIO()
    draw_bars(anatomy, depth or None, convention).savefig(content, dpi=130, format="png")
    files.write_whole(path, content.getbuffer(), sync=False)
    return path
