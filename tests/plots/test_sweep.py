"""Figures of a sweep, read back from the figure."""

import pytest

from cnntrain.plots.figure import to_png
from cnntrain.plots.sweep import Scale, plot_marginal_effect, plot_parallel_coordinates

MODEL = Scale("model", ["lenet5", "mlp"])
LEARNING_RATE = Scale("optimizer.lr", [], (1e-4, 1e-1), log=True)
BATCH_SIZE = Scale("batch_size", ["64", "32"])
POINTS = [
    ({"model": "mlp", "optimizer.lr": "0.1", "batch_size": "32"}, 0.5),
    ({"model": "lenet5", "optimizer.lr": "0.01", "batch_size": "64"}, 0.9),
    ({"model": "mlp", "optimizer.lr": "0.001", "batch_size": "64"}, 0.7),
]


def test_a_line_passes_through_the_values_of_its_setting_and_the_best_is_on_top() -> None:
    scales = [MODEL, LEARNING_RATE, BATCH_SIZE]
    figure = plot_parallel_coordinates(POINTS, scales, "val/top1", "max")
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    heights = [[float(line.get_ydata()[i]) for i in (0, 21, 42, -1)] for line in lines]
    assert heights[0] == pytest.approx([1, 1, 0, 0])  # mlp, 0.1, 32, 0.5: the worst, drawn first
    assert heights[-1] == pytest.approx([0, 2 / 3, 1, 1])  # lenet5, 0.01, 64, 0.9
    assert lines[-1].get_zorder() > lines[0].get_zorder() and len(to_png(figure)) > 5000
    minimized = plot_parallel_coordinates(POINTS, scales, "val/nme", "min")
    best = [line for line in minimized.axes[0].lines if len(line.get_xdata()) > 2][-1]
    assert best.get_ydata()[-1] == 0


def test_the_marginal_effect_is_the_mean_over_the_other_keys() -> None:
    ax = plot_marginal_effect(POINTS, MODEL, "val/top1", "max").axes[0]
    assert ax.lines[0].get_ydata() == pytest.approx([0.9, 0.6])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["lenet5", "mlp"]
    ax = plot_marginal_effect(POINTS, BATCH_SIZE, "val/top1", "max").axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["32", "64"]
    assert ax.lines[0].get_ydata() == pytest.approx([0.5, 0.8])
    ax = plot_marginal_effect(POINTS, LEARNING_RATE, "val/top1", "max").axes[0]
    assert list(ax.collections[0].get_offsets()[:, 0]) == pytest.approx([1, 2 / 3, 1 / 3])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.0001", "0.001", "0.01", "0.1"]
