"""metrics.csv: one row an epoch, readable while the run goes on and after it was resumed."""

import csv
import io
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from cnntrain.errors import UserError
from cnntrain.io import safe_files as files


class MetricsFile:
    """Appends rows to a CSV file; a column that turns up later is added, with earlier cells empty.

    A disk that is full or gone is warned of once, and the training goes on; what could not be written is written with
    the next row that can be.

    Args:
        path: the file; its folder is made where it isn't there.
        resume_epoch: when a run resumes, the first epoch that it will do (again): rows of this and later
            epochs are dropped. None starts afresh.
    """

    def __init__(self, path: Path | str, resume_epoch: int | None = None) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, float]] = []
        if resume_epoch is not None and self.path.exists():
            self.rows = [row for row in read_metrics(self.path) if row.get("epoch", math.inf) < resume_epoch]
        self._columns = list(dict.fromkeys(name for row in self.rows for name in row))
        self._behind = self._warned = False
        self._write(self._rewrite)

    def append(self, row: Mapping[str, float]) -> None:
        """Add one epoch's figures; `epoch` is one of them."""
        new = [name for name in row if name not in self._columns]
        self._columns += new
        self.rows.append(dict(row))
        self._write(self._rewrite if new or self._behind else self._append)

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
            self._behind = False
        except OSError as error:
            self._behind = True
            if not self._warned:
                self._warned = True
                warnings.warn(f"{self.path} is not being written: {error}", stacklevel=4)

    def _append(self) -> None:
        text = io.StringIO()
        csv.writer(text).writerow([_cell(self.rows[-1].get(name)) for name in self._columns])
        with files.open_append(self.path) as file:
            file.write(text.getvalue().encode("utf-8", "backslashreplace"))

    def _rewrite(self) -> None:
        """Write everything aside, then put it in place: a reader never sees half a table."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing_text(self.path, sync=False) as file:
            writer = csv.writer(file)
            if self._columns:
                writer.writerow(self._columns)
            writer.writerows([_cell(row.get(name)) for name in self._columns] for row in self.rows)


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """Rows of a metrics.csv; empty cells are left out, and so is a last line that was cut off.

    Raises:
        UserError: it is a link or no regular file, or no CSV in UTF-8.
    """
    path, rows = Path(path), []
    lines = csv.reader(io.StringIO(files.read_text(path), newline=""))
    try:
        header = next(lines, [])
        for cells in lines:
            if len(cells) != len(header):
                continue
            try:
                row = {name: float(cell) for name, cell in zip(header, cells, strict=True) if cell}
            except ValueError:
                continue
            if all(abs(row.get(name, 0.0)) < 2**53 for name in ("epoch", "step")):
                rows.append(row)
    except csv.Error as error:
        raise UserError(
            f"{path}:{lines.line_num}: is no CSV ({error}); remove it, or use another file"
        ) from error
    return rows


def _cell(value: float | None) -> str:
    """Whole numbers without a point, others with all the digits that matter."""
    if value is None:
        return ""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.9g}"
