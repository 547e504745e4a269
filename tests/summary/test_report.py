"""What inspect shows and writes."""

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn

from cnntrain.summary.layer_table import ModelSummary, analyze
from cnntrain.summary.report import report
from cnntrain.summary.view import bar, compare, fitting_depth, fold


def block(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())


@pytest.fixture(scope="module")
def anatomy() -> ModelSummary:
    return analyze(
        nn.Sequential(*(nn.Sequential(block(4), block(4)) for _ in range(12))), (4, 16, 16), "tower"
    )


def test_folding_keeps_the_totals(anatomy: ModelSummary) -> None:
    for depth in (1, 2, 3, None):
        rows = fold(anatomy.rows, depth)
        assert sum(row.parameters for row in rows) == anatomy.parameters()
        assert sum(row.multiply_adds for row in rows) == anatomy.multiply_adds
        assert rows[-1].receptive_field == anatomy.rows[-1].receptive_field
    assert len(fold(anatomy.rows, 1)) == 12
    assert fitting_depth(anatomy.rows) == 2


def test_files(anatomy: ModelSummary, tmp_path: Path) -> None:
    """The CSV has every row and sums to the JSON's totals; the picture is there."""
    console = Console(file=io.StringIO())
    written = report(anatomy, tmp_path / "inspect", convention="keras", console=console)
    assert [path.name for path in written] == ["layers.csv", "anatomy.json", "anatomy.png"]
    rows = list(csv.DictReader(written[0].open()))
    totals = json.loads(written[1].read_text())["totals"]
    assert len(rows) == len(anatomy.rows) == 72
    assert sum(int(row["parameters"]) for row in rows) == totals["parameters"] == anatomy.parameters("keras")
    assert sum(int(row["multiply_adds"]) for row in rows) == totals["multiply_adds"]
    assert rows[0]["output_shape"] == "4x16x16"
    assert written[2].stat().st_size > 10_000


def test_the_table_on_paper(anatomy: ModelSummary) -> None:
    """Folded to a page, with totals and the conventions below."""
    stream = io.StringIO()
    report(anatomy, console=Console(file=stream))
    text = stream.getvalue()
    assert "tower on 4x16x16" in text
    assert f"{anatomy.multiply_adds:,}" in text
    assert "multiply-adds without bias" in text
    assert "3 layers" in text


def test_comparison(anatomy: ModelSummary, tmp_path: Path) -> None:
    small = analyze(nn.Conv2d(4, 4, 3), (4, 16, 16), "small")
    rows = compare([anatomy, small])
    assert [row["network"] for row in rows] == ["tower", "small"]
    assert (rows[1]["parameters"], rows[1]["multiply_adds"], rows[1]["receptive_field"]) == (148, 28_224, "3")
    written = report([anatomy, small], tmp_path, console=Console(file=io.StringIO()))
    assert {path.name for path in written} == {"comparison.csv", "comparison.json", "tower.png", "small.png"}


@pytest.mark.slow
def test_two_of_one_name_get_two_pictures(anatomy: ModelSummary, tmp_path: Path) -> None:
    written = report([anatomy, anatomy], tmp_path, console=Console(file=io.StringIO()))
    assert [path.name for path in written[2:]] == ["tower-1.png", "tower-2.png"]


def test_bars() -> None:
    assert bar(0) == ""
    assert bar(1, 4) == "100.0% ████"
    assert bar(0.5, 4) == "50.0% ██"
