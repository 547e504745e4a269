"""Figures of a sweep: parallel coordinates of all settings, and the marginal effect of each key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cnntrain.plots.figure import BAD, COLORS, FRAME, INK, SOFT, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[Mapping[str, str], float]  # values of the swept keys, and the metric
MAX_TICKS = 12  # more names would overlap
NUM_BINS = 5  # of a continuous range


class Dimension(Protocol):
    """A swept key: listed values, or a range from `low` to `high` (see `SearchDimension`)."""

    @property
    def key(self) -> str: ...
    @property
    def values(self) -> tuple[str, ...]: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...
    @property
    def log(self) -> bool: ...


def plot_parallel_coordinates(
    points: Sequence[Point], dimensions: Sequence[Dimension], metric: str, direction: str
) -> Figure:
    """Plot one vertical axis per key and one for the metric, and each setting as a line; the best is red and on top.

    Args:
        points: settings with a finite metric.
        direction: `max` or `min`.
    """
    from matplotlib import colormaps

    values = [value for _, value in points]
    low, high = min(values), max(values)
    worst_first = sorted(points, key=lambda point: point[1], reverse=direction == "min")
    scales = [_Scale(dimension, [setting[dimension.key] for setting, _ in points]) for dimension in dimensions]
    with style():
        figure = new_figure(1.9 * (len(scales) + 1) + 1.7, 4.2)
        ax = figure.subplots()
        ax.axis("off")
        ax.set_xlim(-0.62, len(scales) + 0.5)
        ax.set_ylim(-0.09, 1.14)
        for x, scale in enumerate(scales):
            _draw_axis(ax, x, scale.dimension.key, scale.ticks())
        _draw_axis(ax, len(scales), metric, _metric_ticks(low, high))
        for rank, (setting, value) in enumerate(worst_first):
            heights = [scale.height(setting[scale.dimension.key]) for scale in scales]
            heights.append((value - low) / (high - low) if high > low else 0.5)
            x, y = _smooth_line(heights)
            if rank == len(worst_first) - 1:
                ax.plot(x, y, color=BAD, linewidth=2.6, zorder=3)
            else:
                color = colormaps["viridis"](0.15 + 0.7 * rank / max(len(points) - 1, 1))
                ax.plot(x, y, color=color, linewidth=1.2, alpha=0.75, zorder=2)
        ax.set_title(f"{len(points)} settings, the best in red")
    return figure


def plot_marginal_effect(points: Sequence[Point], dimension: Dimension, metric: str, direction: str) -> Figure:
    """Plot the metric over one key: gray dots for settings, blue dots for means per value (per fifth of a range).

    The spread of the gray dots at a value is the effect of the other keys.
    """
    scale = _Scale(dimension, [setting[dimension.key] for setting, _ in points])
    positions = [scale.position(setting[dimension.key]) for setting, _ in points]
    groups: dict[float, list[float]] = {}
    for position, (_, value) in zip(positions, points, strict=True):
        is_range = not dimension.values
        group = (min(int(position * NUM_BINS), NUM_BINS - 1) + 0.5) / NUM_BINS if is_range else position
        groups.setdefault(group, []).append(value)
    with style():
        figure = new_figure(4.6, 3.3)
        ax = figure.subplots()
        values = [value for _, value in points]
        ax.scatter(positions, values, s=16, color=SOFT, alpha=0.6, linewidths=0, zorder=2)
        means = sorted((position, sum(values) / len(values)) for position, values in groups.items())
        line = "-" if scale.is_numeric else ""
        ax.plot(*zip(*means, strict=True), line, color=COLORS[0], marker="o", markersize=7, zorder=3)
        names = [name for _, name in scale.ticks()]
        ax.set_xticks([scale.position_at(height) for height, _ in scale.ticks()], names)
        if max(map(len, names)) * len(names) > 46:
            ax.tick_params(axis="x", labelrotation=30)
        ax.set(title=dimension.key, ylabel=f"{metric} ({'higher' if direction == 'max' else 'lower'} is better)")
        ax.margins(x=0.12)
        ax.grid(True, axis="y")
    return figure


class _Scale:
    """Maps the values of a key to positions: listed values to 0, 1, 2, ..., those of a range to 0 to 1.

    Args:
        used: the values that occur; others are not on the axis.
    """

    def __init__(self, dimension: Dimension, used: Sequence[str]) -> None:
        self.dimension = dimension
        self.names = [value for value in dimension.values if value in used]
        self.is_numeric = all(_is_number(value) for value in self.names)
        if self.is_numeric:
            self.names.sort(key=float)

    def position(self, value: str) -> float:
        """Return the position of a value."""
        if self.dimension.values:
            return float(self.names.index(value))
        low, high, number = float(self.dimension.low or 0), float(self.dimension.high or 0), float(value)
        if self.dimension.log:
            low, high, number = math.log(low), math.log(high), math.log(number)
        return (number - low) / (high - low)

    def height(self, value: str) -> float:
        """Return the position of a value scaled to 0-1."""
        position = self.position(value)
        if not self.dimension.values:
            return position
        return position / (len(self.names) - 1) if len(self.names) > 1 else 0.5

    def position_at(self, height: float) -> float:
        """Return the position of a height."""
        if not self.dimension.values:
            return height
        return height * (len(self.names) - 1) if len(self.names) > 1 else 0.0

    def ticks(self) -> list[tuple[float, str]]:
        """Return heights and labels."""
        if self.dimension.values:
            step = -(-len(self.names) // MAX_TICKS)
            return [(self.height(name), name if len(name) <= 16 else f"{name[:15]}…") for name in self.names[::step]]
        low, high = float(self.dimension.low or 0), float(self.dimension.high or 0)
        numbers = [low + (high - low) * i / 4 for i in range(5)]
        if self.dimension.log:
            first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
            decades = [10.0**exponent for exponent in range(first, last + 1)]
            numbers = decades if len(decades) > 1 else [low, high]
        return [(self.position(repr(number)), f"{number:.3g}") for number in numbers]


def _metric_ticks(low: float, high: float) -> list[tuple[float, str]]:
    if high <= low:
        return [(0.5, f"{low:.4g}")]
    return [(i / 4, f"{low + (high - low) * i / 4:.4g}") for i in range(5)]


def _draw_axis(ax: Axes, x: float, title: str, ticks: Sequence[tuple[float, str]]) -> None:
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
