"""Figures of `cnntrain preview`, read back from the figure."""

import torch
from torch import Tensor

from cnntrain.plots.previews import draw_batches, draw_flip, sides_of
from cnntrain.types import Batch, DataSpec

FACE = DataSpec(1, 8, 8, keypoints=("right_eye", "left_eye", "nose", "a", "b"), flip_pairs=(1, 0, 2, 4, 3))


def batch(**targets: Tensor) -> Batch:
    return Batch(torch.zeros(2, 1, 8, 8), targets, torch.arange(2), torch.arange(2))


def test_sides_follow_names_then_order() -> None:
    assert sides_of(FACE) == [1, -1, 0, -1, 1]


def test_mixed_images_show_the_shares_of_their_classes() -> None:
    label, other = torch.tensor([0, 1]), torch.tensor([1, 1])
    mixed = batch(label=label, label_b=other, mix=torch.tensor([0.7, 0.5]))
    figure = draw_batches([batch(label=label), mixed], ["x", "y"], DataSpec(1, 8, 8, classes=("cat", "dog")))
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["cat", "70% cat\n30% dog", "dog", "50% dog\n50% dog"]


def test_masks_have_a_second_row() -> None:
    spec = DataSpec(1, 8, 8, classes=("sky", "cat"), ignore_index=255)
    batches = [batch(mask=torch.full((2, 8, 8), value, dtype=torch.uint8)) for value in (1, 255, 1)]
    figure = draw_batches(batches, ["x", "y"], spec)
    assert [ax.get_title() for ax in figure.axes[:6]] == ["x", "epoch 1", "epoch 2", "", "", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat"]


def test_flipped_keypoints_have_names_and_a_legend_of_sides() -> None:
    points, valid = torch.rand(2, 5, 2) * 7, torch.ones(2, 5, dtype=torch.bool)
    figure = draw_flip(batch(points=points, valid=valid), batch(points=points, valid=valid), ["x", "y"], FACE)
    assert [text.get_text() for text in figure.axes[0].texts] == list(FACE.keypoints)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["left_eye, a", "right_eye, b", "nose"]
