"""The mean shape beside its mirror image: what `check flip` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cnntrain.checks.flip import SURE, Symmetry, worst_pair
from cnntrain.plots.images import BAD, COLORS, INK, SOFT, new_figure, shorten, style
from cnntrain.types import DataSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_symmetry(symmetry: Symmetry, spec: DataSpec, title: str) -> Figure:
    """The mean shape as rings and its mirror image as dots, joined by name: names kept, and names traded."""
    assert spec.flip_pairs is not None
    shape, mirrored = symmetry.shape.numpy(), symmetry.mirrored.numpy()
    panels = {"mirrored, names kept": mirrored, "mirrored and relabeled": mirrored[list(spec.flip_pairs)]}
    reach = abs(shape).max() * 1.25
    faulty: set[int] = set()
    upper = torch.ones_like(symmetry.change, dtype=torch.bool).triu(1)
    if (wrong := upper & (symmetry.change <= -SURE * symmetry.error)).any():
        faulty = set(worst_pair(symmetry, wrong))
    names_fit = len(shape) <= 20
    with style():
        figure = new_figure(10.5, 5.9)
        axes = figure.subplots(1, 2)
        for ax, (caption, other) in zip(axes, panels.items(), strict=True):
            for a, b in spec.skeleton:
                ax.plot(*shape[[a, b]].T, color="#d5dae0", linewidth=1.2, zorder=1)
            for k, (start, end) in enumerate(zip(shape, other, strict=True)):
                color = BAD if k in faulty else COLORS[4]
                ax.plot(
                    [start[0], end[0]], [start[1], end[1]], color=color, linewidth=1.3, alpha=0.8, zorder=2
                )
                if names_fit or k in faulty:
                    look: dict[str, Any] = {
                        "fontsize": 7.5,
                        "color": BAD if k in faulty else INK,
                        "zorder": 5,
                    }
                    ax.annotate(
                        shorten(spec.keypoints[k], 30), start, (4, 5), textcoords="offset points", **look
                    )
            ax.scatter(
                *shape.T,
                s=42,
                facecolors="none",
                edgecolors=INK,
                linewidths=1.1,
                zorder=3,
                label="mean shape",
            )
            ax.scatter(*other.T, s=13, color=COLORS[0], zorder=4, label="in the mirror")
            distance = symmetry.kept if other is mirrored else symmetry.relabeled
            ax.set_title(f"{caption}: {distance:.3f} apart")
            ax.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal", xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set(visible=True, color="#d5dae0")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
        figure.suptitle(
            title, fontsize=11, fontweight="bold", x=0.01, ha="left", color=INK if not faulty else BAD
        )
        figure.supxlabel(
            "yellow lines join a point to its namesake: short ones are right", fontsize=9, color=SOFT
        )
    return figure
