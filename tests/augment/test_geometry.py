"""Geometric augmentations against torchvision's functions applied image by image with the same random numbers."""

import pytest
import torch

from cnntrain.augment.geometry import (
    Crop,
    HorizontalFlip,
    Perspective,
    RandomResizedCrop,
    Shift,
    VerticalFlip,
    homography,
)
from cnntrain.augment.pipeline import Pipeline
from cnntrain.randomness import uniform
from cnntrain.types import DataSpec

functional = pytest.importorskip("torchvision.transforms.v2.functional")

SEED, EPOCH = 7, 3
SPEC = DataSpec(3, 12, 17)


def draw(batch, key, item):
    return uniform(SEED, EPOCH, batch.position, key, item.num_uniforms)


def to_bytes(images):
    return (images * 255).round().to(torch.uint8)


@pytest.mark.parametrize("border", ["zero", "edge", "reflect"])
def test_flips_and_crop_are_exact(make_batch, border):
    batch = make_batch(32)
    items = {"flip": HorizontalFlip(), "up": VerticalFlip(probability=0.4), "crop": Crop(padding=3)}
    result = to_bytes(Pipeline(SPEC, items, border)(batch, SEED, EPOCH).images)
    flip, up = (draw(batch, key, items[key])[:, 0] for key in ("flip", "up"))
    window = draw(batch, "crop", items["crop"])
    mode = {"zero": "constant", "edge": "edge", "reflect": "reflect"}[border]
    seen = set()
    for i, image in enumerate(batch.images):
        if flip[i] < 0.5:
            image = functional.horizontal_flip(image)
        if up[i] < 0.4:
            image = functional.vertical_flip(image)
        left, top = int(window[i, 0] * 7), int(window[i, 1] * 7)
        seen |= {("x", left), ("y", top)}
        image = functional.crop(functional.pad(image, [3], padding_mode=mode), top, left, 12, 17)
        assert torch.equal(result[i], image)
    assert seen >= {("x", 0), ("x", 6), ("y", 0), ("y", 6)}  # the extremes were among them


def test_crop_of_another_size_and_shift_are_exact(make_batch):
    batch = make_batch(32)
    items = {"crop": Crop(size=(10, 9), padding=1), "shift": Shift(pixels=2)}
    pipeline = Pipeline(SPEC, items)
    result = to_bytes(pipeline(batch, SEED, EPOCH).images)
    window = draw(batch, "crop", items["crop"])
    shift = (draw(batch, "shift", items["shift"]) * 5).long() - 2
    for i, image in enumerate(batch.images):
        left, top = int(window[i, 0] * 11) - 1, int(window[i, 1] * 5) - 1
        # One move: the shift brings in what the window alone had cut off.
        image = functional.crop(image, top - int(shift[i, 1]), left - int(shift[i, 0]), 10, 9)
        assert torch.equal(result[i], image)
    assert pipeline.output_size == (10, 9)
    assert torch.equal(to_bytes(pipeline.eval_transform(batch).images), batch.images[:, :, 1:11, 4:13])


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
    whole = Pipeline(DataSpec(3, 20, 20), {"it": RandomResizedCrop(size=26, scale=(1, 1), ratio=(1, 1))}, "edge")
    expected = functional.resize(batch.images.float() / 255, [26, 26], antialias=False)
    torch.testing.assert_close(whole(batch, 0, 0).images, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(whole.eval_transform(batch).images, expected, atol=1e-4, rtol=0)


def test_homography_maps_its_corners():
    source = torch.tensor([[0, 0], [16, 0], [16, 11], [0, 11]]).double()
    target = source + torch.tensor([[3, 1], [-2, 4], [-5, -1], [0.5, -3]]).double()
    matrix = homography(source, torch.stack([target, source]))
    for i, expected in enumerate((target, source)):
        place = torch.cat([source, torch.ones(4, 1)], 1) @ matrix[i].T
        torch.testing.assert_close(place[:, :2] / place[:, 2:], expected)


def test_perspective_moves_corners_inwards_up_to_its_distortion(make_batch):
    batch = make_batch(200, 1)
    item = Perspective(distortion=0.5, probability=1.0)
    matrix = Pipeline(DataSpec(1, 12, 17), {"tilt": item})(batch, 0, 0).source_to_image
    assert matrix is not None
    for x, y, inwards in ((0, 0, (1, 1)), (16, 0, (-1, 1)), (16, 11, (-1, -1)), (0, 11, (1, -1))):
        place = matrix @ torch.tensor([x, y, 1.0], dtype=torch.float64)
        pull = (place[:, :2] / place[:, 2:] - torch.tensor([x, y])) * torch.tensor(inwards) / torch.tensor([8, 5.5])
        assert pull.min() > -1e-9
        assert 0.48 < pull.max() < 0.5
