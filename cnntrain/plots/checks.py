"""Figures of `cnntrain check`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cnntrain.plots.figure import BAD, COLORS, INK, SOFT, new_figure, shorten, style
from cnntrain.types import DataSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cnntrain.checks.flip import Symmetry

Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def plot_check_curves(curves: Mapping[str, Lines]) -> Figure:
    """Draw a panel per title and a line per label. Axes are logarithmic if values span over two orders of magnitude.

    Args:
        curves: lines by title. A title of the form 'loss over learning rate' also labels the axes.
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
            if 0 not in xs and _wide_range(xs):
                ax.set_xscale("log")
            if _wide_range(ys):
                ax.set_yscale("log")
            what, _, over = title.partition(" over ")
            ax.set(title=title, ylabel=what.rsplit(": ")[-1], xlabel=over)
            ax.grid(True)
            if len(lines) > 1:
                ax.legend()
    return figure


def _wide_range(values: Sequence[float]) -> bool:
    finite = [value for value in values if math.isfinite(value) and value != 0]
    return bool(finite) and min(finite) > 0 and max(finite) > 100 * min(finite)


def plot_flip_symmetry(symmetry: Symmetry, spec: DataSpec, wrong_points: Collection[int], title: str) -> Figure:
    """Draw a mean shape (rings) and its mirror image (dots), with lines between keypoints of the same name.

    The left panel keeps the names of the mirror image, the right panel swaps them by `spec.flip_pairs`.

    Args:
        wrong_points: indices of keypoints to highlight.
    """
    assert spec.flip_pairs is not None
    shape, mirrored = symmetry.shape.numpy(), symmetry.mirrored.numpy()
    panels = {"mirrored, same names": mirrored, "mirrored, names swapped": mirrored[list(spec.flip_pairs)]}
    reach = abs(shape).max() * 1.25
    names_fit = len(shape) <= 20
    with style():
        figure = new_figure(10.5, 5.9)
        axes = figure.subplots(1, 2)
        for ax, (caption, other) in zip(axes, panels.items(), strict=True):
            for a, b in spec.skeleton:
                ax.plot(*shape[[a, b]].T, color="#d5dae0", linewidth=1.2, zorder=1)
            for k, (start, end) in enumerate(zip(shape, other, strict=True)):
                color = BAD if k in wrong_points else COLORS[4]
                ax.plot([start[0], end[0]], [start[1], end[1]], color=color, linewidth=1.3, alpha=0.8, zorder=2)
                if names_fit or k in wrong_points:
                    look: dict[str, Any] = {
                        "fontsize": 7.5,
                        "color": BAD if k in wrong_points else INK,
                        "zorder": 5,
                    }
                    ax.annotate(shorten(spec.keypoints[k], 30), start, (4, 5), textcoords="offset points", **look)
            ax.scatter(
                *shape.T,
                s=42,
                facecolors="none",
                edgecolors=INK,
                linewidths=1.1,
                zorder=3,
                label="mean shape",
            )
            ax.scatter(*other.T, s=13, color=COLORS[0], zorder=4, label="mirror image")
            distance = symmetry.unswapped if other is mirrored else symmetry.swapped
            ax.set_title(f"{caption}: {distance:.3f} distance")
            ax.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal", xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set(visible=True, color="#d5dae0")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left", color=BAD if wrong_points else INK)
        figure.supxlabel("lines connect keypoints of the same name: short lines are correct", fontsize=9, color=SOFT)
    return figure
