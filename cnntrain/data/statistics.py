"""Mean and standard deviation of training images, for normalising."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cnntrain.data.examples import Examples
from cnntrain.data.resident import decode
from cnntrain.randomness import hash_seed

SAMPLED_IMAGES = 2000  # when they are not in memory; the mean is then good to about 1/200
AT_ONCE = 2**24  # numbers that are looked at together: large sets are mapped from files, and stay there


def measure(examples: Examples, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation over all pixels, on the 0-1 scale.

    Exact for decoded images, from 2,000 drawn by `seed` where they stay on disk. A channel that never changes
    gets the standard deviation 1.
    """
    channels = examples.images.shape[1]
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for images in _parts(examples, seed):
        for channel in range(channels):
            counts[channel] += torch.bincount(images[:, channel].flatten(), minlength=256)
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).clamp_min(0).sqrt()
    std[(counts > 0).sum(1) == 1] = 1.0
    return tuple(mean.tolist()), tuple(std.tolist())


def _parts(examples: Examples, seed: int) -> Iterator[Tensor]:
    """The images, or the sample of those on disk, a few at a time."""
    several = max(1, AT_ONCE // math.prod(examples.images.shape[1:]))
    if isinstance(examples.images, Tensor):
        yield from examples.images.split(several)
        return
    generator = torch.Generator().manual_seed(hash_seed(seed, "statistics"))
    rows = torch.randperm(len(examples), generator=generator)[:SAMPLED_IMAGES].sort().values
    for part in rows.split(several):
        decoded = decode({"train": replace(examples, lazy_targets={}).subset(part)})["train"].images
        assert isinstance(decoded, Tensor)
        yield decoded
