"""metrics.csv: one row an epoch, readable while the run goes on and after it was resumed."""

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path


class MetricsFile:
    """Appends rows to a CSV file; a column that turns up later is added, with earlier cells empty.

    Args:
        path: the file; its folder is made where it isn't there.
        resume_epoch: when a run resumes, the first epoch that it will do (again): rows of this and later
            epochs are dropped. None starts afresh.
    """

    def __init__(self, path: Path | str, resume_epoch: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume_epoch is not None and self.path.exists():
            kept = [row for row in read_metrics(self.path) if row.get("epoch", math.inf) < resume_epoch]
        self._columns = list(dict.fromkeys(name for row in kept for name in row))
        self._rewrite(kept)

    def append(self, row: Mapping[str, float]) -> None:
        """Add one epoch's figures; `epoch` is one of them."""
        new = [name for name in row if name not in self._columns]
        if new:
            rows = read_metrics(self.path)
            self._columns += new
            self._rewrite([*rows, dict(row)])
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([_cell(row.get(name)) for name in self._columns])

    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        """Write everything aside, then put it in place: a reader never sees half a table."""
        aside = self.path.with_name(self.path.name + ".part")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if self._columns:
                writer.writerow(self._columns)
            writer.writerows([_cell(row.get(name)) for name in self._columns] for row in rows)
        os.replace(aside, self.path)


def read_metrics(path: Path | str) -> list[dict[str, float]]:
    """Rows of a metrics.csv; empty cells are left out, and so is a last line that was cut off."""
    rows = []
    with Path(path).open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        header = next(lines, [])
        for cells in lines:
            if len(cells) != len(header):
                continue
            try:
                rows.append({name: float(cell) for name, cell in zip(header, cells, strict=True) if cell})
            except ValueError:
                continue
    return rows


def _cell(value: float | None) -> str:
    """Whole numbers without a point, others with all the digits that matter."""
    if value is None:
        return ""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.9g}"
