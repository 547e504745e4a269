"""metrics.csv: complete rows, no duplicates after a resume, columns that are added later."""

import csv
import math
from pathlib import Path

from cnntrain.report.metrics import MetricsFile, read_metrics


def row(epoch: int, **more: float) -> dict[str, float]:
    return {"epoch": epoch, "train/loss": 1 / (epoch + 1), **more}


def test_rows_are_read_as_written(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "deep" / "metrics.csv")
    for epoch in range(3):
        file.append(row(epoch))
    rows = read_metrics(file.path)
    assert [r["epoch"] for r in rows] == [0, 1, 2]
    assert all(abs(r["train/loss"] - 1 / (i + 1)) < 1e-8 for i, r in enumerate(rows))
    assert file.path.read_text().splitlines()[1] == "0,1"


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    uninterrupted = MetricsFile(tmp_path / "a.csv")
    interrupted = MetricsFile(tmp_path / "b.csv")
    for epoch in range(5):
        uninterrupted.append(row(epoch))
    for epoch in range(4):  # continued after its last checkpoint
        interrupted.append(row(epoch))
    interrupted = MetricsFile(tmp_path / "b.csv", resume_epoch=2)
    for epoch in range(2, 5):
        interrupted.append(row(epoch))
    assert interrupted.path.read_text() == uninterrupted.path.read_text()


def test_a_new_run_replaces_the_file(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "m.csv").append(row(0))
    assert read_metrics(MetricsFile(tmp_path / "m.csv").path) == []
    assert read_metrics(MetricsFile(tmp_path / "new.csv", resume_epoch=3).path) == []


def test_new_columns_are_added_and_missing_values_stay_empty(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.csv")
    file.append(row(0))
    file.append(row(1, **{"val/top1": 0.5}))
    file.append(row(2))
    rows = read_metrics(file.path)
    assert ["val/top1" in r for r in rows] == [False, True, False]
    with file.path.open(newline="") as lines:
        assert {len(cells) for cells in csv.reader(lines)} == {3}


def test_nan_is_kept_and_an_incomplete_line_is_dropped(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.csv")
    file.append(row(0, **{"val/loss": math.nan}))
    file.append(row(1, **{"val/loss": math.inf}))
    with file.path.open("a") as lines:
        lines.write("2,0.3")
    rows = read_metrics(file.path)
    assert len(rows) == 2
    assert math.isnan(rows[0]["val/loss"])
    assert rows[1]["val/loss"] == math.inf
    MetricsFile(file.path, resume_epoch=9)
    assert len(file.path.read_text().splitlines()) == 3
