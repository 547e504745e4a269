"""What comes from outside the image, what shrinking does, and resizing."""

import numpy
import pytest
import torch

from cnntrain.augment.geometry import Crop
from cnntrain.augment.pipeline import Pipeline
from cnntrain.augment.warp import Perspective, RandomResizedCrop, Zoom, homography
from cnntrain.types import Batch, DataSpec


@pytest.mark.parametrize("border", ["zero", "edge", "reflect"])
@pytest.mark.parametrize("extra", [{}, {"zoom": Zoom(factor=(1.0, 1.0))}], ids=["gather", "resample"])
def test_borders(border, extra):
    spec = DataSpec(1, 6, 9, ignore_index=11)
    images = torch.arange(1, 55, dtype=torch.uint8).view(1, 1, 6, 9)
    batch = Batch(
        images, {"mask": torch.ones(1, 6, 9, dtype=torch.uint8)}, torch.zeros(1).long(), torch.zeros(1).long()
    )
    moved = Pipeline(spec, {"crop": Crop(size=(12, 17), padding=4)} | extra, border)(batch, 0, 0)
    left, top = (-moved.source_to_image[0, :2, 2]).long().tolist()
    mode = {"zero": "constant", "edge": "edge", "reflect": "reflect"}[border]
    padded = numpy.pad(images[0, 0].numpy(), 8, mode=mode)
    expected = padded[top + 8 : top + 20, left + 8 : left + 25]
    numpy.testing.assert_allclose(moved.images[0, 0].numpy() * 255, expected, atol=1e-3)
    # The ignore id around the mask, whatever the image shows there.
    expected = numpy.pad(numpy.ones((6, 9)), 8, constant_values=11)[top + 8 : top + 20, left + 8 : left + 25]
    assert (moved.targets["mask"][0].numpy() == expected).all()


def test_shrinking_does_not_alias(make_batch):
    """Stripes finer than the output can show become gray, not wider stripes."""
    height, width = 44, 57
    batch = make_batch(6, 1, height, width)
    batch.images[:] = (255 * (torch.arange(width) % 2)).to(torch.uint8)
    shrunk = Pipeline(DataSpec(1, height, width), {"zoom": Zoom(factor=(0.37, 0.45))})(batch, 0, 0).images
    inner = shrunk[:, :, 16:28, 20:37]
    assert float((inner - 0.5).abs().max()) < 0.06


def test_resize_to_a_canvas_agrees_with_torchvision(make_batch):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    batch = make_batch(3)
    pipeline = Pipeline(DataSpec(3, 12, 17), {}, border="edge", canvas=(25, 31))
    for result in (pipeline.plain(batch), pipeline(batch, 0, 0)):
        expected = functional.resize(batch.images.float() / 255, [25, 31], antialias=False)
        torch.testing.assert_close(result.images, expected, atol=1e-4, rtol=0)
    assert pipeline.output_size == (25, 31)


def test_resized_crop_agrees_with_torchvision(make_batch):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    batch = make_batch(16, height=20, width=20)
    item = RandomResizedCrop(size=(26, 27), scale=(0.6, 1.0), ratio=(0.3, 3.0))  # many are too long, and cut
    result = Pipeline(DataSpec(3, 20, 20), {"it": item}, "edge")(batch, 0, 0)
    inverse = torch.linalg.inv(result.source_to_image)
    for i in range(16):
        left_top = inverse[i] @ torch.tensor([-0.5, -0.5, 1.0]).double() + 0.5
        right_bottom = inverse[i] @ torch.tensor([26.5, 25.5, 1.0]).double() + 0.5
        assert (left_top > -1e-9)[:2].all()
        assert (right_bottom < 20 + 1e-9)[:2].all()
    whole = Pipeline(
        DataSpec(3, 20, 20), {"it": RandomResizedCrop(size=26, scale=(1, 1), ratio=(1, 1))}, "edge"
    )
    expected = functional.resize(batch.images.float() / 255, [26, 26], antialias=False)
    torch.testing.assert_close(whole(batch, 0, 0).images, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(whole.plain(batch).images, expected, atol=1e-4, rtol=0)


def test_a_homography_carries_its_corners():
    source = torch.tensor([[0, 0], [16, 0], [16, 11], [0, 11]]).double()
    target = source + torch.tensor([[3, 1], [-2, 4], [-5, -1], [0.5, -3]]).double()
    matrix = homography(source, torch.stack([target, source]))
    for i, expected in enumerate((target, source)):
        place = torch.cat([source, torch.ones(4, 1)], 1) @ matrix[i].T
        torch.testing.assert_close(place[:, :2] / place[:, 2:], expected)


def test_perspective_pulls_corners_inwards_as_far_as_it_says(make_batch):
    batch = make_batch(200, 1)
    item = Perspective(distortion=0.5, probability=1.0)
    matrix = Pipeline(DataSpec(1, 12, 17), {"tilt": item})(batch, 0, 0).source_to_image
    assert matrix is not None
    for x, y, inwards in ((0, 0, (1, 1)), (16, 0, (-1, 1)), (16, 11, (-1, -1)), (0, 11, (1, -1))):
        place = matrix @ torch.tensor([x, y, 1.0], dtype=torch.float64)
        pull = (
            (place[:, :2] / place[:, 2:] - torch.tensor([x, y]))
            * torch.tensor(inwards)
            / torch.tensor([8, 5.5])
        )
        assert pull.min() > -1e-9
        assert 0.48 < pull.max() < 0.5
