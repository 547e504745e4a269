"""Drawing primitives in one style: light, quiet, readable as a TensorBoard thumbnail. matplotlib is imported
late."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cnntrain.errors import CnntrainError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger("cnntrain")

INK, SOFT, GRID = "#1f2933", "#66727f", "#e4e8ec"
GOOD, BAD = "#1a7f4b", "#c62f2f"
# Okabe and Ito's colors, told apart with any color vision; then darker kin for more lines.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#4d4d4d")

STYLE: dict[str, Any] = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
    "font.family": "DejaVu Sans", "text.usetex": False, "text.parse_math": False, "font.size": 10, "text.color": INK,
    "axes.edgecolor": "#b8c1ca", "axes.labelcolor": SOFT, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlecolor": INK,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": False, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 1.8, "lines.solid_capstyle": "round",
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """Draw in cnntrain's style, whatever the user's matplotlibrc says; nothing global changes."""
    from matplotlib import RcParams, rc_context, rcParamsDefault

    backend = ("backend", "backend_fallback", "interactive", "toolbar")
    defaults = {key: value for key, value in RcParams(rcParamsDefault).items() if key not in backend}
    with rc_context({**defaults, **STYLE}):  # pyright: ignore[reportArgumentType]
        yield


@contextmanager
def survive_drawing(what: str) -> Iterator[None]:
    """Draw `what` inside; an error becomes a warning in the log, for a picture must not end a run."""
    try:
        yield
    except CnntrainError:
        raise
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0]
        log.warning("%s could not be drawn (%s: %s); the run continues", what, type(error).__name__, text)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, drawn by Agg: no window, no pyplot, nothing to close."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)  # type: ignore[union-attr]
    return figure


def unnormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(N, C, H, W) normalized floats -> (N, H, W, 3) in 0-1 as the eye sees them.

    One channel becomes gray; of more than three, the first three are shown; two get an empty third.
    """
    images = images.detach().float().cpu()
    shift, scale = torch.tensor(list(mean)), torch.tensor(list(std))
    images = (images * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).nan_to_num().clamp(0, 1)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    elif images.shape[1] == 2:
        images = torch.cat([images, torch.zeros_like(images[:, :1])], 1)
    return images[:, :3].permute(0, 2, 3, 1).numpy()


