"""Tables and files of `inspect`."""

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn

from cnntrain.summary.layer_table import ModelSummary, summarize
from cnntrain.summary.view import compare, fitting_depth, fold, print_summaries


def block(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())


@pytest.fixture(scope="module")
def summary() -> ModelSummary:
    return summarize(nn.Sequential(*(nn.Sequential(block(4), block(4)) for _ in range(12))), (4, 16, 16), "tower")


def test_folding_keeps_the_totals(summary: ModelSummary) -> None:
    for depth in (1, 2, 3, None):
        rows = fold(summary.rows, depth)
        assert sum(row.parameters for row in rows) == summary.parameters()
        assert sum(row.multiply_adds for row in rows) == summary.multiply_adds
        assert rows[-1].receptive_field == summary.rows[-1].receptive_field
    assert len(fold(summary.rows, 1)) == 12
    assert fitting_depth(summary.rows) == 2


def test_files(summary: ModelSummary, tmp_path: Path) -> None:
    """The CSV has every row, the sums are the totals of the JSON file, and the figure is written."""
    console = Console(file=io.StringIO())
    written = print_summaries([summary], tmp_path / "inspect", convention="keras", console=console)
    assert [path.name for path in written] == ["layers.csv", "summary.json", "summary.png"]
    rows = list(csv.DictReader(written[0].open()))
    totals = json.loads(written[1].read_text())["totals"]
    assert len(rows) == len(summary.rows) == 72
    assert sum(int(row["parameters"]) for row in rows) == totals["parameters"] == summary.parameters("keras")
    assert sum(int(row["multiply_adds"]) for row in rows) == totals["multiply_adds"]
    assert rows[0]["output_shape"] == "4x16x16"
    assert written[2].stat().st_size > 10_000


def test_printed_table(summary: ModelSummary) -> None:
    """The table is folded to a page and has totals and conventions."""
    stream = io.StringIO()
    print_summaries([summary], console=Console(file=stream))
    text = stream.getvalue()
    assert "tower on 4x16x16" in text
    assert f"{summary.multiply_adds:,}" in text
    assert "multiply-adds without bias" in text
    assert "3 layers" in text


def test_comparison(summary: ModelSummary, tmp_path: Path) -> None:
    small = summarize(nn.Conv2d(4, 4, 3), (4, 16, 16), "small")
    rows = compare([summary, small])
    assert [row["network"] for row in rows] == ["tower", "small"]
    assert (rows[1]["parameters"], rows[1]["multiply_adds"], rows[1]["receptive_field"]) == (148, 28_224, "3")
    written = print_summaries([summary, small], tmp_path, console=Console(file=io.StringIO()))
    assert {path.name for path in written} == {"comparison.csv", "comparison.json", "tower.png", "small.png"}


@pytest.mark.slow
def test_networks_with_one_name_get_two_figures(summary: ModelSummary, tmp_path: Path) -> None:
    written = print_summaries([summary, summary], tmp_path, console=Console(file=io.StringIO()))
    assert [path.name for path in written[2:]] == ["tower-1.png", "tower-2.png"]
