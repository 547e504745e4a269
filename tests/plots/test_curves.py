"""Figures hold what they were given; how they look was judged by eye."""

import matplotlib
import numpy as np
import pytest
import torch

from cnntrain.plots.curves import learning_rate_by_step, plot_overfit_curve, plot_training_curves
from cnntrain.plots.figure import save_figure, to_png
from cnntrain.plots.images import plot_batch, plot_filters, unnormalize
from cnntrain.train.schedule import OneCycle


def test_curves_draw_train_beside_val_and_mark_the_best():
    top1 = [0.5, 0.9, 0.7]
    rows = [
        {
            "epoch": e + 1,
            "step": e,
            "train/loss": 1 / (e + 1),
            "val/loss": 2.0,
            "val/top1": top1[e],
            "lr": 0.1,
        }
        for e in range(3)
    ]
    figure = plot_training_curves(rows, ("top1", "max"))
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_title(loc="left")}
    assert list(panels) == ["loss", "top1", "learning rate"]
    lines = {line.get_label(): line for line in panels["loss"].lines}
    assert list(lines["train"].get_ydata()) == [1.0, 0.5, 1 / 3]
    assert list(lines["val"].get_xdata()) == [1, 2, 3]
    assert panels["top1"].texts[0].get_text() == "best: epoch 2"


def test_the_learning_rate_is_drawn_step_by_step():
    """A one-cycle run of two epochs: warm-up and peak lie inside the first, where no row has them."""
    cycle = OneCycle(warmup=0.3, start=0.04, final=1e-4, shape="cosine", total_steps=40, steps_per_epoch=20)
    rates = [0.01 * cycle.factor(step) for step in range(40)]
    rows = [{"epoch": 1, "step": 20, "lr": rates[19]}, {"epoch": 2, "step": 40, "lr": rates[39]}]
    panel = plot_training_curves(rows, None, rates.__getitem__).axes[0]
    (line,) = panel.lines
    np.testing.assert_allclose(line.get_ydata(), rates)
    np.testing.assert_allclose(line.get_xdata(), np.arange(1, 41) / 20)


def test_a_rate_of_another_schedule_is_drawn_as_its_rows_have_it():
    """After a resume with more epochs, or under a plateau's schedule, which only knows its present factor."""
    rows = [{"epoch": e, "step": 4 * e, "lr": rate} for e, rate in ((1, 0.5), (2, 0.25), (3, 0.1))]
    assert learning_rate_by_step(rows, lambda step: (12 - step) / 10) == (
        [1, 2, *np.linspace(2.25, 3, 4)], [0.5, 0.25, 0.4, 0.3, 0.2, 0.1],
    )  # fmt: skip
    held = learning_rate_by_step(rows, lambda step: 0.1)
    assert held == ([*np.linspace(0.25, 3, 12)], [*4 * [0.5], *4 * [0.25], *4 * [0.1]])


def test_a_long_run_is_drawn_by_some_of_its_steps():
    rows = [{"epoch": e + 1, "step": 10_000 * (e + 1), "lr": 1.0} for e in range(20)]
    assert len(learning_rate_by_step(rows, lambda step: 1.0)[0]) == 2000


@pytest.mark.parametrize("rows", [[], [{"epoch": 0}], [{"epoch": 0, "train/loss": float("nan"), "lr": 0.1}],
                                  [{"epoch": "0", "train/loss": "0.5", "val/loss": ""}]])  # fmt: skip
def test_curves_bear_gaps(rows):
    assert to_png(plot_training_curves(rows, ("top1", "max"))).startswith(b"\x89PNG")


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_normalization_is_undone(channels):
    mean, std = [0.2] * channels, [0.5] * channels
    images = torch.rand(2, channels, 4, 6)
    shown = unnormalize((images - 0.2) / 0.5, mean, std)
    assert shown.shape == (2, 4, 6, 3)
    for channel in range(min(channels, 3)):
        np.testing.assert_allclose(shown[..., channel], images[:, channel].numpy(), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (32, 3, 7, 7), (96, 1, 5, 5), (8, 4, 3, 3)])
def test_filters_of_any_first_layer_are_drawn(shape):
    figure = plot_filters(torch.randn(shape))
    assert sum(len(ax.images) for ax in figure.axes) == min(shape[0], 64)


def test_a_zero_filter_is_gray():
    image = plot_filters(torch.zeros(1, 3, 3, 3)).axes[0].images[0].get_array()
    np.testing.assert_allclose(np.asarray(image), 0.5)


def test_a_grid_has_one_picture_and_caption_an_image():
    figure = plot_batch(torch.zeros(5, 1, 8, 8), list("abcde"), (0.0,), (1.0,), "Five")
    shown = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in shown] == list("abcde")
    assert to_png(figure)


def test_saving_leaves_the_picture_alone_in_its_folder(tmp_path):
    save_figure(plot_overfit_curve([2.3, 1.0, 0.1], 0.05, 2.3, "learning"), tmp_path / "figures" / "a.png")
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["a.png"]


def test_drawing_changes_nothing_global():
    before = dict(matplotlib.rcParams)
    to_png(plot_training_curves([{"epoch": 0, "val/loss": 1.0}]))
    assert dict(matplotlib.rcParams) == before
