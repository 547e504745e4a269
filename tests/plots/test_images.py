"""Grids of images, read back from the figure."""

import numpy as np
import pytest
import torch

from cnntrain.plots.figure import to_png
from cnntrain.plots.images import plot_filters, plot_images, plot_keypoints, plot_masks, unnormalize


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_unnormalize_inverts_normalization(channels: int) -> None:
    images = torch.rand(2, channels, 4, 6)
    shown = unnormalize((images - 0.2) / 0.5, [0.2] * channels, [0.5] * channels)
    assert shown.shape == (2, 4, 6, 3)
    for channel in range(min(channels, 3)):
        np.testing.assert_allclose(shown[..., channel], images[:, channel].numpy(), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (32, 3, 7, 7), (96, 1, 5, 5), (8, 4, 3, 3)])
def test_filters_of_any_first_layer_are_drawn(shape: tuple[int, ...]) -> None:
    figure = plot_filters(torch.randn(shape))
    assert sum(len(ax.images) for ax in figure.axes) == min(shape[0], 64)


def test_a_zero_filter_is_gray() -> None:
    image = plot_filters(torch.zeros(1, 3, 3, 3)).axes[0].images[0].get_array()
    np.testing.assert_allclose(np.asarray(image), 0.5)


def test_each_image_has_its_caption() -> None:
    figure = plot_images(np.zeros((5, 8, 8, 3)), list("abcde"), title="Five")
    assert [ax.get_title() for ax in figure.axes if ax.images] == list("abcde")
    assert to_png(figure)


def test_keypoints_outside_do_not_shrink_the_image() -> None:
    true = np.array([[[2.0, 3.0], [50.0, 60.0]]])
    figure = plot_keypoints(np.zeros((1, 8, 8, 3)), ["a"], true, true + 1, np.array([[True, True]]), [(0, 1)])
    ax = figure.axes[0]
    assert ax.get_xlim() == (-0.5, 7.5) and ax.get_ylim() == (7.5, -0.5)
    skeleton, *errors = ax.lines
    assert skeleton.get_xdata().tolist() == [3, 51] and [line.get_xdata().tolist() for line in errors] == [
        [2, 3],
        [50, 51],
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["true", "predicted"]


def test_predictions_without_a_valid_true_point_are_lighter() -> None:
    points, valid = np.ones((1, 3, 2)), np.array([[True, False, True]])
    dots, light, rings = plot_keypoints(np.zeros((1, 8, 8, 3)), ["a"], points, points, valid).axes[0].collections
    assert [len(each.get_offsets()) for each in (dots, light, rings)] == [2, 1, 2] and light.get_alpha() == 0.3
    (rings,) = plot_keypoints(np.zeros((1, 8, 8, 3)), ["a"], points, None, valid).axes[0].collections
    assert len(rings.get_offsets()) == 2


def test_masks_color_classes_and_keep_ignored_pixels() -> None:
    images, mask = np.full((1, 2, 2, 3), 0.5), np.array([[[0, 1], [255, 1]]])
    figure = plot_masks(images, ["image", "true"], [mask], ["sky", "cat", "dog"])
    colored = np.asarray(figure.axes[1].images[0].get_array())
    np.testing.assert_allclose(colored[1, 0], 0.5)
    assert np.ptp(colored[0, 1]) > 0.1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sky", "cat"]
