"""Learning curves of several runs in one figure, in the style of figure 6 of He et al. 2016."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cnntrain.plots.figure import COLORS, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, float]]  # as in metrics.csv
_MAX_LEGEND_ENTRIES = 16  # a longer legend would cover the curves


def learning_curves(groups: Mapping[str, Sequence[Rows]], metric: str) -> Figure:
    """Plot one color per group: training thin and dashed, validation bold.

    Curves are means over the runs of a group; a band spans their minimum and maximum.

    Args:
        groups: group name -> rows of metrics.csv of each run (same settings, different seeds).
        metric: for example `top1`, which is plotted as error in %.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    colors: Sequence[object] = COLORS
    if len(groups) > len(COLORS):
        colors = [colormaps["viridis"](i / (len(groups) - 1)) for i in range(len(groups))]
    axis = _x_axis([rows for runs in groups.values() for rows in runs])
    with style():
        figure = new_figure(7.4, 4.6)
        ax = figure.subplots()
        for (name, runs), color in zip(groups.items(), colors, strict=False):
            _draw(ax, runs, f"train/{metric}", axis, color, linewidth=1.1, linestyle=(0, (4, 2)), alpha=0.9)
            _draw(ax, runs, f"val/{metric}", axis, color, linewidth=2.2, label=name, band=True)
        is_error = _is_share(metric)
        ax.set(xlabel=axis, ylabel=f"{metric} error (%)" if is_error else metric)
        ax.set_title("dashed: training, bold: validation")
        heights = [y for line in ax.lines for y in line.get_ydata() if math.isfinite(y)]  # pyright: ignore
        if not is_error and heights and min(heights) > 0 and max(heights) > 30 * min(heights):
            ax.set_yscale("log")
        elif is_error:
            ax.set_ylim(bottom=0)
        if axis == "epoch":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(True)
        if len(groups) <= _MAX_LEGEND_ENTRIES:
            ax.legend(loc="best")
    return figure


def _draw(
    ax: Axes, runs: Sequence[Rows], key: str, axis: str, color: object, band: bool = False, **how: object
) -> None:
    """Plot the mean of the runs that have a value at each position."""
    points: dict[float, list[float]] = {}
    for rows in runs:
        for row in rows:
            value = row.get(key, math.nan)
            if math.isfinite(value):
                metric = key.split("/", 1)[1]
                points.setdefault(row[axis], []).append(100 * (1 - value) if _is_share(metric) else value)
    if not points:
        return
    x = sorted(points)
    ax.plot(x, [sum(points[at]) / len(points[at]) for at in x], color=color, **how)  # type: ignore[arg-type]
    if band and len(runs) > 1:
        low, high = [min(points[at]) for at in x], [max(points[at]) for at in x]
        ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)  # type: ignore[arg-type]


def _is_share(metric: str) -> bool:
    """Return True if a metric is a fraction of correct predictions, which is plotted as error."""
    return metric.startswith("top")


def _x_axis(runs: Sequence[Rows]) -> str:
    """Return "epoch" if all runs have the same number of steps per epoch, else "step"."""
    lengths = {rows[0]["step"] / rows[0]["epoch"] for rows in runs if rows and rows[0].get("epoch")}
    return "epoch" if len(lengths) <= 1 else "step"
