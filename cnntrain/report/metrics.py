"""metrics.csv: one row per epoch, readable during the run and after a resume."""

import csv
import io
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from cnntrain.errors import UserError
from cnntrain.io import safe_files as files


class MetricsFile:
    """Append rows to a CSV file. New columns are added with empty cells in earlier rows.

    Write errors (for example a full disk) do not stop training: the first one is reported as a warning, and missing
    rows are written together with the next row.

    Args:
        path: the file; its folder is created if missing.
        resume_epoch: when a run is resumed, the first epoch that is trained (again): rows of this and later epochs are
            dropped. None starts a new file.
    """

    def __init__(self, path: Path | str, resume_epoch: int | None = None) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, float]] = []
        if resume_epoch is not None and self.path.exists():
            self.rows = [row for row in read_metrics(self.path) if row.get("epoch", math.inf) < resume_epoch]
        self._columns = list(dict.fromkeys(name for row in self.rows for name in row))
        self._incomplete = self._warned = False
        self._write(self._rewrite)

    def append(self, row: Mapping[str, float]) -> None:
        """Append the row of one epoch."""
        new = [name for name in row if name not in self._columns]
        self._columns += new
        self.rows.append(dict(row))
        self._write(self._rewrite if new or self._incomplete else self._append)

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
            self._incomplete = False
        except OSError as error:
            self._incomplete = True
            if not self._warned:
                self._warned = True
                warnings.warn(f"cannot write {self.path}: {error}", stacklevel=4)

    def _append(self) -> None:
        text = io.StringIO()
        csv.writer(text).writerow([_cell(self.rows[-1].get(name)) for name in self._columns])
        with files.open_append(self.path) as file:
            file.write(text.getvalue().encode("utf-8", "backslashreplace"))

    def _rewrite(self) -> None:
        """Write all rows to a temporary file and replace the old one, so that readers never see a partial table."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with files.open_atomic_text(self.path, sync=False) as file:
            writer = csv.writer(file)
            if self._columns:
                writer.writerow(self._columns)
            writer.writerows([_cell(row.get(name)) for name in self._columns] for row in self.rows)


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """Read the rows of a metrics.csv, without empty cells and incomplete lines.

    Raises:
        UserError: `path` is a link, not a regular file, or not a CSV file in UTF-8.
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
            f"{path}:{lines.line_num}: not a valid CSV file ({error}); remove it, or use another file"
        ) from error
    return rows


def _cell(value: float | None) -> str:
    """Format integers without a decimal point and other values with 9 significant digits."""
    if value is None:
        return ""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.9g}"
