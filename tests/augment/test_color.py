"""Color augmentations against torchvision's functions and a sequence in float64."""

import itertools
import random

import pytest
import torch

from cnntrain.augment.color import (
    YIQ,
    Brightness,
    ColorJitter,
    Contrast,
    Grayscale,
    Hue,
    Invert,
    Saturation,
    multiply_channels,
)
from cnntrain.augment.geometry import Crop
from cnntrain.augment.pipeline import Pipeline
from cnntrain.randomness import uniform
from cnntrain.types import DataSpec

functional = pytest.importorskip("torchvision.transforms.v2.functional")

SEED, EPOCH = 7, 3
SPEC = DataSpec(3, 12, 17)


def draw(batch, key, item):
    return uniform(SEED, EPOCH, batch.position, key, item.num_uniforms)


@pytest.mark.parametrize(
    ("item", "function"),
    [
        (Brightness(strength=0.6), functional.adjust_brightness),
        (Contrast(strength=0.9), functional.adjust_contrast),
        (Saturation(strength=0.9), functional.adjust_saturation),
    ],
    ids=["brightness", "contrast", "saturation"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_blends_agree_with_torchvision(make_batch, item, function, channels):
    batch = make_batch(24, channels=channels)
    result = Pipeline(DataSpec(channels, 12, 17), {"it": item})(batch, SEED, EPOCH).images
    factors = item.factor[0] + (item.factor[1] - item.factor[0]) * draw(batch, "it", item)[:, 1]
    for i, image in enumerate(batch.images):
        expected = function(image.float() / 255, float(factors[i]))
        torch.testing.assert_close(result[i], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", [Brightness, Contrast, Saturation, Hue])
def test_probability_and_strength_are_independent(make_batch, kind):
    batch = make_batch(300, height=4, width=5)
    spec = DataSpec(3, 4, 5)
    plain = Pipeline(spec, {}).eval_transform(batch).images
    always, sometimes = (
        Pipeline(spec, {"it": kind(strength=0.3, probability=p)})(batch, SEED, EPOCH).images for p in (1.0, 0.4)
    )
    chosen = draw(batch, "it", kind())[:, 0] < 0.4
    assert torch.equal(sometimes[chosen], always[chosen])
    torch.testing.assert_close(sometimes[~chosen], plain[~chosen], atol=1e-6, rtol=0)
    strength = draw(batch, "it", kind())[:, 1]
    assert abs(float(strength[chosen].mean()) - 0.5) < 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_grayscale_and_invert_agree_with_torchvision(make_batch, channels):
    batch = make_batch(24, channels=channels)
    spec = DataSpec(channels, 12, 17)
    for item, function in ((Grayscale(probability=0.5), None), (Invert(probability=0.5), functional.invert)):
        result = Pipeline(spec, {"it": item})(batch, SEED, EPOCH).images
        chosen = draw(batch, "it", item)[:, 0] < 0.5
        assert chosen.any()
        assert not chosen.all()
        for i, image in enumerate(batch.images.float() / 255):
            if chosen[i] and function is None:
                expected = functional.rgb_to_grayscale(image, channels) if channels == 3 else image
            else:
                expected = function(image) if chosen[i] else image
            torch.testing.assert_close(result[i], expected, atol=1e-3, rtol=0)


def test_composed_matrices_equal_the_float64_sequence_clamped_once(make_batch):
    """In any order, each contrast about a mean gray of its own, after a crop that shows black."""
    batch = make_batch(4)
    makers = {
        "brightness": Brightness(strength=0.9),
        "contrast": Contrast(strength=0.9),
        "saturation": Saturation(strength=0.9),
        "contrast again": Contrast(strength=0.9),
        "hue": Hue(strength=0.5),
        "invert": Invert(probability=0.5),
    }
    crop = Crop(padding=4)
    cropped = Pipeline(SPEC, {"crop": crop})(batch, SEED, EPOCH).images.double()
    luma = YIQ[0][:, None, None]
    values = {key: draw(batch, key, item) for key, item in makers.items()}
    # All 720 orders would take long; a hundred hold every pair in both orders.
    for order in random.Random(0).sample(list(itertools.permutations(makers)), 100):
        result = Pipeline(SPEC, {"crop": crop} | {key: makers[key] for key in order})(batch, SEED, EPOCH)
        for i, image in enumerate(cropped):
            for key in order:
                gray = (luma * image).sum(0, keepdim=True)
                if key == "invert":
                    image = 1 - image if values[key][i, 0] < 0.5 else image
                elif key == "hue":
                    image = rotate_hue_by_angle(image, float(values[key][i, 1]) - 0.5)
                else:
                    factor = 0.1 + 1.8 * values[key][i, 1]
                    other = {"brightness": 0.0, "contrast": gray.mean(), "saturation": gray}[key.removesuffix(" again")]
                    image = factor * image + (1 - factor) * other
            torch.testing.assert_close(result.images[i].double(), image.clamp(0, 1), atol=2e-5, rtol=0, msg=str(order))


def rotate_hue_by_angle(image, turns):
    """A reference of its own: polar coordinates in the I-Q plane, image (3, H, W) float64."""
    luma, in_phase, quadrature = torch.einsum("ij,jhw->ihw", YIQ, image)
    radius, angle = torch.hypot(in_phase, quadrature), torch.atan2(quadrature, in_phase)
    angle = angle - 2 * torch.pi * turns
    turned = torch.stack([luma, radius * torch.cos(angle), radius * torch.sin(angle)])
    return torch.einsum("ij,jhw->ihw", torch.linalg.inv(YIQ), turned)


def test_hue_rotates_red_towards_yellow_like_torchvision(make_batch):
    item = Hue(strength=(0.1, 0.1))
    batch = make_batch(1)
    batch.images[:] = torch.tensor([180, 100, 100])[:, None, None]
    mine = Pipeline(SPEC, {"hue": item})(batch, SEED, EPOCH).images[0, :, 0, 0]
    theirs = functional.adjust_hue(batch.images[0].float() / 255, 0.1)[:, 0, 0]
    assert mine[1] > 100 / 255 + 0.03
    assert theirs[1] > 100 / 255 + 0.03
    # The luma stays, which HSV's does not.
    before = batch.images[0, :, 0, 0].double() / 255
    assert float(YIQ[0] @ mine.double()) == pytest.approx(float(YIQ[0] @ before), abs=1e-6)


def test_color_jitter_equals_its_parts_in_order(make_batch):
    batch = make_batch(16)
    jitter = ColorJitter(brightness=0.3, contrast=0.5, saturation=0.7, hue=0.2, probability=0.8)
    whole = draw(batch, "jitter", jitter)
    result = Pipeline(SPEC, {"jitter": jitter})(batch, SEED, EPOCH).images
    for i in range(16):
        parts = {}
        if whole[i, 0] < 0.8:
            factors = [1 + s * (2 * float(whole[i, c]) - 1) for c, s in ((1, 0.3), (2, 0.5), (3, 0.7))]
            turns = 0.2 * (2 * float(whole[i, 4]) - 1)
            kinds = (Brightness, Contrast, Saturation)
            parts = {k.__name__: k(strength=(f, f)) for k, f in zip(kinds, factors, strict=True)}
            parts["hue"] = Hue(strength=(turns, turns))
        expected = Pipeline(SPEC, parts)(batch, SEED, EPOCH).images[i]
        torch.testing.assert_close(result[i], expected, atol=1e-5, rtol=0)


def test_images_are_clamped_before_normalization(make_batch):
    batch = make_batch(8)
    mean, std = (0.5, 0.4, 0.1), (0.2, 0.3, 0.25)
    items = {"brightness": Brightness(strength=(3.0, 3.0))}
    plain = Pipeline(SPEC, items)(batch, SEED, EPOCH).images
    assert float(plain.max()) == 1.0
    normalized = Pipeline(SPEC.with_statistics(mean, std), items)(batch, SEED, EPOCH).images
    expected = functional.normalize(plain, list(mean), list(std))
    torch.testing.assert_close(normalized, expected, atol=1e-5, rtol=0)
    only = Pipeline(SPEC.with_statistics(mean, std), {}).eval_transform(batch).images
    expected = functional.normalize(batch.images.float() / 255, list(mean), list(std))
    torch.testing.assert_close(only, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_multiply_channels_equals_the_matrix_product(channels):
    values, matrix, offset = (
        torch.rand(4, channels, 50),
        torch.randn(4, channels, channels),
        torch.randn(4, channels, 1),
    )
    torch.testing.assert_close(multiply_channels(values, matrix, offset), torch.baddbmm(offset, matrix, values))