def grid_shape(count: int, aspect: float = 1.0, columns: int | None = None) -> tuple[int, int]:
    """(rows, columns) for `count` cells of width / height `aspect`; about 3:2 over all."""
    if columns is None:
        columns = max(1, min(count, round((count * 1.5 / aspect) ** 0.5)))
    return -(-max(count, 1) // columns), columns


def image_grid(
    images: np.ndarray,
    captions: Sequence[str] = (),
    colors: Sequence[str] = (),
    title: str = "",
    columns: int | None = None,
    overlay: Callable[[Axes, int], None] | None = None,
    cell: float = 1.5,
) -> Figure:
    """Images in rows, each with its caption above it.

    Args:
        images: (N, H, W, 3) in 0-1 or (N, H, W, 3) uint8.
        captions: N texts, or none; long lines are cut to what fits the cell.
        colors: N colors of the captions and frames.
        columns: null lets the figure be about 3:2.
        overlay: draws more on the axes of image i.
        cell: a picture's height in inches.
    """
    count, height, width = images.shape[:3]
    aspect = width / height
    rows, columns = grid_shape(count, aspect, columns)
    lines = max((text.count("\n") + 1 for text in captions), default=0)
    cell_width = max(cell * aspect, 1.15 if captions else 0.0)
    size = (
        max(columns * cell_width + 0.2, 3.0),
        rows * (cell + 0.17 * lines + 0.05) + (0.4 if title else 0.05),
    )
    with style():
        figure = new_figure(*size)
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
                spine.set(visible=True, color=color if color in (GOOD, BAD) else "#b8c1ca", linewidth=0.8)
            if captions:
                text = "\n".join(shorten(line, int(cell_width * 14)) for line in captions[i].split("\n"))
                ax.set_title(text, fontsize=7.5, color=color, loc="center", pad=2.5, fontweight="normal")
            if overlay is not None:
                overlay(ax, i)
        if title:
            figure.suptitle(shorten(title, 200), fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def confusion_matrix(counts: Tensor, classes: Sequence[str], title: str = "Confusion matrix") -> Figure:
    """How often each true class (row) was taken for each class (column).

    Cells are colored by their share of the row, the diagonal in blue and mistakes in red, so that a rare
    mistake is seen beside a good diagonal. Up to 25 classes the counts are written too, or the shares where
    a count reaches 10,000.

    Args:
        counts: (C, C), row = true class.
    """
    matrix = counts.double().cpu().numpy()
    count = len(classes)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(max(2.2 + 0.42 * count, 4.2), 11.0)
    font = min(9.0, 1.9 * 72 * (side - 1.6) / count / 10)
    with style():
        figure = new_figure(side, side)
        ax = figure.subplots()
        diagonal = np.eye(count, dtype=bool)
        ax.imshow(np.ma.masked_array(share, ~diagonal), cmap="Blues", vmin=0, vmax=1.25)
        # Mistakes are rare: the square root lifts a share of 1 % to a tenth of the scale.
        ax.imshow(np.ma.masked_array(np.sqrt(share), diagonal), cmap="Reds", vmin=0, vmax=1.1)
        if count <= 25:
            for i, j in np.argwhere(matrix > 0):
                dark = share[i, j] > (0.7 if i == j else 0.4)
                text = f"{matrix[i, j]:.0f}" if matrix.max() < 1e4 else f"{share[i, j]:.2f}".lstrip("0")
                ax.text(j, i, text, ha="center", va="center", fontsize=font, color="white" if dark else INK)
            ax.set_xticks(np.arange(-0.5, count), minor=True)
            ax.set_yticks(np.arange(-0.5, count), minor=True)
            ax.grid(which="minor", color="white", linewidth=1.2)
            ax.tick_params(which="both", length=0)
        names = [shorten(name, 18) for name in classes]
        size = min(9.0, 0.78 * 72 * (side - 1.8) / count)
        step = 1 if size > 4 else -(-count // 50)
        rotated = max(map(len, names)) > 3 or count > 25
        ax.set_xticks(
            range(0, count, step), names[::step], rotation=90 if rotated else 0, fontsize=max(size, 4)
        )
        ax.set_yticks(range(0, count, step), names[::step], fontsize=max(size, 4))
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.set_xlabel("predicted")
        ax.set_ylabel("true")
        total = matrix.sum()
        ax.set_title(f"{title}: {np.trace(matrix) / total:.1%} of {total:,.0f} right" if total else title)
    return figure


def ranking_curves(scores: Tensor, positive: Tensor, name: str) -> Figure:
    """ROC and precision-recall curves for telling the class `name`; scores and positive (N,) on the CPU."""
    from cnntrain.plots import ranking

    base_rate = float(positive.double().mean())
    false_rate, true_rate = ranking.roc_curve(scores, positive)
    precision, recall = ranking.precision_recall_curve(scores, positive)
    with style():
        figure = new_figure(7.6, 3.7)
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], "--", color=SOFT, linewidth=1, label="chance 0.5")
        left.plot(
            false_rate, true_rate, color=COLORS[0], label=f"area {ranking.roc_auc(scores, positive):.4f}"
        )
        left.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
        right.axhline(base_rate, linestyle="--", color=SOFT, linewidth=1, label=f"chance {base_rate:.2f}")
        area = ranking.average_precision(scores, positive)
        right.plot(
            recall, precision, color=COLORS[1], drawstyle="steps-pre", label=f"average precision {area:.4f}"
        )
        right.set(xlabel=f"recall of {shorten(name, 20)}", ylabel="precision", title="Precision and recall")
        for ax in (left, right):
            ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
            ax.grid(True)
            ax.legend(loc="lower right" if ax is left else "lower left")
    return figure


def bars(values: Mapping[str, float], title: str, label: str, limit: float | None = None) -> Figure:
    """One horizontal bar per name, in the order given; NaN leaves its bar out."""
    names, numbers = list(values), np.array([values[name] for name in values], dtype=float)
    with style():
        figure = new_figure(6.0, min(1.0 + 0.24 * len(names), 16.0))
        ax = figure.subplots()
        ax.barh(range(len(names)), np.nan_to_num(numbers), color=COLORS[0], height=0.7)
        for i, number in enumerate(numbers):
            text = "–" if np.isnan(number) else f"{number:.3g}"
            ax.annotate(
                text,
                (np.nan_to_num(number), i),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
        size = min(8.5, 8.5 * 66 / len(names))
        ax.set_yticks(range(len(names)), [shorten(name, 28) for name in names], fontsize=size)
        ax.invert_yaxis()
        ax.set(title=title, xlabel=label, ylim=(len(names) - 0.4, -0.6))
        ax.set_xlim(0, limit if limit is not None else max(float(np.nan_to_num(numbers).max()) * 1.15, 1e-9))
        ax.tick_params(axis="y", length=0)
        ax.grid(True, axis="x")
    return figure


def shorten(text: str, length: int) -> str:
    """The text as matplotlib can draw it, its middle left out where it is longer than `length`.

    Names may hold bytes that are no text, and dollars that would begin a formula.
    """
    text = text.encode(errors="backslashreplace").decode()
    if len(text) > length:
        keep = max(length - 1, 2)
        text = text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :]
    return text.replace("$", r"\$")
