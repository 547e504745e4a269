"""Reading CSV files strictly: every complaint names file and line, and all come together."""

import csv
import io
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cnntrain.data.files import SPLIT_NAMES, one_name_each
from cnntrain.errors import UserError, suggest

SHOWN_LINES = 20


class ErrorList:
    """What is wrong with an annotation file, gathered to be reported at once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: list[str] = []

    def add(self, line: int | str, problem: str) -> None:
        self.found.append(f"{self.file}:{line}: {problem}")

    def raise_if_any(self) -> None:
        """Raises UserError when anything was added."""
        if self.found:
            more = len(self.found) - SHOWN_LINES
            shown = self.found[:SHOWN_LINES] + ([f"... and {more} more"] if more > 0 else [])
            raise UserError("data: " + "\n  ".join(shown))


def read_annotations(file: Path) -> bytes:
    """What an annotation file holds.

    Raises:
        OSError: it can't be read, or is none: a FIFO would wait for ever, a device never end.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError("is no regular file")
    return file.read_bytes()


@dataclass
class Table:
    """A CSV file: its header, and its rows with the line each stands on."""

    file: Path
    columns: list[str]
    rows: list[tuple[int, list[str]]]
    complaints: ErrorList


def read_table(file: Path) -> Table:
    """A comma-separated file with one header line; a byte-order mark is accepted, empty lines are skipped.

    Raises:
        UserError: it can't be read, has no header or no rows, names a column twice, or has rows of other
            lengths.
    """
    complaints = ErrorList(file)
    rows: list[tuple[int, list[str]]] = []
    try:
        with io.StringIO(read_annotations(file).decode("utf-8-sig"), newline="") as text:
            reader = csv.reader(text, strict=True)
            columns = [name.strip() for name in next(reader, [])]
            for row in reader:
                if any(cell.strip() for cell in row):
                    rows.append((reader.line_num, [cell.strip() for cell in row]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data: {file}: can't be read as a UTF-8 CSV file ({error})") from error
    if not columns or not rows:
        raise UserError(f"data: {file}: has no {'rows' if columns else 'header line'}")
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise UserError(f"data: {file}:1: column {twice[0]!r} stands there twice")
    sound = []
    for line, row in rows:
        if len(row) == len(columns):
            sound.append((line, row))
        else:
            complaints.add(line, f"has {len(row)} columns, the header has {len(columns)}")
    return Table(file, columns, sound, complaints)


def splits_of(table: Table) -> list[str]:
    """Return the split of each row from the column `split`: train, val (or valid, validation) or test.

    Without this column every row belongs to train. Other values are added to the table's complaints.

    Raises:
        UserError: two words in the column mean the same split.
    """
    if "split" not in table.columns:
        return ["train"] * len(table.rows)
    place = table.columns.index("split")
    words = [cells[place] for _, cells in table.rows]
    one_name_each(dict.fromkeys(words), f"data: {table.file}: the column split")
    for (line, _), word in zip(table.rows, words, strict=True):
        if word not in SPLIT_NAMES:
            near = suggest(word.lower(), list(SPLIT_NAMES))
            table.complaints.add(line, f"split {word!r} is not one of {', '.join(SPLIT_NAMES)}{near}")
    return [SPLIT_NAMES.get(word, word) for word in words]


def is_file(path: Path) -> bool:
    """Return True if the file exists; False for invalid names (too long, or with a null byte)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort the names; by value if all are integers."""
    distinct = set(names)
    as_numbers = all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in distinct)
    return tuple(sorted(distinct, key=lambda name: (int(name) if as_numbers else 0, name)))


def find_table(file: str | None, root: str | None, what: str) -> Path:
    """The CSV file that `data.file` names (from here, or in `data.root`), or the only one in `data.root`.

    Raises:
        UserError: neither was given, or there is none, or more than one to choose from.
    """
    folder = Path(root).expanduser() if root else None
    if file is not None:
        given = Path(file).expanduser()
        tried = [given] if folder is None else [given, folder / given, folder / given.name]
        for path in tried:
            if is_file(path):
                return path
        looked = " and ".join(str(path.absolute()) for path in dict.fromkeys(tried))
        raise UserError(f"data.file: no file {looked}; it must be {what}")
    if folder is None:
        raise UserError(
            f"data.file: missing; give {what}, as data.file=PATH (or its folder, as data.root=PATH)"
        )
    found = sorted(path for path in folder.glob("*.csv") if is_file(path))
    if len(found) != 1:
        there = ", ".join(path.name for path in found) or "none"
        raise UserError(f"data.file: missing; {folder.absolute()} should hold one CSV file and holds {there}")
    return found[0]
