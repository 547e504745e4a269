"""Heatmaps: positions are recovered with sub-pixel precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnntrain.tasks import heatmaps
from cnntrain.tasks.keypoints import Keypoints
from cnntrain.types import DataSpec


def make(**settings) -> Keypoints:
    return Keypoints(DataSpec(3, 24, 40, keypoints=tuple("abcd")), **settings)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.7, 4.0),
    st.sampled_from(["auto", "mse"]),
    st.sampled_from([(12, 20), (24, 40), (7, 31)]),
)
def test_decoding_recovers_sub_pixel_positions_of_an_ideal_map(x, y, sigma, loss, cells):
    task = make(head="heatmap", loss=loss, heatmap_sigma=sigma)
    h, w = cells
    inside = torch.tensor([1 + x * (w - 3), 1 + y * (h - 3)]).view(1, 1, 2).repeat(1, 4, 1)
    pixels = heatmaps.cells_to_pixels(inside, task.spec.image_size, cells)
    heat = heatmaps.log_gaussian(inside, cells, sigma)
    outputs = heat.exp() if loss == "mse" else heat + 3.0  # logits are free up to a constant
    found = heatmaps.pixels_to_cells(task.points(outputs), task.spec.image_size, cells)
    torch.testing.assert_close(found, inside, rtol=0, atol=2e-2 if loss == "mse" and sigma < 1 else 2e-3)
    targets = {"points": pixels, "valid": torch.ones(1, 4, dtype=torch.bool)}
    assert float(task.loss(outputs, targets)[0]) == pytest.approx(0, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.0, 19.0), st.floats(0.0, 11.0))
def test_decoding_on_the_border_is_accurate_to_about_half_a_cell(x, y):
    point = torch.tensor([[[x, y]]])
    found = heatmaps.decode(heatmaps.log_gaussian(point, (12, 20), 1.5))
    assert float((found - point).abs().max()) <= 0.501


@pytest.mark.parametrize("heat", [torch.zeros(1, 1, 5, 5), torch.full((1, 1, 1, 1), 3.0)])
def test_a_flat_map_decodes_to_a_point_inside(heat):
    found = heatmaps.decode(heat)
    assert bool(((found >= 0) & (found <= 4)).all())


def test_a_random_map_decodes_near_its_peak_and_inside():
    heat = torch.randn(20000, 1, 6, 9, generator=torch.Generator().manual_seed(0)) * 5
    found, peak = heatmaps.decode(heat), heat.flatten(2).argmax(2)
    assert bool((found >= 0).all())
    assert bool((found[..., 0] <= 8).all() and (found[..., 1] <= 5).all())
    step = found - torch.stack([peak % 9, peak // 9], 2)
    assert float(step.abs().max()) <= 1  # a nearly flat ridge would send Newton far away


def test_a_flipped_map_decodes_to_the_flipped_point():
    heat = torch.randn(50, 2, 8, 11)
    there, back = heatmaps.decode(heat), heatmaps.decode(heat.flip(3))
    torch.testing.assert_close(there[..., 0], 10 - back[..., 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(there[..., 1], back[..., 1], rtol=0, atol=1e-4)


def test_a_map_covers_the_image_with_aligned_corners():
    corners = torch.tensor([[[0.0, 0.0], [39.0, 23.0]]])
    assert heatmaps.pixels_to_cells(corners, (24, 40), (6, 10)).tolist() == [[[0, 0], [9, 5]]]
    torch.testing.assert_close(
        heatmaps.cells_to_pixels(heatmaps.pixels_to_cells(corners, (24, 40), (6, 10)), (24, 40), (6, 10)), corners
    )
