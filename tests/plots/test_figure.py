"""Style, panels, axes, text, and saving."""

import os
from pathlib import Path

import matplotlib
import pytest

from cnntrain.plots.curves import plot_overfit_curve, plot_training_curves
from cnntrain.plots.figure import new_figure, new_panels, save_figure, shorten, spans, to_png, use_log_scale


def test_shorten() -> None:
    assert shorten("a" * 30, 11) == "aaaaa…aaaaa"
    assert shorten(os.fsdecode(b"caf\xe9.jpg"), 40) == r"caf\udce9.jpg"


def test_save_figure_leaves_no_temporary_file(tmp_path: Path) -> None:
    save_figure(plot_overfit_curve([2.3, 1.0, 0.1], 0.05, 2.3, "learning"), tmp_path / "figures" / "a.png")
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["a.png"]


def test_plotting_does_not_change_global_settings() -> None:
    before = dict(matplotlib.rcParams)
    to_png(plot_training_curves([{"epoch": 0, "val/loss": 1.0}]))
    assert dict(matplotlib.rcParams) == before


def test_panels_beyond_the_count_are_hidden() -> None:
    with new_figure(4, 4) as figure:
        panels = new_panels(figure, 3, columns=2)
    assert len(panels) == 3 and [ax.axison for ax in figure.axes] == [True, True, True, False]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 40, float("inf")], True), ([1, 20], False), ([0, 40], False), ([-1, 40], False), ([], False)],
)
def test_spans(values: list[float], expected: bool) -> None:
    assert spans(values, 30) is expected


def test_logarithmic_axes_have_plain_numbers_as_labels() -> None:
    with new_figure(4, 4) as figure:
        ax = figure.subplots()
        ax.plot([1, 2], [1e-3, 10])
        use_log_scale(ax.yaxis)
        figure.canvas.draw()
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert {"0.001", "0.1", "10"} <= set(labels) and not any("$" in label for label in labels)
