"""Curves: metrics over epochs of one or several runs, loss over steps, the learning-rate range test, and checks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cnntrain.plots.figure import COLORS, SOFT, new_figure, new_panels, shorten, spans, use_log_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, float]]  # of metrics.csv; values may be missing
Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # x and y by label

NOT_PLOTTED = ("epoch", "step", "images_per_s", "wall_s", "seconds")  # counters and rates, not metrics
MAX_LR_POINTS = 2000
MAX_LEGEND_ENTRIES = 16  # a longer legend would cover the curves
WIDE_RANGE = 30  # factor between the largest and the smallest loss above which its axis is logarithmic


def plot_training_curves(
    rows: Rows, monitor: tuple[str, str] | None = None, lr_at: Callable[[int], float] | None = None
) -> Figure:
    """Plot training and validation metrics over epochs, one panel per metric, and the learning rate.

    Args:
        rows: rows of metrics.csv: `epoch`, `train/...`, `val/...`, `lr`.
        monitor: metric and direction ('max' or 'min') that selected the best epoch, which is marked.
        lr_at: learning rate at a step (from 0); None plots only the values at the end of each epoch.
    """
    epochs = [row.get("epoch", i + 1) for i, row in enumerate(rows)]
    series: dict[str, dict[str, list[float]]] = {}  # metric -> column of metrics.csv -> values
    for column in dict.fromkeys(column for row in rows for column in row):
        values = [row.get(column, math.nan) for row in rows]
        if any(map(math.isfinite, values)) and column.rsplit("/", 1)[-1] not in NOT_PLOTTED:
            series.setdefault(column.split("/", 1)[-1], {})[column] = values
    metrics = sorted(series, key=lambda name: (name != "loss", name == "lr"))
    columns = 2 if len(metrics) == 4 else min(3, max(len(metrics), 1))
    best = _best_epoch(rows, epochs, monitor)
    with new_figure(3.7 * columns, 2.8 * -(-max(len(metrics), 1) // columns)) as figure:
        for ax, metric in zip(new_panels(figure, len(metrics), columns), metrics, strict=True):
            for column, values in series[metric].items():
                split = column.split("/", 1)[0] if "/" in column else ""
                color = {"train": COLORS[5], "val": COLORS[1]}.get(split, COLORS[0])
                if column == "lr" and lr_at is not None:
                    ax.plot(*learning_rate_by_step(rows, lr_at), color=color)
                else:
                    marker = "o" if len(rows) <= 20 else None
                    ax.plot(epochs, values, color=color, marker=marker, markersize=3.5, label=split or None)
            _finish_panel(ax, metric, np.concatenate(list(series[metric].values())))
            if best is not None and metric != "lr":
                ax.axvline(best, color=SOFT, linewidth=0.9, linestyle=":")
            if best is not None and monitor is not None and metric == monitor[0]:
                side, offset = ("right", -4) if best > statistics.fmean(epochs) else ("left", 4)
                ax.annotate(
                    f"best: epoch {best:.0f}",
                    (best, 0.02),
                    (offset, 0),
                    ha=side,
                    fontsize=8,
                    color=SOFT,
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                )
    return figure


def learning_rate_by_step(rows: Rows, lr_at: Callable[[int], float]) -> tuple[list[float], list[float]]:
    """Return (fractional epochs, learning rates) of the steps of a run.

    An epoch that followed another schedule than `lr_at` (as before resuming with more epochs) gives a straight line to
    the rate at its end, which its row contains.
    """
    epochs, rates = [], []
    start_step, start_epoch = 0, 0.0
    points_per_epoch = max(MAX_LR_POINTS // max(len(rows), 1), 2)
    for row in rows:
        end_step, end_epoch, end_rate = (row.get(key, math.nan) for key in ("step", "epoch", "lr"))
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


def _finish_panel(ax: Axes, metric: str, values: np.ndarray) -> None:
    """Set title, axes and legend."""
    from matplotlib.ticker import MaxNLocator

    ax.set(title="learning rate" if metric == "lr" else metric, xlabel="epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if metric == "loss" and spans(values, WIDE_RANGE):
        use_log_scale(ax.yaxis)
    elif metric == "lr":
        ax.set_ylim(bottom=0)
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    ax.grid(True)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best")


def _best_epoch(rows: Rows, epochs: Sequence[float], monitor: tuple[str, str] | None) -> float | None:
    """Return the epoch with the best validation metric (training metric if there is none)."""
    if monitor is None:
        return None
    metric, direction = monitor
    for column in (f"val/{metric}", f"train/{metric}"):
        values = [(row.get(column, math.nan), epoch) for row, epoch in zip(rows, epochs, strict=True)]
        values = [pair for pair in values if math.isfinite(pair[0])]
        if values:
            return (max if direction == "max" else min)(values, key=lambda pair: pair[0])[1]
    return None


def plot_learning_curves(groups: Mapping[str, Sequence[Rows]], metric: str) -> Figure:
    """Plot one color per group of runs: training thin and dashed, validation bold, as figure 6 of He et al. 2016.

    Curves are means over the runs of a group; a band spans their minimum and maximum. The x axis counts epochs if all
    runs have the same number of steps per epoch, else steps.

    Args:
        groups: group name -> rows of metrics.csv of each run (same settings, different seeds).
        metric: for example `top1`; fractions of correct predictions are plotted as error in %.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    colors: Sequence[Any] = COLORS
    if len(groups) > len(COLORS):
        colors = [colormaps["viridis"](i / (len(groups) - 1)) for i in range(len(groups))]
    first_rows = [rows[0] for runs in groups.values() for rows in runs if rows]
    steps_per_epoch = {row["step"] / row["epoch"] for row in first_rows if row.get("epoch")}
    axis = "epoch" if len(steps_per_epoch) <= 1 else "step"
    is_error = metric.startswith("top")
    heights: list[float] = []
    with new_figure(7.4, 4.6) as figure:
        ax = figure.subplots()
        for (name, runs), color in zip(groups.items(), colors, strict=False):
            for split in ("train", "val"):
                points: dict[float, list[float]] = {}
                for row in (row for rows in runs for row in rows):
                    value = row.get(f"{split}/{metric}", math.nan)
                    if math.isfinite(value):
                        points.setdefault(row[axis], []).append(100 * (1 - value) if is_error else value)
                if not points:
                    continue
                x = sorted(points)
                means = [sum(points[at]) / len(points[at]) for at in x]
                heights += means
                if split == "train":
                    ax.plot(x, means, color=color, linewidth=1.1, linestyle=(0, (4, 2)), alpha=0.9)
                    continue
                ax.plot(x, means, color=color, linewidth=2.2, label=name)
                if len(runs) > 1:
                    low, high = [min(points[at]) for at in x], [max(points[at]) for at in x]
                    ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        ax.set(xlabel=axis, ylabel=f"{metric} error (%)" if is_error else metric)
        ax.set_title("dashed: training, bold: validation")
        if is_error:
            ax.set_ylim(bottom=0)
        elif spans(heights, WIDE_RANGE):
            use_log_scale(ax.yaxis)
        if axis == "epoch":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(True)
        if len(groups) <= MAX_LEGEND_ENTRIES:
            ax.legend(loc="best")
    return figure


