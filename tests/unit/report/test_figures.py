"""Figures hold what they were given; how they look was judged by eye."""

import matplotlib
import numpy as np
import pytest
import torch

from cnntrain.report import figures


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
    figure = figures.curves(rows, ("top1", "max"))
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_title(loc="left")}
    assert list(panels) == ["loss", "top1", "learning rate"]
    lines = {line.get_label(): line for line in panels["loss"].lines}
    assert list(lines["train"].get_ydata()) == [1.0, 0.5, 1 / 3]
    assert list(lines["val"].get_xdata()) == [1, 2, 3]
    assert panels["top1"].texts[0].get_text() == "best: epoch 2"


@pytest.mark.parametrize("rows", [[], [{"epoch": 0}], [{"epoch": 0, "train/loss": float("nan"), "lr": 0.1}],
                                  [{"epoch": "0", "train/loss": "0.5", "val/loss": ""}]])  # fmt: skip
def test_curves_bear_gaps(rows):
    assert figures.png(figures.curves(rows, ("top1", "max"))).startswith(b"\x89PNG")


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_normalisation_is_undone(channels):
    mean, std = [0.2] * channels, [0.5] * channels
    images = torch.rand(2, channels, 4, 6)
    shown = figures.unnormalise((images - 0.2) / 0.5, mean, std)
    assert shown.shape == (2, 4, 6, 3)
    for channel in range(min(channels, 3)):
        np.testing.assert_allclose(shown[..., channel], images[:, channel].numpy(), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (32, 3, 7, 7), (96, 1, 5, 5), (8, 4, 3, 3)])
def test_filters_of_any_first_layer_are_drawn(shape):
    figure = figures.filters(torch.randn(shape))
    assert sum(len(ax.images) for ax in figure.axes) == min(shape[0], 64)


def test_a_zero_filter_is_gray():
    image = figures.filters(torch.zeros(1, 3, 3, 3)).axes[0].images[0].get_array()
    np.testing.assert_allclose(np.asarray(image), 0.5)


def test_a_grid_has_one_picture_and_caption_an_image():
    figure = figures.batch_grid(torch.zeros(5, 1, 8, 8), list("abcde"), (0.0,), (1.0,), "Five")
    shown = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in shown] == list("abcde")
    assert figures.png(figure)


def test_saving_leaves_the_picture_alone_in_its_folder(tmp_path):
    figures.save(figures.learning([2.3, 1.0, 0.1], 0.05, 2.3, "learning"), tmp_path / "figures" / "a.png")
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["a.png"]


def test_drawing_changes_nothing_global():
    before = dict(matplotlib.rcParams)
    figures.png(figures.curves([{"epoch": 0, "val/loss": 1.0}]))
    assert dict(matplotlib.rcParams) == before
