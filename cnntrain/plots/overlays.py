"""What is drawn over images: points with their lines, and masks in color."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cnntrain.plots.images import image_grid, shorten, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUE_COLOR, PREDICTED_COLOR, LINK_COLOR = "#35d07f", "#ff3b6b", "#ffd400"


def draw_points(
    ax: Axes,
    true: np.ndarray | None,
    predicted: np.ndarray | None,
    valid: np.ndarray,
    skeleton: Sequence[tuple[int, int]] = (),
    labels: Sequence[str] = (),
) -> None:
    """Points on an image: true ones as rings, predicted ones as dots, and a line from each to its partner.

    Args:
        true, predicted: (K, 2) as (x, y) in the image's pixels, or None.
        valid: (K,) bool; what is not valid has no truth: its prediction is drawn faintly.
        skeleton: pairs of points of the answer (of the truth where there is none) to join.
        labels: names to write beside the points; none writes none.
    """
    count = len(valid)
    size = 14.0 if count <= 20 else 5.0
    shown = predicted if predicted is not None else true
    if shown is None:
        return
    known = np.ones(count, dtype=bool) if predicted is not None else valid
    for a, b in skeleton:
        if known[a] and known[b]:
            ax.plot(*shown[[a, b]].T, color="white", linewidth=0.7, alpha=0.65, zorder=2)
    for name, (x, y), seen in zip(labels, shown, known, strict=bool(labels)):
        if seen:
            box = {"boxstyle": "round,pad=0.12", "facecolor": "black", "alpha": 0.55, "linewidth": 0}
            place = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": 5.5, "color": "white"}
            ax.annotate(shorten(name, 30), (x, y), bbox=box, zorder=6, **place)
    if true is not None and predicted is not None:
        for start, end in zip(true[valid], predicted[valid], strict=True):
            ax.plot(*np.stack([start, end]).T, color=LINK_COLOR, linewidth=0.8, alpha=0.9, zorder=3)
    if true is not None:
        rings = {"facecolors": "none", "edgecolors": TRUE_COLOR, "linewidths": 0.9}
        ax.scatter(*true[valid].T, s=size * 2, zorder=4, **rings)
    if predicted is not None:
        color = {"c": PREDICTED_COLOR, "linewidths": 0, "zorder": 5, "s": size}
        judged = valid if true is not None else np.ones(count, dtype=bool)
        ax.scatter(*predicted[judged].T, **color)
        ax.scatter(*predicted[~judged].T, alpha=0.3, **color)


def point_grid(
    images: np.ndarray,
    captions: Sequence[str],
    true: np.ndarray | None,
    predicted: np.ndarray | None,
    valid: np.ndarray,
    skeleton: Sequence[tuple[int, int]] = (),
    labels: Sequence[str] = (),
    columns: int | None = None,
) -> Figure:
    """A grid of images (N, H, W, 3) with points (N, K, 2); see `draw_points`."""
    height, width = images.shape[1:3]

    def overlay(ax: Axes, i: int) -> None:
        draw_points(
            ax,
            None if true is None else true[i],
            None if predicted is None else predicted[i],
            valid[i],
            skeleton,
            labels,
        )
        # A point far outside must not shrink the image.
        ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))

    figure = image_grid(
        images, captions, columns=columns, overlay=overlay, cell=2.1 if images.shape[1] < 100 else 2.6
    )
    if true is not None and predicted is not None:
        ring = {"markeredgecolor": TRUE_COLOR, "markerfacecolor": "none"}
        dot = {"markeredgecolor": "none", "markerfacecolor": PREDICTED_COLOR}
        _legend(figure, [("true", {"marker": "o", **ring}), ("predicted", {"marker": "o", **dot})])
    return figure


def class_colors(count: int) -> np.ndarray:
    """(count, 3) in 0-1: colors far apart, the same for the same id whatever the count; id 0 is gray."""
    from matplotlib.colors import hsv_to_rgb

    ids = np.arange(count)
    hue = (ids * 0.61803398875 + 0.33) % 1.0  # the golden ratio never comes near a hue that it has used
    saturation, value = np.array([0.85, 0.6, 0.95])[ids % 3], np.array([0.95, 0.8, 0.65])[ids // 2 % 3]
    colors = hsv_to_rgb(np.stack([hue, saturation, value], 1))
    colors[:1] = 0.45
    return colors


def paint_mask(image: np.ndarray, mask: np.ndarray, num_classes: int, alpha: float = 0.6) -> np.ndarray:
    """The image (H, W, 3) with each pixel tinted by its class; ids beyond the classes stay as they are."""
    known = mask < num_classes
    tint = class_colors(num_classes)[np.where(known, mask, 0)]
    share = np.where(known, alpha, 0.0)[..., None]
    gray = image.mean(2, keepdims=True)  # colors of the image would mix with those of the classes
    return np.where(known[..., None], (1 - share) * gray + share * tint, image)


def mask_grid(
    images: np.ndarray, captions: Sequence[str], layers: Sequence[np.ndarray], classes: Sequence[str]
) -> Figure:
    """Each image beside itself under each layer of masks.

    Args:
        images: (N, H, W, 3) in 0-1.
        captions: N * (1 + number of layers) texts.
        layers: masks (N, H, W) of class ids: the truth, the answer.
        classes: names, for the legend.
    """
    cells = []
    for i, image in enumerate(images):
        cells += [image, *(paint_mask(image, masks[i], len(classes)) for masks in layers)]
    per_image = 1 + len(layers)
    figure = image_grid(
        np.stack(cells), captions, columns=per_image * (2 if len(images) > 3 else 1), cell=1.9
    )
    colors = class_colors(len(classes))
    present = np.unique(np.concatenate([masks.ravel() for masks in layers])) if layers else []
    shown = [int(i) for i in present if i < len(classes)][:24]
    patch = {"marker": "s", "markeredgecolor": "none"}
    _legend(figure, [(classes[i], {"markerfacecolor": colors[i], **patch}) for i in shown])
    return figure


def _legend(figure: Figure, entries: Sequence[tuple[str, dict]]) -> None:
    """One legend for the whole figure, below it."""
    from matplotlib.lines import Line2D

    if not entries:
        return
    with style():
        handles = [
            Line2D([], [], linestyle="none", markersize=6, label=shorten(name, 40), **look)
            for name, look in entries
        ]
        columns = max(1, min(len(entries), int(figure.get_figwidth() / 1.3)))
        figure.set_figheight(figure.get_figheight() + 0.24 * -(-len(entries) // columns) + 0.1)
        figure.legend(handles=handles, loc="outside lower left", ncols=columns, handletextpad=0.2)
