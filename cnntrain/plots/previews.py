"""Figures of augmented examples for `cnntrain preview`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cnntrain.plots.figure import COLORS, shorten, style
from cnntrain.plots.images import class_colors, color_mask, plot_images, unnormalize
from cnntrain.types import Batch, DataSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_NAMES = 20  # more names would cover the image
SIDE_COLORS = {
    -1: COLORS[5],
    0: "#ffffff",
    1: COLORS[4],
}  # first and second point of a pair; 0: point without a partner


def draw_batches(batches: Sequence[Batch], names: Sequence[str], spec: DataSpec) -> Figure:
    """Draw one row per example: without augmentation, then as augmented in each epoch; masks get a second row.

    Args:
        batches: normalized batches of the same N examples; the first one without augmentation.
        names: names of the N examples.
    """
    statistics = spec.mean or (0.0,) * spec.channels, spec.std or (1.0,) * spec.channels
    pictures = np.stack([unnormalize(batch.images, *statistics) for batch in batches], 1)  # (N, columns, H, W, 3)
    heads = ["original", *(f"epoch {i + 1}" for i in range(len(batches) - 1))]
    captions = [name if head == "original" else head for name in names for head in heads]
    columns = len(heads)
    first = batches[0].targets
    if "points" in first:
        return _with_points(pictures.reshape(-1, *pictures.shape[2:]), captions, columns, batches, spec)
    if "mask" in first:
        return _with_masks(pictures, captions, columns, batches, spec)
    if "label" in first and "mix" not in batches[-1].targets:
        labels = [spec.classes[i] for i in first["label"].tolist()]
        captions = [f"{labels[i // columns]}" if i % columns == 0 else text for i, text in enumerate(captions)]
    if "mix" in batches[-1].targets:
        captions = [text for i in range(len(names)) for text in _mixtures(batches, i, spec)]
    return plot_images(pictures.reshape(-1, *pictures.shape[2:]), captions, columns=columns, cell=_cell(pictures))


def _mixtures(batches: Sequence[Batch], row: int, spec: DataSpec) -> list[str]:
    """Return the captions of one mixed example, for example "70% cat, 30% dog"."""
    captions = [spec.classes[int(batches[0].targets["label"][row])]]
    for batch in batches[1:]:
        share = float(batch.targets["mix"][row])
        one, other = (spec.classes[int(batch.targets[name][row])] for name in ("label", "label_b"))
        captions.append(f"{share:.0%} {one}\n{1 - share:.0%} {other}")
    return captions


def _with_points(
    pictures: np.ndarray, captions: Sequence[str], columns: int, batches: Sequence[Batch], spec: DataSpec
) -> Figure:
    def overlay(ax: Axes, i: int) -> None:
        row, column = divmod(i, columns)
        targets = batches[column].targets
        _draw_named(ax, targets["points"][row].numpy(), targets["valid"][row].numpy(), spec, pictures.shape[1:3])

    cell = 2.5 if len(spec.keypoints) <= MAX_NAMES else 2.1
    figure = plot_images(pictures, captions, columns=columns, overlay=overlay, cell=cell)
    return _with_sides(figure, spec)


def draw_flip(original: Batch, flipped: Batch, names: Sequence[str], spec: DataSpec) -> Figure:
    """Draw images beside their flipped versions with keypoint names: names and colors must stay on their side."""
    statistics = spec.mean or (0.0,) * spec.channels, spec.std or (1.0,) * spec.channels
    pairs = np.stack([unnormalize(batch.images, *statistics) for batch in (original, flipped)], 1)
    pictures = pairs.reshape(-1, *pairs.shape[2:])

    def overlay(ax: Axes, i: int) -> None:
        targets = (original, flipped)[i % 2].targets
        points, valid = targets["points"][i // 2].numpy(), targets["valid"][i // 2].numpy()
        _draw_named(ax, points, valid, spec, pictures.shape[1:3], numbered=True, font=6.5)

    captions = [text for name in names for text in (name, "flipped and relabeled")]
    columns = 2 if len(spec.keypoints) > MAX_NAMES else 2 * len(names)
    cell = 6.0 if len(spec.keypoints) > MAX_NAMES else 3.4
    return _with_sides(plot_images(pictures, captions, columns=columns, overlay=overlay, cell=cell), spec)


def _draw_named(
    ax: Axes, points: np.ndarray, valid: np.ndarray, spec: DataSpec, size: tuple[int, ...],
    numbered: bool = False, font: float = 5.0,
) -> None:  # fmt: skip
    """Draw points (K, 2) in the color of their side with their skeleton and names, or numbers if there are many."""
    for a, b in spec.skeleton:
        if valid[a] and valid[b]:
            ax.plot(*points[[a, b]].T, color="white", linewidth=0.8, alpha=0.7, zorder=2)
    sides = sides_of(spec)
    many = len(points) > MAX_NAMES
    for k in np.flatnonzero(valid):
        color = SIDE_COLORS[sides[k]]
        ax.scatter(*points[k], s=5 if many else 13, color=color, edgecolors="black", linewidths=0.4, zorder=4)
        if not many or numbered:
            text = str(k) if many else shorten(spec.keypoints[k], 30)
            box = {"boxstyle": "round,pad=0.12", "facecolor": "black", "alpha": 0.6, "linewidth": 0}
            inward = -1 if points[k][0] > 0.7 * size[1] else 1  # keep names within their image
            style_ = {
                "xytext": (2.5 * inward, 2.5),
                "textcoords": "offset points",
                "fontsize": font,
                "color": color,
            }
            note = ax.annotate(text, points[k], bbox=box, zorder=6, ha="left" if inward > 0 else "right", **style_)
            note.set_in_layout(False)
    ax.set(xlim=(-0.5, size[1] - 0.5), ylim=(size[0] - 0.5, -0.5))


def sides_of(spec: DataSpec) -> list[int]:
    """Return -1 or 1 for each keypoint, opposite to its flip partner, or 0 without a partner.

    Points whose names contain the same side get the same number.
    """
    pairs = spec.flip_pairs or tuple(range(len(spec.keypoints)))
    sides = []
    for k, partner in enumerate(pairs):
        name, other = spec.keypoints[k].lower(), spec.keypoints[partner].lower()
        told = "left" in name and "left" not in other
        opposite = "left" in other and "left" not in name
        sides.append(0 if partner == k else -1 if told else 1 if opposite else -1 if k < partner else 1)
    return sides


def _with_sides(figure: Figure, spec: DataSpec) -> Figure:
    """Add a legend of the point colors."""
    sides = sides_of(spec)
    if spec.flip_pairs is None or not any(sides):
        return figure
    entries = []
    for side in (-1, 1, 0):
        members = [name for name, own in zip(spec.keypoints, sides, strict=True) if own == side]
        if members:
            more = f", … ({len(members)})" if len(members) > 2 else ""
            entries.append((", ".join(shorten(name, 24) for name in members[:2]) + more, SIDE_COLORS[side]))
    return _legend(figure, entries, "o")


def _with_masks(
    pictures: np.ndarray, captions: Sequence[str], columns: int, batches: Sequence[Batch], spec: DataSpec
) -> Figure:
    masks = np.stack([batch.targets["mask"].cpu().numpy().astype(np.int64) for batch in batches], 1)
    known = len(spec.classes)
    masks = np.where(masks == spec.ignore_index, 255, masks)  # the ignored id may be a class id
    rows, texts = [], []
    for i, (images, own) in enumerate(zip(pictures, masks, strict=True)):
        rows += [*images, *(color_mask(image, mask, known) for image, mask in zip(images, own, strict=True))]
        texts += [*captions[i * columns : (i + 1) * columns], *[""] * columns]
    figure = plot_images(np.stack(rows), texts, columns=columns, cell=_cell(pictures))
    colors = class_colors(known)
    shown = [int(i) for i in np.unique(masks) if i < known][:24]
    return _legend(figure, [(shorten(spec.classes[i], 40), colors[i]) for i in shown], "s")


def _cell(pictures: np.ndarray) -> float:
    """Return the height of a cell in inches."""
    return 1.5 if pictures.shape[2] < 100 else 1.9


def _legend(figure: Figure, entries: Sequence[tuple[str, Any]], marker: str) -> Figure:
    from matplotlib.lines import Line2D

    with style():
        look = {"linestyle": "none", "marker": marker, "markeredgecolor": "#66727f", "markeredgewidth": 0.5}
        handles = [Line2D([], [], markersize=7, label=name, markerfacecolor=color, **look) for name, color in entries]
        widest = max(len(name) for name, _ in entries)
        columns = max(1, min(len(entries), int(figure.get_figwidth() / (0.4 + 0.075 * widest))))
        figure.set_figheight(figure.get_figheight() + 0.24 * -(-len(entries) // columns) + 0.1)
        figure.legend(handles=handles, loc="outside lower left", ncols=columns, handletextpad=0.2)
    return figure
