"""Read CSV files strictly: all errors of a file are collected and reported with their lines."""

import csv
import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cnntrain.data.decoder import Box
from cnntrain.data.files import SPLIT_NAMES, ByteRange, is_file, unique_split_names
from cnntrain.errors import UserError, suggest

SHOWN_LINES = 20  # in an error message
BOX_COLUMNS = ("box_left", "box_top", "box_right", "box_bottom")


class ErrorList:
    """Errors of an annotation file, collected to be raised together."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.messages: list[str] = []

    def add(self, line: int | str, problem: str) -> None:
        self.messages.append(f"{self.file}:{line}: {problem}")

    def raise_if_any(self) -> None:
        """Raise a UserError that lists the errors, if there are any."""
        if self.messages:
            more = len(self.messages) - SHOWN_LINES
            shown = self.messages[:SHOWN_LINES] + ([f"... and {more} more"] if more > 0 else [])
            raise UserError("data: " + "\n  ".join(shown))


@dataclass
class CsvTable:
    """Header and complete rows of a CSV file."""

    file: Path
    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]  # line number, and cells by column
    errors: ErrorList  # of rows found so far; the caller adds its own and raises them


def read_csv(file: Path) -> CsvTable:
    """Read a comma-separated file with a header line. A byte-order mark is accepted; empty lines are skipped."""
    rows: list[tuple[int, list[str]]] = []
    try:
        with io.StringIO(ByteRange(str(file)).read().decode("utf-8-sig"), newline="") as text:
            reader = csv.reader(text, strict=True)
            columns = [name.strip() for name in next(reader, [])]
            for row in reader:
                if any(cell.strip() for cell in row):
                    rows.append((reader.line_num, [cell.strip() for cell in row]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data: {file}: cannot be read as a UTF-8 CSV file ({error})") from error
    if not columns or not rows:
        raise UserError(f"data: {file}: has no {'rows' if columns else 'header line'}")
    if duplicates := sorted({name for name in columns if columns.count(name) > 1}):
        raise UserError(f"data: {file}:1: duplicate column {duplicates[0]!r}")
    errors = ErrorList(file)
    complete = []
    for line, row in rows:
        if len(row) == len(columns):
            complete.append((line, dict(zip(columns, row, strict=True))))
        else:
            errors.add(line, f"has {len(row)} columns, but the header has {len(columns)}")
    return CsvTable(file, columns, complete, errors)


def row_splits(table: CsvTable) -> list[str]:
    """Return the split of each row from the column `split`: train, val (or valid, validation) or test.

    Without this column every row belongs to train. Other values are added to the errors of the table.
    """
    if "split" not in table.columns:
        return ["train"] * len(table.rows)
    words = [cells["split"] for _, cells in table.rows]
    unique_split_names(dict.fromkeys(words), f"data: {table.file}: the column split")
    for (line, _), word in zip(table.rows, words, strict=True):
        if word not in SPLIT_NAMES:
            near = suggest(word.lower(), list(SPLIT_NAMES))
            table.errors.add(line, f"split {word!r} is not one of {', '.join(SPLIT_NAMES)}{near}")
    return [SPLIT_NAMES.get(word, word) for word in words]


def read_boxes(file: Path, names: list[str]) -> list[tuple[str, Box]]:
    """Read (image name, box) from a CSV file `image_name,box_left,box_top,box_right,box_bottom`.

    Boxes are in pixels from the image's edge. An image may have several boxes. `names` are the existing images.
    """
    table = read_csv(file)
    if missing := [name for name in ("image_name", *BOX_COLUMNS) if name not in table.columns]:
        raise UserError(f"boxes: {file}:1: has no column {', '.join(missing)}")
    existing = set(names)
    boxes: list[tuple[str, Box]] = []
    for line, cells in table.rows:
        name = cells["image_name"]
        left, top, right, bottom = sides = [parse_number(cells[side]) for side in BOX_COLUMNS]
        if name not in existing:
            table.errors.add(line, f"{name!r} is not one of the images")
        elif any(map(math.isnan, sides)):
            table.errors.add(line, "expected four sides in pixels")
        elif right <= left or bottom <= top:
            table.errors.add(line, f"the box is empty: {left:g} to {right:g}, {top:g} to {bottom:g}")
        else:
            boxes.append((name, (left, top, right, bottom)))
    table.errors.raise_if_any()
    return boxes


def parse_number(text: str) -> float:
    """Return a coordinate; NaN if the text is not a number, or its absolute value exceeds a million."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if abs(value) <= 1e6 else math.nan


def sort_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Sort distinct names; by value if all are integers."""
    distinct = set(names)
    numeric = all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in distinct)
    return tuple(sorted(distinct, key=lambda name: (int(name) if numeric else 0, name)))


def find_csv(file: str | None, root: str | None, expected: str) -> tuple[Path, Path]:
    """Find a CSV file: `data.file`, relative to the working directory or to `data.root`; or the only one in it.

    Returns:
        The file, and the folder that the paths in it are relative to: `data.root`, or the file's own.
    """
    folder = Path(root).expanduser() if root else None
    if file is not None:
        path = Path(file).expanduser()
        candidates = [path] if folder is None else [path, folder / path, folder / path.name]
        for candidate in candidates:
            if is_file(candidate):
                return candidate, folder or candidate.parent
        looked = " or ".join(str(candidate.absolute()) for candidate in dict.fromkeys(candidates))
        raise UserError(f"data.file: no file {looked}; it must be {expected}")
    if folder is None:
        raise UserError(f"data.file: missing; give {expected}, as data.file=PATH (or its folder, as data.root=PATH)")
    found = sorted(path for path in folder.glob("*.csv") if is_file(path))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"data.file: missing; {folder.absolute()} must contain one CSV file, but has {names}")
    return found[0], folder
