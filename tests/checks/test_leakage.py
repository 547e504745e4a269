"""Near duplicates: copies that were saved again, resized or flipped, but not different images of the same kind."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cnntrain.checks.leakage import difference_hashes, near_duplicates, near_hashes
from cnntrain.data.sources.digits import Digits


def scenes(count: int, seed: int, side: int = 48) -> Tensor:
    """(N, 3, side, side) uint8 all different, with structure at every scale."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None]).clip(1 / side)
    noise = np.fft.ifft2(np.fft.fft2(random.standard_normal((count, 3, side, side))) / frequency**1.5).real
    noise[:] = noise[:, :1] + 0.15 * noise  # mostly brightness, as in photographs
    scaled = 127 + 45 * noise / noise.std((1, 2, 3), keepdims=True)
    return torch.from_numpy(scaled.clip(0, 255).astype(np.uint8))


def saved_again(image: Tensor, quality: int, scale: float, flipped: bool) -> Tensor:
    copied = Image.fromarray(image.permute(1, 2, 0).numpy())
    side = round(copied.width * scale)
    copied = copied.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else copied
    file = io.BytesIO()
    copied.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    again = Image.open(file).resize(image.shape[:0:-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(again).transpose(2, 0, 1))


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(("quality", "scale"), [(90, 1.0), (60, 1.5), (40, 2.0)])
def test_copies_that_were_saved_again_are_found(quality: int, scale: float, flipped: bool) -> None:
    train, others = scenes(150, seed=0), scenes(50, seed=1)
    copies = torch.stack([saved_again(image, quality, scale, flipped) for image in train[:50]])
    found = near_duplicates(torch.cat([others, copies]), train, difference_hashes(train))
    assert all(k == i - 50 for i, k in found.items())
    assert len(found) >= (35 if flipped else 48)  # the limits are stricter for flipped ones


def test_hashes_that_differ_in_a_few_bits_are_paired() -> None:
    random = np.random.default_rng(0)
    train = random.integers(0, 2**63, 500, dtype=np.uint64)
    hashes = train[random.integers(0, 500, 70)]
    for _ in range(5):
        flips = np.uint64(1) << random.integers(0, 64, 70, dtype=np.uint64)
        hashes = np.where(random.random(70) < 0.8, hashes ^ flips, hashes)
    expected = {(i, k) for i in range(70) for k in range(500) if (int(hashes[i]) ^ int(train[k])).bit_count() <= 4}
    assert {tuple(pair) for pair in near_hashes(hashes, train).tolist()} == expected and len(expected) > 30
    assert len(near_hashes(hashes[:0], train)) == 0 and len(near_hashes(hashes, train[:0])) == 0


def test_all_of_a_large_training_set_is_compared() -> None:
    random = np.random.default_rng(0)
    train = random.integers(0, 2**63, 40_000, dtype=np.uint64)
    rows = [0, 16_383, 16_384, 32_768, 39_999]
    assert near_hashes(train[rows], train).tolist() == [[i, k] for i, k in enumerate(rows)]


def test_the_nearest_of_many_candidates_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnntrain.checks.leakage.CANDIDATES", 3)
    train = np.array([1, 3, 7, 15, 0, 0], dtype=np.uint64)
    assert near_hashes(np.array([0, 1], dtype=np.uint64), train).tolist() == [
        *([0, 4], [0, 5], [0, 0]),
        *([1, 0], [1, 1], [1, 4]),
    ]


def test_different_digits_and_clothes_are_no_duplicates(shared_data) -> None:
    digits = Digits().load()["train"].images
    assert isinstance(digits, Tensor)
    raw = np.fromfile(shared_data / "FashionMNIST/raw/train-images-idx3-ubyte", np.uint8, 784 * 3000, offset=16)
    clothes = torch.from_numpy(raw.reshape(3000, 1, 28, 28))
    for images, split in ((digits, 1400), (clothes, 2000)):
        found = near_duplicates(images[split:], images[:split], difference_hashes(images[:split]))
        assert len(found) <= 0.01 * (len(images) - split)
