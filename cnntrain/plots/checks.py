"""What the checks measured, as curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cnntrain.plots.images import COLORS, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def draw_curves(curves: Mapping[str, Lines]) -> Figure:
    """A panel per title, a line per label; logarithmic where values span more than two orders.

    Args:
        curves: titles written 'what over what', as 'loss over learning rate', name their axes.
    """
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    with style():
        figure = new_figure(5.2 * columns, 3.3 * rows)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for ax in axes[len(curves) :]:
            ax.set_axis_off()
        for ax, (title, lines) in zip(axes, curves.items(), strict=False):
            for number, (label, (x, y)) in enumerate(lines.items()):
                ax.plot(x, y, color=COLORS[number % len(COLORS)], label=label, linewidth=1.3)
            xs = [value for x, _ in lines.values() for value in x]
            ys = [value for _, y in lines.values() for value in y]
            if 0 not in xs and _wide(xs):
                ax.set_xscale("log")
            if _wide(ys):
                ax.set_yscale("log")
            what, _, over = title.partition(" over ")
            ax.set(title=title, ylabel=what.rsplit(": ")[-1], xlabel=over)
            ax.grid(True)
            if len(lines) > 1:
                ax.legend()
    return figure


def _wide(values: Sequence[float]) -> bool:
    known = [value for value in values if math.isfinite(value) and value != 0]
    return bool(known) and min(known) > 0 and max(known) > 100 * min(known)
