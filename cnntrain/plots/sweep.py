"""Figures of a sweep: parallel coordinates of all settings, and the marginal effect of each key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from cnntrain.plots.figure import BAD, COLORS, FRAME, INK, SOFT, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[Mapping[str, str], float]  # values of the swept keys, and the metric
Ticks = list[tuple[float, str]]  # heights and labels
MAX_TICKS = 12  # more names would overlap
NUM_BINS = 5  # of a continuous range


class Scale:
    """Map the values of a swept key to heights between 0 and 1.

    Args:
        names: listed values; numbers are sorted.
        limits: lowest and highest value of a continuous range, which has no listed values.
        log: whether the range is logarithmic.
    """

    def __init__(
        self, key: str, names: Sequence[str], limits: tuple[float, float] = (0.0, 1.0), log: bool = False
    ) -> None:
        self.key, self.limits, self.log = key, limits, log
        self.is_numeric = all(map(_is_number, names))
        self.names = sorted(names, key=float) if self.is_numeric else list(names)

    def height(self, value: str) -> float:
        if self.names:
            return self.names.index(value) / (len(self.names) - 1) if len(self.names) > 1 else 0.5
        low, high, number = (math.log(each) if self.log else each for each in (*self.limits, float(value)))
        return (number - low) / (high - low)

    def ticks(self) -> Ticks:
        if self.names:
            shown = self.names[:: -(-len(self.names) // MAX_TICKS)]
            return [(self.height(name), name if len(name) <= 16 else f"{name[:15]}…") for name in shown]
        low, high = self.limits
        numbers = [low + (high - low) * i / 4 for i in range(5)]
        if self.log:
            first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
            decades = [10.0**exponent for exponent in range(first, last + 1)]
            numbers = decades if len(decades) > 1 else [low, high]
        return [(self.height(repr(number)), f"{number:.3g}") for number in numbers]


def plot_parallel_coordinates(points: Sequence[Point], scales: Sequence[Scale], metric: str, direction: str) -> Figure:
    """Plot one vertical axis per key and one for the metric, and each setting as a line; the best is red and on top.

    Args:
        points: settings with a finite metric.
        direction: `max` or `min`.
    """
    from matplotlib import colormaps

    low, high = min(value for _, value in points), max(value for _, value in points)
    worst_first = sorted(points, key=lambda point: point[1], reverse=direction == "min")
    with new_figure(1.9 * (len(scales) + 1) + 1.7, 4.2) as figure:
        ax = figure.subplots()
        ax.axis("off")
        ax.set_xlim(-0.62, len(scales) + 0.5)
        ax.set_ylim(-0.09, 1.14)
        for x, scale in enumerate(scales):
            _draw_axis(ax, x, scale.key, scale.ticks())
        metric_ticks = [(i / 4, f"{low + (high - low) * i / 4:.4g}") for i in range(5)]
        _draw_axis(ax, len(scales), metric, metric_ticks if high > low else [(0.5, f"{low:.4g}")])
        for rank, (setting, value) in enumerate(worst_first):
            heights = [scale.height(setting[scale.key]) for scale in scales]
            x, y = _smooth_line([*heights, (value - low) / (high - low) if high > low else 0.5])
            if rank == len(worst_first) - 1:
                ax.plot(x, y, color=BAD, linewidth=2.6, zorder=3)
            else:
                color = colormaps["viridis"](0.15 + 0.7 * rank / max(len(points) - 1, 1))
                ax.plot(x, y, color=color, linewidth=1.2, alpha=0.75, zorder=2)
        ax.set_title(f"{len(points)} settings, the best in red")
    return figure


def plot_marginal_effect(points: Sequence[Point], scale: Scale, metric: str, direction: str) -> Figure:
    """Plot the metric over one key: gray dots for settings, blue dots for means per value (per fifth of a range).

    The spread of the gray dots at a value is the effect of the other keys.
    """
    heights, values = [scale.height(setting[scale.key]) for setting, _ in points], [value for _, value in points]
    groups: dict[float, list[float]] = {}
    for height, value in zip(heights, values, strict=True):
        group = height if scale.names else (min(int(height * NUM_BINS), NUM_BINS - 1) + 0.5) / NUM_BINS
        groups.setdefault(group, []).append(value)
    means = sorted((group, sum(members) / len(members)) for group, members in groups.items())
    positions, names = zip(*scale.ticks(), strict=True)
    with new_figure(4.6, 3.3) as figure:
        ax = figure.subplots()
        ax.scatter(heights, values, s=16, color=SOFT, alpha=0.6, linewidths=0, zorder=2)
        line = "-" if scale.is_numeric else ""
        ax.plot(*zip(*means, strict=True), line, color=COLORS[0], marker="o", markersize=7, zorder=3)
        ax.set_xticks(positions, names)
        if max(map(len, names)) * len(names) > 46:
            ax.tick_params(axis="x", labelrotation=30)
        ax.set(title=scale.key, ylabel=f"{metric} ({'higher' if direction == 'max' else 'lower'} is better)")
        ax.margins(x=0.12)
        ax.grid(True, axis="y")
    return figure


def _draw_axis(ax: Axes, x: float, title: str, ticks: Ticks) -> None:
    """Draw a vertical axis with its labels on the outside, where no line crosses them."""
    ax.plot([x, x], [0, 1], color=FRAME, linewidth=1.2, zorder=1)
    ax.text(x, 1.06, title, ha="center", va="bottom", fontsize=9, fontweight="bold", color=INK)
    offset, align = (-0.04, "right") if x == 0 else (0.04, "left")
    box = {"facecolor": "white", "alpha": 0.85, "pad": 0.6, "linewidth": 0}
    for height, name in ticks:
        ax.text(x + offset, height, name, ha=align, va="center", fontsize=8, color=SOFT, zorder=4, bbox=box)


def _smooth_line(heights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return a line through (0, h0), (1, h1), ... that is horizontal at each, so that lines can be distinguished."""
    t = np.linspace(0, 1, 21)
    weight = t * t * (3 - 2 * t)
    y = [start + (end - start) * weight for start, end in pairwise(heights)]
    return np.concatenate([i + t for i in range(len(y))]), np.concatenate(y)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
