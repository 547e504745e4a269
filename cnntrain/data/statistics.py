"""Mean and standard deviation of training images, for normalising."""

import torch

from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.resident import decode
from cnntrain.randomness import hash_seed

SAMPLED_IMAGES = 2000  # when they are not in memory; the mean is then good to about 1/200


def measure(examples: Examples, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation over all pixels, on the 0-1 scale.

    Exact for decoded images, from 2,000 drawn by `seed` where they stay on disk. A channel that never changes
    gets the standard deviation 1.
    """
    if isinstance(examples.images, LazyImages):
        generator = torch.Generator().manual_seed(hash_seed(seed, "statistics"))
        rows = torch.randperm(len(examples), generator=generator)[:SAMPLED_IMAGES].sort().values
        sample = examples.subset(rows)
        sample.lazy_targets = {}
        examples = decode({"train": sample})["train"]
    assert isinstance(examples.images, torch.Tensor)
    channels = examples.images.shape[1]
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for chunk in examples.images.split(4096):
        for channel in range(channels):
            counts[channel] += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).clamp_min(0).sqrt()
    std[(counts > 0).sum(1) == 1] = 1.0
    return tuple(mean.tolist()), tuple(std.tolist())
