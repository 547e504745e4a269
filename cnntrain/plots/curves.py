"""Figures of a run: curves, batches, filters. Plain data in, a matplotlib Figure out; what a task draws is
its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from cnntrain.io import safe_files as files
from cnntrain.plots.images import (
    BAD,
    COLORS,
    GOOD,
    INK,
    SOFT,
    bars,
    confusion_matrix,
    image_grid,
    new_figure,
    shorten,
    style,
    survive_drawing,
    unnormalize,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BAD",
    "GOOD",
    "INK",
    "bars",
    "batch_grid",
    "confusion_matrix",
    "curves",
    "filters",
    "image_grid",
    "learning",
    "png",
    "save",
    "sign",
    "survive_drawing",
    "unnormalize",
]

# Not curves of learning: counters and rates of the machine.
_NOT_PLOTTED = ("epoch", "step", "images_per_s", "wall_s", "seconds")
_RATES_DRAWN = 2000  # points of the learning rate's line


def curves(
    rows: Sequence[Mapping[str, object]],
    monitor: tuple[str, str] | None = None,
    rate_at: Callable[[int], float] | None = None,
) -> Figure:
    """Training and validation over the epochs: one panel per metric (`train/x` with `val/x`), one for the
    rate.

    Args:
        rows: as in metrics.csv: `epoch`, `train/...`, `val/...`, `lr`; numbers or their text; gaps are
            allowed.
        monitor: metric and direction that chose the best epoch, which is then marked.
        rate_at: the learning rate of a step (counted from 0); without it, only that at the end of each epoch is
            drawn.
    """
    epochs = [_number(row.get("epoch", i + 1)) for i, row in enumerate(rows)]
    metrics: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        if key.rsplit("/", 1)[-1] not in _NOT_PLOTTED and any(
            math.isfinite(_number(r.get(key))) for r in rows
        ):
            metrics.setdefault(key.split("/", 1)[-1], []).append(key)
    names = sorted(metrics, key=lambda name: (name != "loss", name == "lr"))
    columns = 2 if len(names) == 4 else min(3, max(len(names), 1))
    lines = -(-max(len(names), 1) // columns)
    with style():
        figure = new_figure(3.7 * columns, 2.8 * lines)
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax in axes[len(names) :]:
            ax.axis("off")
        best = _best_epoch(rows, epochs, monitor)
        for ax, name in zip(axes, names, strict=False):
            for key in metrics[name]:
                values = [_number(row.get(key)) for row in rows]
                part = key.split("/", 1)[0] if "/" in key else ""
                color = {"train": COLORS[5], "val": COLORS[1]}.get(part, COLORS[0])
                marker = "o" if len(rows) <= 20 else None
                if key == "lr" and rate_at is not None:
                    ax.plot(*rates_by_step(rows, rate_at), color=color)
                    continue
                ax.plot(epochs, values, color=color, marker=marker, markersize=3.5, label=part or None)
            _finish_panel(ax, name, [_number(row.get(key)) for key in metrics[name] for row in rows])
            if best is not None and name != "lr":
                ax.axvline(best, color=SOFT, linewidth=0.9, linestyle=":")
                if monitor is not None and name == monitor[0]:
                    ax.annotate(
                        f"best: epoch {best:.0f}",
                        (best, 0.02),
                        xycoords=("data", "axes fraction"),
                        xytext=(-4 if best > sum(epochs) / len(epochs) else 4, 0),
                        textcoords="offset points",
                        fontsize=8,
                        color=SOFT,
                        ha="right" if best > sum(epochs) / len(epochs) else "left",
                    )
    return figure


def rates_by_step(
    rows: Sequence[Mapping[str, object]], rate_at: Callable[[int], float]
) -> tuple[list[float], list[float]]:
    """The learning rate over the epochs, step by step: (epochs, fractions included; learning rates).

    An epoch of another schedule than `rate_at`, as after a resume with more epochs, is drawn as a straight line to the
    rate at its end, which its row holds.
    """
    epochs, rates = [], []
    before, done = 0, 0.0  # steps and epochs
    per_epoch = max(_RATES_DRAWN // max(len(rows), 1), 2)
    for row in rows:
        step, epoch, last = (_number(row.get(key)) for key in ("step", "epoch", "lr"))
        if not (math.isfinite(last) and before < step < math.inf and epoch > done):
            continue
        steps = [int(s) for s in np.linspace(before, step - 1, min(int(step) - before, per_epoch)).round()]
        found = [rate_at(s) for s in steps]
        if not math.isclose(found[-1], last, rel_tol=1e-6, abs_tol=1e-15):
            steps, found = (steps, [last] * len(steps)) if min(found) == max(found) else (steps[-1:], [last])
        epochs += [done + (s + 1 - before) / (step - before) * (epoch - done) for s in steps]
        rates += found
        before, done = int(step), epoch
    return epochs, rates


def _finish_panel(ax: Axes, name: str, values: Sequence[float]) -> None:
    """Title, axes and legend of one metric; a loss or rate that spans decades gets a logarithmic axis."""
    from matplotlib.ticker import MaxNLocator

    ax.set_title("learning rate" if name == "lr" else name)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    known = [value for value in values if math.isfinite(value)]
    if name == "loss" and known and min(known) > 0 and max(known) > 30 * min(known):
        ax.set_yscale("log")
    elif name == "lr":
        ax.set_ylim(bottom=0)
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    ax.grid(True)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="best")


def _best_epoch(
    rows: Sequence[Mapping[str, object]], epochs: Sequence[float], monitor: tuple[str, str] | None
) -> float | None:
    if monitor is None:
        return None
    for key in (f"val/{monitor[0]}", f"train/{monitor[0]}"):
        values = [(_number(row.get(key)), epoch) for row, epoch in zip(rows, epochs, strict=True)]
        values = [pair for pair in values if math.isfinite(pair[0])]
        if values:
            pick = max if monitor[1] == "max" else min
            return pick(values, key=lambda pair: pair[0])[1]
    return None


def learning(losses: Sequence[float], lowest: float, uninformed: float, title: str) -> Figure:
    """A loss, step by step, between what knowing nothing gives and its floor: the picture of `overfit`."""
    with style():
        figure = new_figure(6.2, 3.4)
        ax = figure.subplots()
        ax.axhline(
            uninformed,
            color=COLORS[1],
            linestyle="--",
            linewidth=1.1,
            label=f"knows nothing {uninformed:.3f}",
        )
        if lowest > 0:
            ax.axhline(
                lowest, color=COLORS[2], linestyle="--", linewidth=1.1, label=f"lowest there is {lowest:.3f}"
            )
        ax.plot(range(len(losses)), losses, color=COLORS[0], label="loss")  # after so many steps
        known = [value for value in losses if math.isfinite(value)]
        if known and max(known) > 30 * max(min(known), 1e-12):
            ax.set_yscale("log")
        ax.set(title=shorten(title, 120), xlabel="step", ylabel="loss")
        ax.grid(True)
        ax.legend()
    return figure


def batch_grid(
    images: Tensor, captions: Sequence[str], mean: Sequence[float], std: Sequence[float], title: str = ""
) -> Figure:
    """A batch as the network sees it: (N, C, H, W) normalized floats, shown on the 0-1 scale."""
    return image_grid(unnormalize(images, mean, std), captions, title=title)


def sign(figure: Figure, split: str) -> Figure:
    """The same figure, which says below on the right what data it shows."""
    figure.supxlabel(f"{split} data", x=0.99, ha="right", fontsize=7, color=SOFT)
    return figure


def filters(weight: Tensor, title: str = "First layer's filters", limit: int = 64) -> Figure:
    """Kernels of a first convolution, each on its own scale around zero (gray).

    Args:
        weight: (out, in, kH, kW); three input channels show as color, others as gray, averaged.
        limit: show at most so many.
    """
    kernels = weight.detach().float().cpu()[:limit]
    if kernels.shape[1] != 3:
        kernels = kernels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    peak = kernels.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    pictures = (0.5 + 0.5 * kernels / peak).permute(0, 2, 3, 1).numpy()
    if len(weight) > limit:
        title += f" ({limit} of {len(weight)})"
    return image_grid(np.asarray(pictures), title=title, columns=min(8, len(kernels)), cell=0.62)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        UserError: `figures` is a link.
        OSError: it can't be written.
    """
    root, content = files.run_folder_of(path), png(figure)
    root.mkdir(parents=True, exist_ok=True)
    if root != path.parent:
        files.make_folder(path.parent, root)
    files.write_atomic(path, content, root, sync=False)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    import io

    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _number(value: object) -> float:
    """A cell of metrics.csv as a number; NaN for an empty one."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
