"""Erasing, blur, noise and mixing."""

import pytest
import torch

from cnntrain.augment.effects import (
    CutMix,
    GaussianBlur,
    GaussianNoise,
    MixUp,
    MixUpCutMix,
    RandomErasing,
    beta_quantile,
    gaussian_blur,
    normal_noise,
)
from cnntrain.augment.pipeline import Pipeline
from cnntrain.errors import UserError
from cnntrain.types import Batch, DataSpec

SPEC = DataSpec(3, 24, 32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.4))


def many(make_batch, count=200):
    return make_batch(count, height=24, width=32)


def test_erasing_fills_one_box_with_the_mean(make_batch):
    batch = many(make_batch)
    plain = Pipeline(SPEC, {}).eval_transform(batch).images
    result = Pipeline(SPEC, {"e": RandomErasing(scale=(0.1, 0.3), ratio=(0.5, 2.0), probability=0.6)})(batch, 1, 0)
    changed = (result.images != plain).any(1)  # (N, H, W)
    erased = changed.any(2).any(1)
    assert 0.5 < erased.float().mean() < 0.7
    for i in erased.nonzero()[:, 0]:
        rows, columns = changed[i].any(1).nonzero(), changed[i].any(0).nonzero()
        box = result.images[i, :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box == 0).all()
        assert 0.07 < box[0].numel() / (24 * 32) < 0.35


def test_blur_equals_torchvision(make_batch):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = many(make_batch, 6).images.float()
    sigma = torch.tensor([[0.0, 0.0], [0.3, 0.3], [0.7, 1.5], [1.5, 0.0], [2.0, 2.0], [1.0, 0.5]])
    result = gaussian_blur(images, sigma)
    for i in range(6):
        x, y = (max(float(value), 1e-3) for value in sigma[i])
        size = [2 * int(torch.ceil(3 * value)) + 1 for value in sigma[i]]
        expected = functional.gaussian_blur(images[i], size, [x, y])
        torch.testing.assert_close(result[i], expected, atol=2e-2, rtol=0)


def test_blur_changes_only_chosen_images(make_batch):
    batch = many(make_batch)
    plain = Pipeline(SPEC, {}).eval_transform(batch).images
    result = Pipeline(SPEC, {"b": GaussianBlur(sigma_px=(1.0, 2.0), probability=0.3)})(batch, 1, 0).images
    same = (result == plain).flatten(1).all(1)
    assert 0.6 < same.float().mean() < 0.8
    rough, smooth = ((x[~same][..., 1:] - x[~same][..., :-1]).abs().mean() for x in (plain, result))
    assert smooth < 0.5 * rough


def test_noise_is_normal_with_its_strength_on_the_0_1_scale(make_batch):
    batch = many(make_batch, 20)
    plain = Pipeline(SPEC, {}).eval_transform(batch).images
    result = Pipeline(SPEC, {"n": GaussianNoise(strength=(0.1, 0.1), probability=1.0)})(batch, 1, 0).images
    noise = result - plain
    for channel, std in enumerate(SPEC.std or ()):
        assert float(noise[:, channel].mean()) == pytest.approx(0, abs=0.02)
        assert float(noise[:, channel].std()) * std == pytest.approx(0.1, rel=0.03)


def test_normal_noise_is_white():
    field = normal_noise(torch.tensor([0, 1, 2**31, 2**32 - 1]), 40_000)
    assert field.isfinite().all()
    assert field.mean(1).abs().max() < 0.02
    assert (field.std(1) - 1).abs().max() < 0.02
    assert ((field**4).mean(1) - 3).abs().max() < 0.25  # a normal distribution's fourth moment
    lagged = torch.stack([(field[:, lag:] * field[:, :-lag]).mean(1) for lag in (1, 2, 3, 32, 1024)])
    assert lagged.abs().max() < 0.025
    assert (torch.corrcoef(field) - torch.eye(4)).abs().max() < 0.025


def test_normal_noise_is_finite():
    """This key's first word is the largest there is, one of 2**32."""
    assert 5 < normal_noise(torch.tensor([2882873903]), 1).abs().item() < 6


@pytest.mark.parametrize(
    "item", [MixUp(alpha=0.4), CutMix(), MixUpCutMix(alpha=0.8, cutmix_share=0.5, probability=0.7)]
)
def test_mixing_weights_images_and_labels_equally(make_batch, item):
    """Images that are one flat color each: what is in the image says what the weight must be."""
    count = 64
    batch = many(make_batch, count)
    batch.images[:] = (torch.arange(count) * 3).to(torch.uint8)[:, None, None, None]
    spec = DataSpec(3, 24, 32)
    result = Pipeline(spec, {"m": item})(batch, 1, 0)
    labels, mix = result.targets["label_b"], result.targets["mix"]
    assert torch.equal(labels, batch.targets["label"].roll(1))
    assert torch.equal(result.targets["label"], batch.targets["label"])
    own = batch.images[:, 0, 0, 0].float() / 255
    expected = mix * own + (1 - mix) * own.roll(1)
    torch.testing.assert_close(result.images.mean((1, 2, 3)), expected, atol=1e-5, rtol=0)
    assert ((mix >= 0) & (mix <= 1)).all()
    assert (mix < 0.999).sum() > 15
    if isinstance(item, MixUp):
        assert (result.images.flatten(1).std(1) < 1e-6).all()
    if isinstance(item, CutMix):
        values = torch.stack([(image.unsqueeze(-1) - own).abs().amin(-1).amax() for image in result.images])
        assert (values < 1e-6).all()  # every pixel is somebody's


def test_mixing_without_labels_raises(make_batch):
    batch = make_batch(2)
    mask = {"mask": torch.zeros(2, 12, 17, dtype=torch.uint8)}
    with pytest.raises(UserError, match="mixup and cutmix"):
        Pipeline(DataSpec(3, 12, 17), {"m": MixUp()})(Batch(batch.images, mask, batch.index, batch.position), 0, 0)


def test_beta_quantile():
    draws = torch.linspace(0, 0.999, 999, dtype=torch.float64)
    for alpha in (0.2, 1.0, 3.0):
        values = beta_quantile(draws, alpha)
        assert (values.diff() >= 0).all()
        variance = 1 / (4 * (2 * alpha + 1))
        assert float(values.var()) == pytest.approx(variance, rel=0.02)
