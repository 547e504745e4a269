"""Curves over training: metrics over epochs, learning rate, loss over steps, and the learning-rate range test."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cnntrain.plots.figure import COLORS, SOFT, new_figure, shorten, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, object]  # of metrics.csv: numbers or their text; missing values are allowed

NOT_PLOTTED = ("epoch", "step", "images_per_s", "wall_s", "seconds")  # counters and rates, not metrics
MAX_LR_POINTS = 2000


def plot_training_curves(
    rows: Sequence[Row],
    monitor: tuple[str, str] | None = None,
    lr_at: Callable[[int], float] | None = None,
) -> Figure:
    """Plot training and validation metrics over epochs, one panel per metric, and the learning rate.

    Args:
        rows: rows of metrics.csv: `epoch`, `train/...`, `val/...`, `lr`.
        monitor: metric and direction ('max' or 'min') that selected the best epoch, which is marked.
        lr_at: learning rate at a step (from 0); None plots only the values at the end of each epoch.
    """
    epochs = [_to_float(row.get("epoch", i + 1)) for i, row in enumerate(rows)]
    columns_of: dict[str, list[str]] = {}  # metric -> columns of metrics.csv
    for column in dict.fromkeys(column for row in rows for column in row):
        has_values = any(math.isfinite(_to_float(row.get(column))) for row in rows)
        if has_values and column.rsplit("/", 1)[-1] not in NOT_PLOTTED:
            columns_of.setdefault(column.split("/", 1)[-1], []).append(column)
    metrics = sorted(columns_of, key=lambda name: (name != "loss", name == "lr"))
    num_columns = 2 if len(metrics) == 4 else min(3, max(len(metrics), 1))
    num_rows = -(-max(len(metrics), 1) // num_columns)
    best = _best_epoch(rows, epochs, monitor)
    with style():
        figure = new_figure(3.7 * num_columns, 2.8 * num_rows)
        axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for ax in axes[len(metrics) :]:
            ax.axis("off")
        for ax, metric in zip(axes, metrics, strict=False):
            panel = {key: [_to_float(row.get(key)) for row in rows] for key in columns_of[metric]}
            for column, values in panel.items():
                split = column.split("/", 1)[0] if "/" in column else ""
                color = {"train": COLORS[5], "val": COLORS[1]}.get(split, COLORS[0])
                if column == "lr" and lr_at is not None:
                    ax.plot(*learning_rate_by_step(rows, lr_at), color=color)
                else:
                    marker = "o" if len(rows) <= 20 else None
                    ax.plot(epochs, values, color=color, marker=marker, markersize=3.5, label=split or None)
            _finish_panel(ax, metric, [value for values in panel.values() for value in values])
            if best is not None and metric != "lr":
                ax.axvline(best, color=SOFT, linewidth=0.9, linestyle=":")
                if monitor is not None and metric == monitor[0]:
                    _annotate_best(ax, best, on_left=best > sum(epochs) / len(epochs))
    return figure


def learning_rate_by_step(rows: Sequence[Row], lr_at: Callable[[int], float]) -> tuple[list[float], list[float]]:
    """Return (fractional epochs, learning rates) of the steps of a run.

    An epoch that followed another schedule than `lr_at` (as before resuming with more epochs) gives a straight line to
    the rate at its end, which its row contains.
    """
    epochs, rates = [], []
    start_step, start_epoch = 0, 0.0
    points_per_epoch = max(MAX_LR_POINTS // max(len(rows), 1), 2)
    for row in rows:
        end_step, end_epoch, end_rate = (_to_float(row.get(key)) for key in ("step", "epoch", "lr"))
        if not (math.isfinite(end_rate) and start_step < end_step < math.inf and end_epoch > start_epoch):
            continue
        count = min(int(end_step) - start_step, points_per_epoch)
        steps = [int(step) for step in np.linspace(start_step, end_step - 1, count).round()]
        found = [lr_at(step) for step in steps]
        if not math.isclose(found[-1], end_rate, rel_tol=1e-6, abs_tol=1e-15):
            is_constant = min(found) == max(found)
            steps, found = (steps, [end_rate] * len(steps)) if is_constant else (steps[-1:], [end_rate])
        fractions = [(step + 1 - start_step) / (end_step - start_step) for step in steps]
        epochs += [start_epoch + fraction * (end_epoch - start_epoch) for fraction in fractions]
        rates += found
        start_step, start_epoch = int(end_step), end_epoch
    return epochs, rates


def _finish_panel(ax: Axes, metric: str, values: Sequence[float]) -> None:
    """Set title, axes and legend; a loss that spans more than a factor of 30 gets a logarithmic axis."""
    from matplotlib.ticker import MaxNLocator

    ax.set(title="learning rate" if metric == "lr" else metric, xlabel="epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if metric == "loss" and _spans(values, 30):
        ax.set_yscale("log")
    elif metric == "lr":
        ax.set_ylim(bottom=0)
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    ax.grid(True)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best")


def _annotate_best(ax: Axes, epoch: float, on_left: bool) -> None:
    ax.annotate(
        f"best: epoch {epoch:.0f}",
        (epoch, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if on_left else 4, 0),
        textcoords="offset points",
        ha="right" if on_left else "left",
        fontsize=8,
        color=SOFT,
    )


def _best_epoch(rows: Sequence[Row], epochs: Sequence[float], monitor: tuple[str, str] | None) -> float | None:
    """Return the epoch with the best validation metric (training metric if there is none)."""
    if monitor is None:
        return None
    metric, direction = monitor
    for column in (f"val/{metric}", f"train/{metric}"):
        values = [(_to_float(row.get(column)), epoch) for row, epoch in zip(rows, epochs, strict=True)]
        values = [pair for pair in values if math.isfinite(pair[0])]
        if values:
            return (max if direction == "max" else min)(values, key=lambda pair: pair[0])[1]
    return None


def plot_overfit_curve(losses: Sequence[float], min_loss: float, uninformed: float, title: str) -> Figure:
    """Plot the loss over steps between the loss of constant outputs (`uninformed`) and its minimum."""
    with style():
        figure = new_figure(6.2, 3.4)
        ax = figure.subplots()
        limits = [("constant outputs", uninformed, COLORS[1]), ("minimum", min_loss, COLORS[2])]
        for name, value, color in limits:
            if value > 0:
                ax.axhline(value, color=color, linestyle="--", linewidth=1.1, label=f"{name} {value:.3f}")
        ax.plot(range(len(losses)), losses, color=COLORS[0], label="loss")
        finite = [loss for loss in losses if math.isfinite(loss)]
        if finite and max(finite) > 30 * max(min(finite), 1e-12):
            ax.set_yscale("log")
        ax.set(title=shorten(title, 120), xlabel="step", ylabel="loss")
        ax.grid(True)
        ax.legend()
    return figure


def plot_lr_range_test(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    marks: Mapping[str, float],
    title: str,
) -> Figure:
    """Plot the loss of each mini-batch and the smoothed loss over the learning rate, with vertical lines at `marks`.

    The loss axis ends above the initial smoothed loss: larger values are divergence.
    """
    finite = [loss for loss in smoothed if math.isfinite(loss)]
    with style():
        figure = new_figure(6.2, 3.6)
        ax = figure.subplots()
        ax.plot(rates, losses, color=COLORS[5], linewidth=0.9, label="mini-batch")
        ax.plot(rates, smoothed, color=COLORS[0], label="smoothed")
        for i, (name, rate) in enumerate(marks.items()):
            color, label = COLORS[1 + i % 4], f"{name} {rate:.2g}"
            ax.axvline(rate, color=color, linestyle="--", linewidth=1.1, label=label)
        ax.set_xscale("log")
        if finite:
            low, start = min(finite), finite[0]
            span = max(start - low, 0.1 * abs(start), 1e-6)
            ax.set_ylim(low - 0.3 * span, start + 0.7 * span)
        ax.set(title=title, xlabel="learning rate", ylabel="loss")
        ax.grid(True)
        ax.legend()
    return figure


def _spans(values: Sequence[float], factor: float) -> bool:
    """Return whether all finite values are positive and span more than `factor`."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > factor * min(finite)


def _to_float(value: object) -> float:
    """Return a value of metrics.csv as a number; NaN if it is missing."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
