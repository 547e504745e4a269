"""Charts: confusion matrix, ROC and precision-recall curves, bars per class, symmetry of keypoints."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from cnntrain.plots.figure import BAD, COLORS, GRID, INK, SOFT, new_figure, shorten
from cnntrain.types import DataSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_COUNTED_CLASSES = 25  # with more classes, numbers in the cells would be too small


def plot_confusion_matrix(counts: Tensor, classes: Sequence[str], title: str = "Confusion matrix") -> Figure:
    """Plot how often each true class (row) was predicted as each class (column).

    Cells are colored by their fraction of the row, the diagonal in blue and mistakes in red, so that rare mistakes are
    visible. Up to 25 classes the counts are written too, or the fractions if a count reaches 10,000.

    Args:
        counts: (C, C), row = true class.
    """
    matrix = counts.double().cpu().numpy()
    count = len(classes)
    fraction = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(max(2.2 + 0.42 * count, 4.2), 11.0)
    with new_figure(side, side) as figure:
        ax = figure.subplots()
        diagonal = np.eye(count, dtype=bool)
        ax.imshow(np.ma.masked_array(fraction, ~diagonal), cmap="Blues", vmin=0, vmax=1.25)
        # Mistakes are rare: the square root maps 1 % to a tenth of the scale.
        ax.imshow(np.ma.masked_array(np.sqrt(fraction), diagonal), cmap="Reds", vmin=0, vmax=1.1)
        if count <= MAX_COUNTED_CLASSES:
            font = min(9.0, 1.9 * 72 * (side - 1.6) / count / 10)
            for i, j in np.argwhere(matrix > 0):
                dark = fraction[i, j] > (0.7 if i == j else 0.4)
                text = f"{matrix[i, j]:.0f}" if matrix.max() < 1e4 else f"{fraction[i, j]:.2f}".lstrip("0")
                ax.text(j, i, text, ha="center", va="center", fontsize=font, color="white" if dark else INK)
            ax.set_xticks(np.arange(-0.5, count), minor=True)
            ax.set_yticks(np.arange(-0.5, count), minor=True)
            ax.grid(which="minor", color="white", linewidth=1.2)
            ax.tick_params(which="both", length=0)
        names = [shorten(name, 18) for name in classes]
        font = min(9.0, 0.78 * 72 * (side - 1.8) / count)
        step = 1 if font > 4 else -(-count // 50)
        rotated = max(map(len, names)) > 3 or count > MAX_COUNTED_CLASSES
        ticks, names, font = range(0, count, step), names[::step], max(font, 4)
        ax.set_xticks(ticks, names, rotation=90 if rotated else 0, fontsize=font)
        ax.set_yticks(ticks, names, fontsize=font)
        ax.spines[:].set_visible(False)
        ax.set(xlabel="predicted", ylabel="true")
        total = matrix.sum()
        ax.set_title(f"{title}: {np.trace(matrix) / total:.1%} of {total:,.0f} correct" if total else title)
    return figure


def plot_ranking_curves(scores: Tensor, positive: Tensor, name: str) -> Figure:
    """Plot ROC and precision-recall curves of scores (N,) for class `name`, with labels 0 or 1 (N,), on the CPU."""
    from sklearn import metrics

    base_rate = float(positive.double().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # undefined curves, if a class is missing, stay empty
        false_rate, true_rate, _ = metrics.roc_curve(positive, scores)
        precision, recall, _ = metrics.precision_recall_curve(positive, scores)
        average_precision = metrics.average_precision_score(positive, scores)
    with new_figure(7.6, 3.7) as figure:
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], "--", color=SOFT, linewidth=1, label="chance 0.5")
        area = metrics.auc(false_rate, true_rate)
        left.plot(false_rate, true_rate, color=COLORS[0], label=f"area {area:.4f}")
        left.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
        right.axhline(base_rate, linestyle="--", color=SOFT, linewidth=1, label=f"chance {base_rate:.2f}")
        label = f"average precision {average_precision:.4f}"
        right.plot(recall, precision, color=COLORS[1], drawstyle="steps-post", label=label)
        right.set(xlabel=f"recall of {shorten(name, 20)}", ylabel="precision", title="Precision and recall")
        for ax in (left, right):
            ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
            ax.grid(True)
            ax.legend(loc="lower right" if ax is left else "lower left")
    return figure


def plot_bars(values: Mapping[str, float], title: str, label: str, limit: float | None = None) -> Figure:
    """Plot one horizontal bar per name, in the given order; NaN gives no bar.

    Args:
        limit: end of the axis; None for the largest value.
    """
    names, numbers = list(values), np.array(list(values.values()), dtype=float)
    lengths = np.nan_to_num(numbers)
    with new_figure(6.0, min(1.0 + 0.24 * len(names), 16.0)) as figure:
        ax = figure.subplots()
        bars = ax.barh(range(len(names)), lengths, color=COLORS[0], height=0.7)
        texts = ["–" if np.isnan(number) else f"{number:.3g}" for number in numbers]
        ax.bar_label(bars, texts, padding=4, fontsize=7.5)
        font = min(8.5, 8.5 * 66 / len(names))
        ax.set_yticks(range(len(names)), [shorten(name, 28) for name in names], fontsize=font)
        ax.set(title=title, xlabel=label, ylim=(len(names) - 0.4, -0.6))
        ax.set_xlim(0, limit if limit is not None else max(float(lengths.max()) * 1.15, 1e-9))
        ax.tick_params(axis="y", length=0)
        ax.grid(True, axis="x")
    return figure


def plot_flip_symmetry(
    shape: Tensor,
    mirrored: Tensor,
    distances: tuple[float, float],
    spec: DataSpec,
    wrong_points: Collection[int],
    title: str,
) -> Figure:
    """Draw a mean shape (rings) and its mirror image (dots), with lines between keypoints of the same name.

    The left panel keeps the names of the mirror image, the right panel swaps them by `spec.flip_pairs`.

    Args:
        shape, mirrored: (K, 2), centered.
        distances: distance between the shapes in the left and the right panel.
        wrong_points: indices of keypoints to highlight.
    """
    assert spec.flip_pairs is not None
    points, image = shape.numpy(), mirrored.numpy()
    panels = {"mirrored, same names": image, "mirrored, names swapped": image[list(spec.flip_pairs)]}
    reach = abs(points).max() * 1.25
    with new_figure(10.5, 5.9) as figure:
        axes = figure.subplots(1, 2)
        for ax, (caption, other), distance in zip(axes, panels.items(), distances, strict=True):
            for a, b in spec.skeleton:
                ax.plot(*points[[a, b]].T, color=GRID, linewidth=1.2, zorder=1)
            for k, (start, end) in enumerate(zip(points, other, strict=True)):
                is_wrong = k in wrong_points
                ax.plot(*zip(start, end, strict=True), color=BAD if is_wrong else COLORS[4], linewidth=1.3, zorder=2)
                if len(points) <= 20 or is_wrong:
                    font = {"fontsize": 7.5, "color": BAD if is_wrong else INK, "zorder": 5}
                    ax.annotate(shorten(spec.keypoints[k], 30), start, (4, 5), textcoords="offset points", **font)
            ax.scatter(*points.T, s=42, facecolors="none", edgecolors=INK, linewidths=1.1, zorder=3, label="mean shape")
            ax.scatter(*other.T, s=13, color=COLORS[0], zorder=4, label="mirror image")
            ax.set_title(f"{caption}: {distance:.3f} distance")
            ax.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal", xticks=[], yticks=[])
            ax.spines[:].set(visible=True, color=GRID)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left", color=BAD if wrong_points else INK)
        figure.supxlabel("lines connect keypoints of the same name: short lines are correct", fontsize=9, color=SOFT)
    return figure
