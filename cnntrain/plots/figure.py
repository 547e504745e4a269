"""Figures in one style: colors, creation, text, and saving. matplotlib is imported on first use."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnntrain.errors import CnntrainError
from cnntrain.io import safe_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

log = logging.getLogger("cnntrain")

INK, SOFT, GRID, FRAME = "#1f2933", "#66727f", "#e4e8ec", "#b8c1ca"
GOOD, BAD = "#1a7f4b", "#c62f2f"
# The colors of Okabe and Ito, which people with any color vision can distinguish, and two darker ones.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#4d4d4d")

STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.usetex": False,
    "text.parse_math": False,  # names may contain dollar signs
    "text.color": INK,
    "axes.edgecolor": FRAME,
    "axes.labelcolor": SOFT,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@contextmanager
def style() -> Iterator[None]:
    """Use cnntrain's style, independent of the user's matplotlibrc and without global changes."""
    from matplotlib import RcParams, rc_context, rcParamsDefault

    backend = ("backend", "backend_fallback", "interactive", "toolbar")
    defaults = {key: value for key, value in RcParams(rcParamsDefault).items() if key not in backend}
    with rc_context({**defaults, **STYLE}):  # pyright: ignore[reportArgumentType]
        yield


@contextmanager
def log_plot_errors(name: str) -> Iterator[None]:
    """Log errors while plotting `name` as warnings: a figure must not end a run. Errors of cnntrain are raised."""
    try:
        yield
    except CnntrainError:
        raise
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0]
        log.warning("%s could not be plotted (%s: %s); the run continues", name, type(error).__name__, text)


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of width x height inches, to be drawn in cnntrain's style, by Agg and without pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)  # type: ignore[union-attr]
        yield figure


def new_panels(figure: Figure, count: int, columns: int) -> list[Axes]:
    """Return `count` axes in a grid; the rest of the last row stays empty."""
    axes = figure.subplots(-(-max(count, 1) // columns), columns, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.set_axis_off()
    return list(axes[:count])


def spans(values: Iterable[float], factor: float) -> bool:
    """Return True if all finite values are positive and the largest is more than `factor` times the smallest."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > factor * min(finite)


def use_log_scale(axis: Axis) -> None:
    """Make an axis logarithmic, with plain numbers as labels: matplotlib's formulas are not rendered in this style."""
    from matplotlib.ticker import LogFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})  # pyright: ignore[reportAttributeAccessIssue]
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(LogFormatter())


def shorten(text: str, length: int) -> str:
    """Replace the middle of long texts by an ellipsis, and undecodable bytes, which cannot be rendered, by escapes."""
    text = text.encode(errors="backslashreplace").decode()
    if len(text) > length:
        keep = max(length - 1, 2)
        text = text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :]
    return text


def label_split(figure: Figure, split: str) -> Figure:
    """Write the name of the split below the figure, on the right, and return the figure."""
    figure.supxlabel(f"{split} data", x=0.99, ha="right", fontsize=7, color=SOFT)
    return figure


def to_png(figure: Figure) -> bytes:
    """Return the figure as PNG bytes."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure to a PNG file atomically.

    Raises:
        UserError: `figures` is a link.
        OSError: the file cannot be written.
    """
    root, content = safe_files.run_folder_of(path), to_png(figure)
    root.mkdir(parents=True, exist_ok=True)
    if root != path.parent:
        safe_files.make_folder(path.parent, root)
    safe_files.write_atomic(path, content, root, sync=False)
