"""The picture of a learning-rate range test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cnntrain.plots.images import COLORS, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_range_test(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    marks: Mapping[str, float],
    title: str,
) -> Figure:
    """Loss over learning rate, each mini-batch's and smoothed, with vertical lines at `marks`.

    The loss's axis ends where the smoothed loss is well above its start: what comes after is divergence.
    """
    known = [loss for loss in smoothed if math.isfinite(loss)]
    with style():
        figure = new_figure(6.2, 3.6)
        ax = figure.subplots()
        ax.plot(rates, losses, color=COLORS[5], linewidth=0.9, label="mini-batch")
        ax.plot(rates, smoothed, color=COLORS[0], label="smoothed")
        for number, (label, rate) in enumerate(marks.items()):
            color = COLORS[(1, 2, 3, 4)[number % 4]]
            ax.axvline(rate, color=color, linestyle="--", linewidth=1.1, label=f"{label} {rate:.2g}")
        ax.set_xscale("log")
        if known:
            low, start = min(known), known[0]
            room = max(start - low, 0.1 * abs(start), 1e-6)
            ax.set_ylim(low - 0.3 * room, start + 0.7 * room)
        ax.set(title=title, xlabel="learning rate", ylabel="loss")
        ax.grid(True)
        ax.legend()
    return figure
