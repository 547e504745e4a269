"""Figures: unusual names, style, and saving."""

import os

import torch

from cnntrain.plots.charts import plot_bars, plot_confusion_matrix, plot_ranking_curves
from cnntrain.plots.figure import shorten
from cnntrain.plots.images import plot_images

ODD = ("$5_to_$10", os.fsdecode(b"caf\xe9.jpg"), "under_score", "$")


def test_unusual_names_can_be_rendered() -> None:
    counts = torch.eye(4, dtype=torch.int64)
    figures = [
        plot_confusion_matrix(counts, ODD),
        plot_bars(dict.fromkeys(ODD, 0.5), "bars", "share"),
        plot_images(torch.zeros(4, 8, 8, 3).numpy(), ODD, title=ODD[0]),
        *(plot_ranking_curves(torch.tensor([0.1, 0.9]), torch.tensor([False, True]), name) for name in ODD),
    ]
    for figure in figures:
        figure.canvas.draw()  # pyright: ignore[reportAttributeAccessIssue]
    assert figures[0].axes[0].get_yticklabels()[0].get_text() == r"\$5_to_\$10"


def test_shorten() -> None:
    assert shorten("a" * 30, 11) == "aaaaa…aaaaa"
    assert shorten(ODD[1], 40) == r"caf\udce9.jpg"