def plot_overfit_curve(losses: Sequence[float], min_loss: float, uninformed: float, title: str) -> Figure:
    """Plot the loss over steps between the loss of constant outputs (`uninformed`) and its minimum."""
    with new_figure(6.2, 3.4) as figure:
        ax = figure.subplots()
        for name, value, color in (("constant outputs", uninformed, COLORS[1]), ("minimum", min_loss, COLORS[2])):
            if value > 0:
                ax.axhline(value, color=color, linestyle="--", linewidth=1.1, label=f"{name} {value:.3f}")
        ax.plot(range(len(losses)), losses, color=COLORS[0], label="loss")
        if spans((max(loss, 1e-12) for loss in losses), WIDE_RANGE):
            use_log_scale(ax.yaxis)
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
    with new_figure(6.2, 3.6) as figure:
        ax = figure.subplots()
        ax.plot(rates, losses, color=COLORS[5], linewidth=0.9, label="mini-batch")
        ax.plot(rates, smoothed, color=COLORS[0], label="smoothed")
        for i, (name, rate) in enumerate(marks.items()):
            color, label = COLORS[1 + i % 4], f"{name} {rate:.2g}"
            ax.axvline(rate, color=color, linestyle="--", linewidth=1.1, label=label)
        use_log_scale(ax.xaxis)
        if finite:
            low, start = min(finite), finite[0]
            span = max(start - low, 0.1 * abs(start), 1e-6)
            ax.set_ylim(low - 0.3 * span, start + 0.7 * span)
        ax.set(title=title, xlabel="learning rate", ylabel="loss")
        ax.grid(True)
        ax.legend()
    return figure


def plot_check_curves(curves: Mapping[str, Lines]) -> Figure:
    """Plot the curves of `cnntrain check`, a panel per title. Axes are logarithmic if values span a factor of 100.

    Args:
        curves: lines by title. A title of the form 'loss over learning rate' also labels the axes.
    """
    columns = min(2, len(curves))
    with new_figure(5.2 * columns, 3.3 * -(-len(curves) // columns)) as figure:
        for ax, (title, lines) in zip(new_panels(figure, len(curves), columns), curves.items(), strict=True):
            for number, (label, (x, y)) in enumerate(lines.items()):
                ax.plot(x, y, color=COLORS[number % len(COLORS)], label=label, linewidth=1.3)
            if spans((value for x, _ in lines.values() for value in x), 100):
                use_log_scale(ax.xaxis)
            # Values of 0 are left out of a logarithmic axis.
            if spans((value for _, y in lines.values() for value in y if value), 100):
                use_log_scale(ax.yaxis)
            what, _, over = title.partition(" over ")
            ax.set(title=title, ylabel=what.rsplit(": ")[-1], xlabel=over)
            ax.grid(True)
            if len(lines) > 1:
                ax.legend()
    return figure
