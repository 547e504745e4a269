"""An anatomy as a picture: where the memory, the parameters and the multiply-adds are, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cnntrain.summary.layer_table import Convention, ModelSummary
from cnntrain.summary.view import fitting_depth, fold

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MANY = 40  # bars


def draw_bars(anatomy: ModelSummary, depth: int | None = None, convention: Convention = "torch") -> Figure:
    """Three bar charts over the layers that have any of the three, in the order in which they run.

    `depth` folds layers by the first parts of their names; by default as far as the page needs.
    """
    from matplotlib.figure import Figure

    rows = fold(anatomy.rows, depth if depth is not None else fitting_depth(anatomy.rows, _MANY))
    rows = [row for row in rows if row.activations_kib or row.count(convention) or row.multiply_adds]
    charts = [
        ("memory (KiB)", [row.activations_kib for row in rows], anatomy.activations_kib),
        (
            "parameters (thousands)",
            [row.count(convention) / 1e3 for row in rows],
            anatomy.parameters(convention) / 1e3,
        ),
        ("multiply-adds (millions)", [row.multiply_adds / 1e6 for row in rows], anatomy.multiply_adds / 1e6),
    ]
    labels = [row.name for row in rows]
    figure = Figure(figsize=(13, 2.2 + 0.24 * len(rows)), layout="constrained")
    shape = "x".join(map(str, anatomy.input_shape))
    figure.suptitle(f"{anatomy.name} on {shape}", fontweight="bold")
    for axes, (title, values, total), color in zip(
        figure.subplots(1, 3, sharey=True), charts, ("#4878cf", "#6acc65", "#d65f5f"), strict=True
    ):
        axes.barh(range(len(values)), values, color=color, height=0.75)
        axes.set_title(f"{title}: {total:,.1f}")
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        top = max(values, default=0) or 1
        axes.set_xlim(0, 1.18 * top)
        for i, value in enumerate(values):
            if value:
                text = f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
                axes.text(value + 0.01 * top, i, text, va="center", fontsize=7)
    figure.axes[0].invert_yaxis()
    return figure
