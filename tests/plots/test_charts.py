"""Charts, read back from the figure."""

import os

import pytest
import torch

from cnntrain.plots.charts import plot_bars, plot_confusion_matrix, plot_flip_symmetry, plot_ranking_curves
from cnntrain.plots.figure import BAD
from cnntrain.types import DataSpec

UNUSUAL = ("$5_to_$10", os.fsdecode(b"caf\xe9.jpg"), "under_score", "$")


def test_unusual_names_can_be_rendered() -> None:
    counts = torch.eye(4, dtype=torch.int64)
    figures = [
        plot_confusion_matrix(counts, UNUSUAL),
        plot_bars(dict.fromkeys(UNUSUAL, 0.5), "bars", "share"),
        *(plot_ranking_curves(torch.tensor([0.1, 0.9]), torch.tensor([False, True]), name) for name in UNUSUAL),
    ]
    for figure in figures:
        figure.canvas.draw()  # pyright: ignore[reportAttributeAccessIssue]
    label = figures[0].axes[0].get_yticklabels()[0]
    assert label.get_text() == "$5_to_$10" and not label.get_parse_math()


def test_bars_of_nan_are_empty() -> None:
    ax = plot_bars({"a": 0.5, "b": float("nan")}, "bars", "share", limit=1.0).axes[0]
    assert [bar.get_width() for bar in ax.patches] == [0.5, 0]  # pyright: ignore[reportAttributeAccessIssue]
    assert [text.get_text() for text in ax.texts] == ["0.5", "–"] and ax.get_xlim() == (0, 1)


def test_flip_symmetry_connects_keypoints_of_the_same_name() -> None:
    spec = DataSpec(1, 8, 8, keypoints=("left", "right"), flip_pairs=(1, 0))
    shape = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    figure = plot_flip_symmetry(shape, -shape, (2.0, 0.0), spec, [1], "title")
    lengths = [[abs(line.get_xdata()[1] - line.get_xdata()[0]) for line in ax.lines] for ax in figure.axes]
    assert lengths == [[2, 2], [0, 0]]
    assert [line.get_color() == BAD for line in figure.axes[0].lines] == [False, True]
    assert "2.000" in figure.axes[0].get_title(loc="left") and "0.000" in figure.axes[1].get_title(loc="left")


def test_confusion_matrix_title_has_the_accuracy() -> None:
    figure = plot_confusion_matrix(torch.tensor([[3, 1], [0, 4]]), ("a", "b"))
    assert figure.axes[0].get_title(loc="left") == "Confusion matrix: 87.5% of 8 correct"
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["1", "3", "4"]


@pytest.mark.parametrize("count", [26, 60])
def test_confusion_matrix_of_many_classes_has_no_numbers(count: int) -> None:
    figure = plot_confusion_matrix(torch.eye(count), [f"class {i}" for i in range(count)])
    assert not figure.axes[0].texts
