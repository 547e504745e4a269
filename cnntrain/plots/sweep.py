"""Pictures of a sweep: every setting as a line through all keys, and what each key does by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from cnntrain.plots.images import BAD, COLORS, INK, SOFT, new_figure, style
from cnntrain.sweep.search_space import SearchDimension

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[Mapping[str, str], float]  # a setting of the swept keys, and its metric
_TICKS = 12  # more names than this would run into each other


def parallel_coordinates(
    points: Sequence[Point], axes: Sequence[SearchDimension], metric: str, better: str
) -> Figure:
    """One upright line per key and one for the metric; every setting runs through them, the best in color on top.

    Args:
        points: settings with a finite metric.
        better: `max` or `min`.
    """
    from matplotlib import colormaps

    values = [value for _, value in points]
    low, high = min(values), max(values)
    worst_first = sorted(points, key=lambda point: point[1], reverse=better == "min")
    with style():
        figure = new_figure(1.9 * (len(axes) + 1) + 1.7, 4.2)
        ax = figure.subplots()
        ax.axis("off")
        ax.set_xlim(-0.62, len(axes) + 0.5)
        ax.set_ylim(-0.09, 1.14)
        scales = [_Scale(axis, [setting[axis.key] for setting, _ in points]) for axis in axes]
        for x, (axis, scale) in enumerate(zip(axes, scales, strict=True)):
            _upright(ax, x, axis.key, scale.ticks())
        _upright(ax, len(axes), metric, _number_ticks(low, high))
        colors = colormaps["viridis"]
        for place, (setting, value) in enumerate(worst_first):
            is_best = place == len(worst_first) - 1
            heights = [scale.height(setting[axis.key]) for axis, scale in zip(axes, scales, strict=True)]
            heights.append((value - low) / (high - low) if high > low else 0.5)
            shade = 0.15 + 0.7 * place / max(len(points) - 1, 1)
            x, y = _smooth(heights)
            ax.plot(x, y, color=BAD if is_best else colors(shade), linewidth=2.6 if is_best else 1.2,
                    alpha=1.0 if is_best else 0.75, zorder=3 if is_best else 2)  # fmt: skip
        ax.set_title(f"{len(points)} settings, the best in red")
    return figure


def marginal_effect(points: Sequence[Point], axis: SearchDimension, metric: str, better: str) -> Figure:
    """The metric over one key: every setting a gray dot, the mean of each value (of each fifth of a range) a blue one.

    What the other keys do is the spread of the dots.
    """
    scale = _Scale(axis, [setting[axis.key] for setting, _ in points])
    groups: dict[float, list[float]] = {}
    for setting, value in points:
        place = scale.place(setting[axis.key])
        if not axis.values:
            place = (min(int(scale.height(setting[axis.key]) * 5), 4) + 0.5) / 5
        groups.setdefault(place, []).append(value)
    with style():
        figure = new_figure(4.6, 3.3)
        ax = figure.subplots()
        places = [
            scale.height(s[axis.key]) if not axis.values else scale.place(s[axis.key]) for s, _ in points
        ]
        ax.scatter(
            places, [value for _, value in points], s=16, color=SOFT, alpha=0.6, linewidths=0, zorder=2
        )
        means = sorted((place, sum(values) / len(values)) for place, values in groups.items())
        line = "-" if scale.numbers else ""  # between names there is nothing
        ax.plot(*zip(*means, strict=True), line, color=COLORS[0], marker="o", markersize=7, zorder=3)
        ticks = scale.ticks()
        ax.set_xticks([scale.at_height(height) for height, _ in ticks], [name for _, name in ticks])
        if max(len(name) for _, name in ticks) * len(ticks) > 46:
            ax.tick_params(axis="x", labelrotation=30)
        ax.set(title=axis.key, ylabel=f"{metric} ({'higher' if better == 'max' else 'lower'} is better)")
        ax.margins(x=0.12)
        ax.grid(True, axis="y")
    return figure


class _Scale:
    """Where a key's values stand on its line, from 0 to 1: names at even steps, numbers of a range by their size."""

    def __init__(self, axis: SearchDimension, used: Sequence[str]) -> None:
        self.axis = axis
        self.names = [value for value in axis.values if value in used]
        self.numbers = all(_is_number(value) for value in self.names)
        if self.numbers:
            self.names.sort(key=float)

    def place(self, value: str) -> float:
        """Listed values stand at 0, 1, 2, ...; a range's from 0 to 1."""
        if self.axis.values:
            return float(self.names.index(value))
        low, high, number = float(self.axis.low or 0), float(self.axis.high or 0), float(value)
        if self.axis.log:
            low, high, number = math.log(low), math.log(high), math.log(number)
        return (number - low) / (high - low)

    def height(self, value: str) -> float:
        place = self.place(value)
        if not self.axis.values:
            return place
        return place / (len(self.names) - 1) if len(self.names) > 1 else 0.5

    def at_height(self, height: float) -> float:
        """From a height back to a place."""
        return height * (len(self.names) - 1) if self.axis.values and len(self.names) > 1 else (
            0.0 if self.axis.values else height
        )  # fmt: skip

    def ticks(self) -> list[tuple[float, str]]:
        """Heights and what to write there."""
        if self.axis.values:
            step = -(-len(self.names) // _TICKS)
            return [(self.height(name), _cut(name)) for name in self.names[::step]]
        low, high = float(self.axis.low or 0), float(self.axis.high or 0)
        if self.axis.log:
            first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
            decades = [10.0**exponent for exponent in range(first, last + 1)]
            numbers = decades if len(decades) > 1 else [low, high]
        else:
            numbers = [low + (high - low) * part / 4 for part in range(5)]
        return [(self.place(repr(number)), f"{number:.3g}") for number in numbers]


def _number_ticks(low: float, high: float) -> list[tuple[float, str]]:
    if high <= low:
        return [(0.5, f"{low:.4g}")]
    return [(part / 4, f"{low + (high - low) * part / 4:.4g}") for part in range(5)]


def _upright(ax: Axes, x: float, title: str, ticks: Sequence[tuple[float, str]]) -> None:
    ax.plot([x, x], [0, 1], color="#b8c1ca", linewidth=1.2, zorder=1)
    ax.text(x, 1.06, title, ha="center", va="bottom", fontsize=9, fontweight="bold", color=INK)
    for height, name in ticks:
        # No line crosses what stands outside.
        side, beside = (-1, "right") if x == 0 else (1, "left")
        ax.text(x + 0.04 * side, height, name, ha=beside, va="center", fontsize=8, color=SOFT, zorder=4,
                bbox={"facecolor": "white", "alpha": 0.85, "pad": 0.6, "linewidth": 0})  # fmt: skip


def _smooth(heights: Sequence[float]) -> tuple[list[float], list[float]]:
    """A line through (0, h0), (1, h1), ... that is level at each, so that lines which meet can be told apart."""
    x, y = [], []
    for left, (start, end) in enumerate(pairwise(heights)):
        for i in range(21):
            t = i / 20
            x.append(left + t)
            y.append(start + (end - start) * t * t * (3 - 2 * t))
    return x, y


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _cut(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "…"
