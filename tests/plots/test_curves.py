"""Curves, read back from the figure."""

import numpy as np
import pytest

from cnntrain.plots.curves import (
    learning_rate_by_step,
    plot_check_curves,
    plot_learning_curves,
    plot_lr_range_test,
    plot_overfit_curve,
    plot_training_curves,
)
from cnntrain.plots.figure import to_png
from cnntrain.train.schedule import OneCycle


def test_training_curves_have_a_panel_per_metric_and_mark_the_best_epoch() -> None:
    top1 = [0.5, 0.9, 0.7]
    rows = [
        {"epoch": e + 1, "step": e, "train/loss": 1 / (e + 1), "val/loss": 2.0, "val/top1": top1[e], "lr": 0.1}
        for e in range(3)
    ]
    figure = plot_training_curves(rows, ("top1", "max"))
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_title(loc="left")}
    assert list(panels) == ["loss", "top1", "learning rate"]
    lines = {line.get_label(): line for line in panels["loss"].lines}
    assert list(lines["train"].get_ydata()) == [1.0, 0.5, 1 / 3]
    assert list(lines["val"].get_xdata()) == [1, 2, 3]
    assert panels["top1"].texts[0].get_text() == "best: epoch 2"


def test_the_learning_rate_is_drawn_for_every_step() -> None:
    """A one-cycle run of two epochs: warm-up and peak lie inside the first epoch."""
    cycle = OneCycle(warmup=0.3, start=0.04, final=1e-4, shape="cosine", total_steps=40, steps_per_epoch=20)
    rates = [0.01 * cycle.multiplier(step) for step in range(40)]
    rows = [{"epoch": 1, "step": 20, "lr": rates[19]}, {"epoch": 2, "step": 40, "lr": rates[39]}]
    panel = plot_training_curves(rows, None, rates.__getitem__).axes[0]
    (line,) = panel.lines
    np.testing.assert_allclose(line.get_ydata(), rates)
    np.testing.assert_allclose(line.get_xdata(), np.arange(1, 41) / 20)


def test_the_learning_rate_of_another_schedule_is_taken_from_the_rows() -> None:
    """After a resume with more epochs, or with ReduceLROnPlateau, which only knows its current factor."""
    rows = [{"epoch": e, "step": 4 * e, "lr": rate} for e, rate in ((1, 0.5), (2, 0.25), (3, 0.1))]
    epochs, rates = learning_rate_by_step(rows, lambda step: (12 - step) / 10)
    assert epochs == [1, 2, *np.linspace(2.25, 3, 4)] and rates == [0.5, 0.25, 0.4, 0.3, 0.2, 0.1]
    held = learning_rate_by_step(rows, lambda step: 0.1)
    assert held == ([*np.linspace(0.25, 3, 12)], [*4 * [0.5], *4 * [0.25], *4 * [0.1]])


def test_the_learning_rate_of_a_long_run_is_sampled() -> None:
    rows = [{"epoch": e + 1, "step": 10_000 * (e + 1), "lr": 1.0} for e in range(20)]
    assert len(learning_rate_by_step(rows, lambda step: 1.0)[0]) == 2000


@pytest.mark.parametrize("rows", [[], [{"epoch": 0}], [{"epoch": 0, "train/loss": float("nan"), "lr": 0.1}]])
def test_training_curves_of_incomplete_rows(rows: list[dict[str, float]]) -> None:
    assert to_png(plot_training_curves(rows, ("top1", "max"))).startswith(b"\x89PNG")


def metric_rows(*values: float, steps: int = 10) -> list[dict[str, float]]:
    return [
        {"epoch": i + 1.0, "step": (i + 1.0) * steps, "train/top1": value - 0.1, "val/top1": value}
        for i, value in enumerate(values)
    ]


def test_learning_curves_show_errors_in_percent_training_dashed_and_validation_bold() -> None:
    groups = {"a": [metric_rows(0.5, 0.75)], "b": [metric_rows(0.6, 0.8), metric_rows(0.8, 0.9, 1.0)]}
    ax = plot_learning_curves(groups, "top1").axes[0]
    train, val, _, second = ax.lines
    assert val.get_ydata() == pytest.approx([50, 25]) and train.get_ydata() == pytest.approx([60, 35])
    assert val.get_linewidth() > train.get_linewidth() and train.get_linestyle() != "-"
    assert second.get_ydata() == pytest.approx([30, 15, 0])  # the mean over the runs that have this epoch
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices
    assert isinstance(heights, np.ndarray)
    assert (heights[:, 1].min(), heights[:, 1].max()) == pytest.approx((0, 40))
    assert "%" in ax.get_ylabel() and ax.get_xlabel() == "epoch"


def test_learning_curves_with_different_epoch_lengths_are_drawn_over_steps() -> None:
    groups = {"a": [metric_rows(0.5, 0.75)], "b": [metric_rows(0.5, steps=20)]}
    ax = plot_learning_curves(groups, "top1").axes[0]
    assert ax.get_xlabel() == "step" and ax.lines[1].get_xdata() == pytest.approx([10, 20])


def test_learning_curves_of_a_loss_have_a_logarithmic_axis() -> None:
    rows = [{"epoch": 1.0, "step": 1.0, "val/loss": 30.0}, {"epoch": 2.0, "step": 2.0, "val/loss": 0.1}]
    ax = plot_learning_curves({"a": [rows]}, "loss").axes[0]
    assert ax.lines[0].get_ydata() == pytest.approx([30, 0.1]) and ax.get_yscale() == "log"


def test_the_overfit_curve_has_a_logarithmic_axis_if_the_loss_falls_far() -> None:
    assert plot_overfit_curve([2.3, 1.0, 0.1], 0.05, 2.3, "title").axes[0].get_yscale() == "linear"
    assert plot_overfit_curve([2.3, 1e-3, 0.0], 0.0, 2.3, "title").axes[0].get_yscale() == "log"


def test_the_range_test_ends_above_the_initial_loss() -> None:
    losses = [2.0, 1.0, 100.0, float("nan")]
    ax = plot_lr_range_test([1e-4, 1e-3, 1e-2, 1e-1], losses, losses, {"steepest": 1e-3}, "title").axes[0]
    assert ax.get_xscale() == "log" and 2 < ax.get_ylim()[1] < 3


def test_check_curves_have_a_panel_per_title() -> None:
    curves = {
        "loss over learning rate": {"a": ([1e-4, 1e-1], [1.0, 2.0])},
        "z: norm over layer": {"x": ([0, 1, 2], [0.0, 1e-3, 1.0]), "y": ([0, 1, 2], [1.0, 1.0, 1.0])},
        "third": {"x": ([1, 2], [1.0, 2.0])},
    }
    first, second, third = [ax for ax in plot_check_curves(curves).axes if ax.axison]
    assert (first.get_xlabel(), first.get_ylabel()) == ("learning rate", "loss")
    assert [ax.get_xscale() for ax in (first, second, third)] == ["log", "linear", "linear"]
    assert [ax.get_yscale() for ax in (first, second, third)] == ["linear", "log", "linear"]
    assert second.get_ylabel() == "norm" and second.get_legend() and not first.get_legend()
