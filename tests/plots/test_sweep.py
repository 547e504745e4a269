"""What is drawn of a sweep, read back from the drawing."""

import numpy as np
import pytest

from cnntrain.plots.figure import to_png
from cnntrain.plots.learning_curves import learning_curves
from cnntrain.plots.sweep import plot_marginal_effect, plot_parallel_coordinates
from cnntrain.sweep.search_space import SearchDimension

AXES = [
    SearchDimension("model", ("lenet5", "mlp")),
    SearchDimension("optimizer.lr", (), 1e-4, 1e-1, log=True),
    SearchDimension("batch_size", ("64", "32")),
]
POINTS = [
    ({"model": "mlp", "optimizer.lr": "0.1", "batch_size": "32"}, 0.5),
    ({"model": "lenet5", "optimizer.lr": "0.01", "batch_size": "64"}, 0.9),
    ({"model": "mlp", "optimizer.lr": "0.001", "batch_size": "64"}, 0.7),
]


def test_a_setting_runs_through_its_own_values_and_the_best_is_on_top() -> None:
    figure = plot_parallel_coordinates(POINTS, AXES, "val/top1", "max")
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    at = [[float(line.get_ydata()[i]) for i in (0, 21, 42, -1)] for line in lines]
    assert at[0] == pytest.approx([1, 1, 0, 0])  # mlp, 0.1, 32, 0.5: the worst, drawn first
    assert at[-1] == pytest.approx([0, 2 / 3, 1, 1])  # lenet5, 0.01, 64, 0.9
    assert lines[-1].get_zorder() > lines[0].get_zorder() and len(to_png(figure)) > 5000
    turned = plot_parallel_coordinates(POINTS, AXES, "val/nme", "min")
    best = [line for line in turned.axes[0].lines if len(line.get_xdata()) > 2][-1]
    assert best.get_ydata()[-1] == 0


def test_a_marginal_effect_is_the_mean_over_the_other_keys() -> None:
    ax = plot_marginal_effect(POINTS, AXES[0], "val/top1", "max").axes[0]
    assert ax.lines[0].get_ydata() == pytest.approx([0.9, 0.6])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["lenet5", "mlp"]
    numbers = plot_marginal_effect(POINTS, AXES[2], "val/top1", "max").axes[0]
    assert [label.get_text() for label in numbers.get_xticklabels()] == ["32", "64"]
    assert numbers.lines[0].get_ydata() == pytest.approx([0.5, 0.8])
    ranged = plot_marginal_effect(POINTS, AXES[1], "val/top1", "max").axes[0]
    assert list(ranged.collections[0].get_offsets()[:, 0]) == pytest.approx([1, 2 / 3, 1 / 3])


def rows(*values: float, steps: int = 10) -> list[dict[str, float]]:
    return [
        {"epoch": i + 1.0, "step": (i + 1.0) * steps, "train/top1": value - 0.1, "val/top1": value}
        for i, value in enumerate(values)
    ]


def test_curves_show_errors_in_percent_training_dashed_and_validation_bold() -> None:
    ax = learning_curves({"a": [rows(0.5, 0.75)], "b": [rows(0.6, 0.8), rows(0.8, 0.9, 1.0)]}, "top1").axes[0]
    train, val, _, second = ax.lines
    assert val.get_ydata() == pytest.approx([50, 25]) and train.get_ydata() == pytest.approx([60, 35])
    assert val.get_linewidth() > train.get_linewidth() and train.get_linestyle() != "-"
    assert second.get_ydata() == pytest.approx([30, 15, 0])  # the mean over seeds, of those that got so far
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices
    assert isinstance(heights, np.ndarray)
    assert (heights[:, 1].min(), heights[:, 1].max()) == pytest.approx((0, 40))
    assert "%" in ax.get_ylabel() and ax.get_xlabel() == "epoch"


def test_epochs_of_other_lengths_are_drawn_over_steps() -> None:
    ax = learning_curves({"a": [rows(0.5, 0.75)], "b": [rows(0.5, steps=20)]}, "top1").axes[0]
    assert ax.get_xlabel() == "step" and ax.lines[1].get_xdata() == pytest.approx([10, 20])


def test_other_metrics_are_drawn_as_they_are() -> None:
    story = [{"epoch": 1.0, "step": 1.0, "val/loss": 30.0}, {"epoch": 2.0, "step": 2.0, "val/loss": 0.1}]
    ax = learning_curves({"a": [story]}, "loss").axes[0]
    assert ax.lines[0].get_ydata() == pytest.approx([30, 0.1]) and ax.get_yscale() == "log"
