"""Grids of images, with captions, keypoints or masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cnntrain.plots.figure import BAD, FRAME, GOOD, INK, new_figure, new_panels, shorten, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUE_COLOR, PREDICTED_COLOR, ERROR_COLOR = "#35d07f", "#ff3b6b", "#ffd400"
MAX_LEGEND_CLASSES = 24


def unnormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return normalized images (N, C, H, W) as RGB (N, H, W, 3) in 0-1.

    One channel becomes gray. Two channels get an empty third. Of more than three, the first three are returned.
    """
    images = images.detach().float().cpu()
    shift, scale = torch.tensor(list(mean)), torch.tensor(list(std))
    images = (images * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).nan_to_num().clamp(0, 1)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    elif images.shape[1] == 2:
        images = torch.cat([images, torch.zeros_like(images[:, :1])], 1)
    return images[:, :3].permute(0, 2, 3, 1).numpy()


def plot_images(
    images: np.ndarray,
    captions: Sequence[str] = (),
    colors: Sequence[str] = (),
    title: str = "",
    columns: int | None = None,
    overlay: Callable[[Axes, int], None] | None = None,
    cell: float = 1.5,
) -> Figure:
    """Plot images in a grid, each below its caption.

    Args:
        images: (N, H, W, 3), in 0-1 or uint8.
        captions: N texts, or none; lines that are too long are shortened.
        colors: N colors of the captions and frames.
        columns: None chooses them for a figure of about 3:2.
        overlay: function of (axes, i) that draws on image i, clipped at its border.
        cell: height of an image in inches.
    """
    count, height, width = images.shape[:3]
    aspect = width / height
    if columns is None:
        columns = max(1, min(count, round((count * 1.5 / aspect) ** 0.5)))
    rows = -(-max(count, 1) // columns)
    lines = max((text.count("\n") + 1 for text in captions), default=0)
    cell_width = max(cell * aspect, 1.15 if captions else 0.0)
    figure_width = max(columns * cell_width + 0.2, 3.0)
    figure_height = rows * (cell + 0.17 * lines + 0.05) + (0.4 if title else 0.05)
    with new_figure(figure_width, figure_height) as figure:
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)  # type: ignore[union-attr]
        for i, ax in enumerate(new_panels(figure, count, columns)):
            ax.imshow(images[i], interpolation="nearest" if max(height, width) < 100 else "antialiased")
            color = colors[i] if colors else INK
            ax.spines[:].set(visible=True, color=color if color in (GOOD, BAD) else FRAME, linewidth=0.8)
            if captions:
                text = "\n".join(shorten(line, int(cell_width * 14)) for line in captions[i].split("\n"))
                ax.set_title(text, fontsize=7.5, color=color, loc="center", pad=2.5, fontweight="normal")
            if overlay is not None:
                overlay(ax, i)
            # Drawings far outside must not shrink the image.
            ax.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        if title:
            figure.suptitle(shorten(title, 200), fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def plot_filters(weight: Tensor, title: str = "First layer's filters", limit: int = 64) -> Figure:
    """Plot the kernels of a first convolution, each scaled to its own maximum, with zero as gray.

    Args:
        weight: (out, in, kH, kW). Three input channels are shown in color, others as their mean.
        limit: maximum number of kernels.
    """
    kernels = weight.detach().float().cpu()[:limit]
    if kernels.shape[1] != 3:
        kernels = kernels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    peak = kernels.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    images = (0.5 + 0.5 * kernels / peak).permute(0, 2, 3, 1).numpy()
    if len(weight) > limit:
        title += f" ({limit} of {len(weight)})"
    return plot_images(images, title=title, columns=min(8, len(kernels)), cell=0.62)


def plot_keypoints(
    images: np.ndarray,
    captions: Sequence[str],
    true: np.ndarray | None,
    predicted: np.ndarray | None,
    valid: np.ndarray,
    skeleton: Sequence[tuple[int, int]] = (),
) -> Figure:
    """Plot images (N, H, W, 3) with true keypoints as rings, predicted ones as dots, and lines between both.

    Args:
        true, predicted: (N, K, 2) as (x, y) in image pixels, or None.
        valid: (N, K) bool; predictions without a valid true point are drawn lighter.
        skeleton: pairs of predicted points to connect (of true points without predictions).
    """
    size = 14.0 if valid.shape[1] <= 20 else 5.0
    everything = np.ones(valid.shape[1], dtype=bool)
    ring: dict[str, Any] = {"facecolors": "none", "edgecolors": TRUE_COLOR, "linewidths": 0.9, "zorder": 4}
    dot: dict[str, Any] = {"c": PREDICTED_COLOR, "linewidths": 0, "zorder": 5, "s": size}

    def overlay(ax: Axes, i: int) -> None:
        if predicted is not None:
            draw_skeleton(ax, predicted[i], everything, skeleton)
            evaluated = valid[i] if true is not None else everything
            ax.scatter(*predicted[i, evaluated].T, **dot)
            ax.scatter(*predicted[i, ~evaluated].T, alpha=0.3, **dot)
        if true is not None:
            ax.scatter(*true[i, valid[i]].T, s=size * 2, **ring)
            if predicted is None:
                draw_skeleton(ax, true[i], valid[i], skeleton)
            else:
                lines = np.stack([true[i, valid[i]], predicted[i, valid[i]]])  # (2, valid points, 2)
                ax.plot(*lines.transpose(2, 0, 1), color=ERROR_COLOR, linewidth=0.8, alpha=0.9, zorder=3)

    figure = plot_images(images, captions, overlay=overlay, cell=2.1 if images.shape[1] < 100 else 2.6)
    if true is not None and predicted is not None:
        true_marker = {"markeredgecolor": TRUE_COLOR, "markerfacecolor": "none"}
        predicted_marker = {"markeredgecolor": "none", "markerfacecolor": PREDICTED_COLOR}
        add_legend(figure, [("true", true_marker), ("predicted", predicted_marker)], "o")
    return figure


def draw_skeleton(ax: Axes, points: np.ndarray, visible: np.ndarray, skeleton: Sequence[tuple[int, int]]) -> None:
    """Connect the visible ones of the points (K, 2)."""
    for a, b in skeleton:
        if visible[a] and visible[b]:
            ax.plot(*points[[a, b]].T, color="white", linewidth=0.8, alpha=0.7, zorder=2)


def class_colors(count: int) -> np.ndarray:
    """Return (count, 3) distinct colors in 0-1, independent of the count for each id; id 0 is gray."""
    from matplotlib.colors import hsv_to_rgb

    ids = np.arange(count)
    hue = (ids * 0.61803398875 + 0.33) % 1.0  # multiples of the golden ratio are far apart
    saturation, value = np.array([0.85, 0.6, 0.95])[ids % 3], np.array([0.95, 0.8, 0.65])[ids // 2 % 3]
    colors = hsv_to_rgb(np.stack([hue, saturation, value], 1))
    colors[:1] = 0.45
    return colors


def color_mask(image: np.ndarray, mask: np.ndarray, num_classes: int, alpha: float = 0.6) -> np.ndarray:
    """Return the image (H, W, 3) in gray, blended with the color of each pixel's class; other ids are unchanged."""
    is_class = mask < num_classes
    color = class_colors(num_classes)[np.where(is_class, mask, 0)]
    gray = image.mean(2, keepdims=True)  # colors of the image would be confused with those of the classes
    return np.where(is_class[..., None], (1 - alpha) * gray + alpha * color, image)


def plot_masks(
    images: np.ndarray, captions: Sequence[str], masks: Sequence[np.ndarray], classes: Sequence[str]
) -> Figure:
    """Plot each image beside itself colored by each of its masks.

    Args:
        images: (N, H, W, 3) in 0-1.
        captions: N * (1 + len(masks)) texts.
        masks: class ids (N, H, W): ground truth, prediction.
        classes: names for the legend.
    """
    cells = []
    for i, image in enumerate(images):
        cells += [image, *(color_mask(image, layer[i], len(classes)) for layer in masks)]
    columns = (1 + len(masks)) * (2 if len(images) > 3 else 1)
    figure = plot_images(np.stack(cells), captions, columns=columns, cell=1.9)
    add_class_legend(figure, np.unique(np.stack(masks)) if masks else np.array([]), classes)
    return figure


def add_class_legend(figure: Figure, ids: np.ndarray, classes: Sequence[str]) -> None:
    """Add a legend of the classes among `ids`."""
    colors = class_colors(len(classes))
    shown = [int(i) for i in ids if i < len(classes)][:MAX_LEGEND_CLASSES]
    add_legend(figure, [(classes[i], {"markerfacecolor": colors[i], "markeredgecolor": "none"}) for i in shown], "s")


def add_legend(figure: Figure, entries: Sequence[tuple[str, dict[str, Any]]], marker: str) -> None:
    """Add a legend below the figure from names and properties of their markers."""
    from matplotlib.lines import Line2D

    if not entries:
        return
    names = [shorten(name, 60) for name, _ in entries]
    columns = max(1, min(len(entries), int(figure.get_figwidth() / (0.4 + 0.075 * max(map(len, names))))))
    with style():
        handles = [
            Line2D([], [], linestyle="none", marker=marker, markersize=6, label=name, **properties)
            for name, (_, properties) in zip(names, entries, strict=True)
        ]
        figure.set_figheight(figure.get_figheight() + 0.24 * -(-len(entries) // columns) + 0.1)
        figure.legend(handles=handles, loc="outside lower left", ncols=columns, handletextpad=0.2)
