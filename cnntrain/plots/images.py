"""Grids of images, with captions, keypoints or masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cnntrain.plots.figure import BAD, FRAME, GOOD, INK, new_figure, shorten, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUE_COLOR, PREDICTED_COLOR, ERROR_COLOR = "#35d07f", "#ff3b6b", "#ffd400"


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
        overlay: function of (axes, i) that draws on image i.
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
    with style():
        figure = new_figure(figure_width, figure_height)
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)  # type: ignore[union-attr]
        axes = np.asarray(figure.subplots(rows, columns, squeeze=False)).ravel()
        for i, ax in enumerate(axes):
            ax.set_xticks([])
            ax.set_yticks([])
            if i >= count:
                ax.axis("off")
                continue
            ax.imshow(images[i], interpolation="nearest" if max(height, width) < 100 else "antialiased")
            color = colors[i] if colors else INK
            for spine in ax.spines.values():
                spine.set(visible=True, color=color if color in (GOOD, BAD) else FRAME, linewidth=0.8)
            if captions:
                text = "\n".join(shorten(line, int(cell_width * 14)) for line in captions[i].split("\n"))
                ax.set_title(text, fontsize=7.5, color=color, loc="center", pad=2.5, fontweight="normal")
            if overlay is not None:
                overlay(ax, i)
        if title:
            figure.suptitle(shorten(title, 200), fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def plot_batch(
    images: Tensor, captions: Sequence[str], mean: Sequence[float], std: Sequence[float], title: str = ""
) -> Figure:
    """Plot a batch as the network gets it: normalized images (N, C, H, W), shown on the 0-1 scale."""
    return plot_images(unnormalize(images, mean, std), captions, title=title)


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
    return plot_images(np.asarray(images), title=title, columns=min(8, len(kernels)), cell=0.62)


def plot_keypoints(
    images: np.ndarray,
    captions: Sequence[str],
    true: np.ndarray | None,
    predicted: np.ndarray | None,
    valid: np.ndarray,
    skeleton: Sequence[tuple[int, int]] = (),
    labels: Sequence[str] = (),
) -> Figure:
    """Plot images (N, H, W, 3) with keypoints (N, K, 2), see `draw_keypoints`."""
    height, width = images.shape[1:3]

    def overlay(ax: Axes, i: int) -> None:
        true_i, predicted_i = (None if points is None else points[i] for points in (true, predicted))
        draw_keypoints(ax, true_i, predicted_i, valid[i], skeleton, labels)
        # Points far outside must not shrink the image.
        ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))

    figure = plot_images(images, captions, overlay=overlay, cell=2.1 if height < 100 else 2.6)
    if true is not None and predicted is not None:
        ring = {"marker": "o", "markeredgecolor": TRUE_COLOR, "markerfacecolor": "none"}
        dot = {"marker": "o", "markeredgecolor": "none", "markerfacecolor": PREDICTED_COLOR}
        _add_legend(figure, [("true", ring), ("predicted", dot)])
    return figure


def draw_keypoints(
    ax: Axes,
    true: np.ndarray | None,
    predicted: np.ndarray | None,
    valid: np.ndarray,
    skeleton: Sequence[tuple[int, int]] = (),
    labels: Sequence[str] = (),
) -> None:
    """Draw keypoints on an image: true points as rings, predicted points as dots, and lines between both.

    Args:
        true, predicted: (K, 2) as (x, y) in image pixels, or None.
        valid: (K,) bool; predictions without a valid true point are drawn lighter.
        skeleton: pairs of predicted points to connect (of true points without predictions).
        labels: K names to write beside the points, or none.
    """
    shown = predicted if predicted is not None else true
    if shown is None:
        return
    everything = np.ones(len(valid), dtype=bool)
    visible = everything if predicted is not None else valid
    size = 14.0 if len(valid) <= 20 else 5.0
    for a, b in skeleton:
        if visible[a] and visible[b]:
            ax.plot(*shown[[a, b]].T, color="white", linewidth=0.7, alpha=0.65, zorder=2)
    box = {"boxstyle": "round,pad=0.12", "facecolor": "black", "alpha": 0.55, "linewidth": 0}
    font: dict[str, Any] = {"fontsize": 5.5, "color": "white", "bbox": box, "zorder": 6}
    for name, point, is_visible in zip(labels, shown, visible, strict=bool(labels)):
        if is_visible:
            ax.annotate(shorten(name, 30), tuple(point), (3, 3), textcoords="offset points", **font)
    if true is not None and predicted is not None:
        for start, end in zip(true[valid], predicted[valid], strict=True):
            ax.plot(*np.stack([start, end]).T, color=ERROR_COLOR, linewidth=0.8, alpha=0.9, zorder=3)
    if true is not None:
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": TRUE_COLOR, "linewidths": 0.9}
        ax.scatter(*true[valid].T, s=size * 2, zorder=4, **ring)
    if predicted is not None:
        dot: dict[str, Any] = {"c": PREDICTED_COLOR, "linewidths": 0, "zorder": 5, "s": size}
        evaluated = valid if true is not None else everything
        ax.scatter(*predicted[evaluated].T, **dot)
        ax.scatter(*predicted[~evaluated].T, alpha=0.3, **dot)


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
    colors = class_colors(len(classes))
    present = np.unique(np.concatenate([layer.ravel() for layer in masks])) if masks else []
    shown = [int(i) for i in present if i < len(classes)][:24]
    square = {"marker": "s", "markeredgecolor": "none"}
    _add_legend(figure, [(classes[i], {"markerfacecolor": colors[i], **square}) for i in shown])
    return figure


def _add_legend(figure: Figure, entries: Sequence[tuple[str, dict]]) -> None:
    """Add a legend below the figure from (name, marker properties)."""
    from matplotlib.lines import Line2D

    if not entries:
        return
    with style():
        handles = [
            Line2D([], [], linestyle="none", markersize=6, label=shorten(name, 40), **marker)
            for name, marker in entries
        ]
        columns = max(1, min(len(entries), int(figure.get_figwidth() / 1.3)))
        figure.set_figheight(figure.get_figheight() + 0.24 * -(-len(entries) // columns) + 0.1)
        figure.legend(handles=handles, loc="outside lower left", ncols=columns, handletextpad=0.2)
