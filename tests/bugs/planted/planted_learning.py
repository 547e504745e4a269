"""Data whose targets do not belong to their images, and networks that are not reproducible."""

from collections.abc import Sequence

import numpy as np
import torch
from broken import Sound
from torch import Tensor, nn

from cnntrain.data.examples import Examples
from cnntrain.data.sources.digits import Digits
from cnntrain.data.sources.toys import ToyFaces, ToyShapes

Splits = dict[str, Examples]


def reordered(examples: Examples, order: Tensor) -> Examples:
    """Images in the original order, targets in another."""
    targets = {name: target[order] for name, target in examples.targets.items()}
    return Examples(examples.images, targets, examples.names, examples.groups, examples.source_to_image)


def shuffled(examples: Examples) -> Examples:
    return reordered(examples, torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)))


class ShuffledLabels(Digits):
    def load(self) -> Splits:
        return {name: shuffled(part) for name, part in super().load().items()}


class LabelsOfAnother(Digits):
    """Each image has the label of the one `rows` further on, as if a table had an extra line."""

    def __init__(self, rows: int = 700) -> None:
        self.rows = rows

    def load(self) -> Splits:
        return {name: reordered(part, torch.arange(len(part)).roll(self.rows)) for name, part in super().load().items()}


class ValidationOfAnother(Digits):
    """The test set serves as validation, with shuffled labels; training is sound."""

    def load(self) -> Splits:
        splits = super().load()
        return {"train": splits["train"], "val": shuffled(splits["test"])}


class PointsOfAnother(ToyFaces):
    def load(self) -> Splits:
        splits = super().load()
        return {name: reordered(part, torch.arange(len(part)).roll(1)) for name, part in splits.items()}


class MasksOfAnother(ToyShapes):
    def load(self) -> Splits:
        splits = super().load()
        return {name: reordered(part, torch.arange(len(part)).roll(1)) for name, part in splits.items()}


class Noise(Digits):
    """Every image is noise."""

    def load(self) -> Splits:
        random = np.random.default_rng(0)
        splits = super().load()
        for name, part in splits.items():
            pixels = random.integers(0, 256, tuple(part.images.shape), dtype=np.uint8)
            splits[name] = Examples(torch.from_numpy(pixels), part.targets, part.names)
        return splits


class MeanImages(Digits):
    """Every image is the mean image."""

    def load(self) -> Splits:
        splits = super().load()
        for name, part in splits.items():
            mean = torch.as_tensor(part.images).float().mean(0).to(torch.uint8)
            splits[name] = Examples(mean.expand_as(part.images).clone(), part.targets, part.names)
        return splits


class ForgetsOnReload(Sound):
    """A running mean in a plain attribute: training changes it, and no checkpoint contains it."""

    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__(in_channels, num_outputs)
        self.mean = 0.0

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * float(self.first(images).mean())
        return super().forward(images + self.mean)


class UnknownKeys(Sound):
    """Creates a layer in the first training step, which a new network does not have."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training and not hasattr(self, "late"):
            self.late = nn.Linear(1, 1)
        return super().forward(images)


class DrawsFromNumpy(Sound):
    """Custom dropout with NumPy's generator, which is not seeded."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            images = images * float(np.random.default_rng().uniform(0.5, 1.5))
        return super().forward(images)


class Overflows(Sound):
    """Small differences of large numbers, which 16 bits cannot represent."""

    def features(self, images: Tensor) -> Tensor:
        large = self.first(images) + 1000.0
        x = torch.relu((large.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else large).float() - 1000.0)
        return nn.functional.adaptive_max_pool2d(torch.relu(self.second(x)), 2).flatten(1)


class ReadsMemory(Sound):
    """Reads the values in their order in memory."""

    def features(self, images: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(images))))
        pooled = nn.functional.adaptive_max_pool2d(x, 2)
        count: Sequence[int] = (len(x), pooled[0].numel())
        return torch.as_strided(pooled, count, (count[1], 1))


class SlowNorm(nn.Module):
    """A custom batch norm that does not update its running variance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("variance", torch.full((1, channels, 1, 1), 100.0))
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True)
            self.mean.lerp_(mean.detach(), 0.1)
        else:
            mean, variance = self.mean, self.variance
        return self.weight * (x - mean) / (variance + 1e-5).sqrt()


class OwnNorm(Sound):
    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__(in_channels, num_outputs)
        self.norm = SlowNorm(16)
        self.second_norm = SlowNorm(32)

    def features(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(images)))
        x = torch.relu(self.second_norm(self.second(x)))
        return nn.functional.adaptive_max_pool2d(x, 2).flatten(1)
