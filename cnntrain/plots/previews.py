"""Figures of augmented examples for `cnntrain preview`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cnntrain.plots.figure import COLORS, shorten
from cnntrain.plots.images import (
    add_class_legend,
    add_legend,
    color_mask,
    draw_skeleton,
    plot_images,
    unnormalize,
)
from cnntrain.types import Batch, DataSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAMES = 20  # more names would cover the image
SIDE_COLORS = {-1: COLORS[5], 1: COLORS[4], 0: "#ffffff"}  # first and second point of a pair; point without a partner


def draw_batches(batches: Sequence[Batch], names: Sequence[str], spec: DataSpec) -> Figure:
    """Draw one row per example: without augmentation, then as augmented in each epoch; masks get a second row.

    Args:
        batches: normalized batches of the same N examples; the first one without augmentation.
        names: names of the N examples.
    """
    images = np.stack([unnormalize(batch.images, *spec.normalization) for batch in batches], 1)  # (N, columns, H, W, 3)
    epochs = [f"epoch {i}" for i in range(1, len(batches))]
    first, columns = batches[0].targets, len(batches)
    cell = 1.5 if images.shape[2] < 100 else 1.9
    if "points" in first:
        return _draw_keypoints(batches, [text for name in names for text in (name, *epochs)], spec, columns)
    if "mask" in first:
        masks = np.stack([batch.targets["mask"].cpu().numpy().astype(np.int64) for batch in batches], 1)
        masks = np.where(masks == spec.ignore_index, 255, masks)  # the ignored id may be a class id
        rows, captions = [], []
        for name, originals, own in zip(names, images, masks, strict=True):
            colored = [color_mask(image, mask, len(spec.classes)) for image, mask in zip(originals, own, strict=True)]
            rows += [*originals, *colored]
            captions += [name, *epochs, *[""] * columns]
        figure = plot_images(np.stack(rows), captions, columns=columns, cell=cell)
        add_class_legend(figure, np.unique(masks), spec.classes)
        return figure
    captions = []
    for row, name in enumerate(names):
        captions.append(spec.classes[int(first["label"][row])] if "label" in first else name)
        captions += [_mixture(batch, row, spec) or epoch for batch, epoch in zip(batches[1:], epochs, strict=True)]
    return plot_images(images.reshape(-1, *images.shape[2:]), captions, columns=columns, cell=cell)


def _mixture(batch: Batch, row: int, spec: DataSpec) -> str:
    """Return the caption of a mixed example, for example "70% cat, 30% dog"; empty without mixing."""
    if "mix" not in batch.targets:
        return ""
    share = float(batch.targets["mix"][row])
    one, other = (spec.classes[int(batch.targets[name][row])] for name in ("label", "label_b"))
    return f"{share:.0%} {one}\n{1 - share:.0%} {other}"


def draw_flip(original: Batch, flipped: Batch, names: Sequence[str], spec: DataSpec) -> Figure:
    """Draw images beside their flipped versions with keypoint names: names and colors must stay on their side."""
    captions = [text for name in names for text in (name, "flipped and relabeled")]
    columns = 2 if len(spec.keypoints) > MAX_NAMES else 2 * len(names)
    return _draw_keypoints((original, flipped), captions, spec, columns, enlarged=True)


def _draw_keypoints(
    batches: Sequence[Batch], captions: Sequence[str], spec: DataSpec, columns: int, enlarged: bool = False
) -> Figure:
    """Draw each example of each batch with its points in the color of their side, their skeleton and their names.

    Many points have no names; in an enlarged figure they have numbers.
    """
    images = np.stack([unnormalize(batch.images, *spec.normalization) for batch in batches], 1)
    sides, many = sides_of(spec), len(spec.keypoints) > MAX_NAMES
    if enlarged:
        font, cell = 6.5, 6.0 if many else 3.4
    else:
        font, cell = 5.0, 2.1 if many else 2.5
    box = {"boxstyle": "round,pad=0.12", "facecolor": "black", "alpha": 0.6, "linewidth": 0}

    def overlay(ax: Axes, i: int) -> None:
        row, column = divmod(i, len(batches))
        points, valid = (batches[column].targets[name][row].numpy() for name in ("points", "valid"))
        draw_skeleton(ax, points, valid, spec.skeleton)
        for k in np.flatnonzero(valid):
            color = SIDE_COLORS[sides[k]]
            ax.scatter(*points[k], s=5 if many else 13, color=color, edgecolors="black", linewidths=0.4, zorder=4)
            if many and not enlarged:
                continue
            # Names stay within their image.
            offset, align = (-2.5, "right") if points[k][0] > 0.7 * images.shape[3] else (2.5, "left")
            text = str(k) if many else shorten(spec.keypoints[k], 30)
            note = ax.annotate(
                text,
                points[k],
                (offset, 2.5),
                textcoords="offset points",
                ha=align,
                fontsize=font,
                color=color,
                bbox=box,
                zorder=6,
            )
            note.set_in_layout(False)

    figure = plot_images(images.reshape(-1, *images.shape[2:]), captions, columns=columns, overlay=overlay, cell=cell)
    entries = []
    for side, color in SIDE_COLORS.items():
        members = [name for name, own in zip(spec.keypoints, sides, strict=True) if own == side]
        if members and any(sides):
            more = f", … ({len(members)})" if len(members) > 2 else ""
            text = ", ".join(shorten(name, 24) for name in members[:2]) + more
            entries.append((text, {"markerfacecolor": color, "markeredgecolor": "#66727f", "markeredgewidth": 0.5}))
    add_legend(figure, entries, "o")
    return figure


def sides_of(spec: DataSpec) -> list[int]:
    """Return -1 or 1 for each keypoint, opposite to its flip partner, or 0 without a partner.

    Points whose names contain the same side get the same number.
    """
    sides = []
    for k, partner in enumerate(spec.flip_pairs or range(len(spec.keypoints))):
        name, other = spec.keypoints[k].lower(), spec.keypoints[partner].lower()
        is_left = "left" in name and "left" not in other
        is_right = "left" in other and "left" not in name
        sides.append(0 if partner == k else -1 if is_left else 1 if is_right else -1 if k < partner else 1)
    return sides
