"""Transforms of torchvision v2, applied to single images where they are decoded."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cnntrain.augment.base import Augmentation
from cnntrain.errors import UserError, suggest
from cnntrain.randomness import hash_seed

# Transforms that change colors but move no pixels, so that keypoints and masks stay valid.
COLOR_ONLY = frozenset(
    "ColorJitter GaussianBlur GaussianNoise Grayscale Identity JPEG RandomAdjustSharpness RandomAutocontrast "
    "RandomChannelPermutation RandomEqualize RandomGrayscale RandomInvert RandomPhotometricDistort RandomPosterize "
    "RandomSolarize".split()
)


class TorchvisionTransform(Augmentation):
    """A class of torchvision.transforms.v2, applied by the loader to each decoded uint8 image (C, H, W).

    Its random numbers are seeded by (seed, epoch, position, YAML key), like those of all augmentations.

    Args:
        name: name of the class, for example `RandomAutocontrast`.
        arguments: keyword arguments of the class.

    Attributes:
        moves_pixels: whether it may move pixels.
    """

    num_uniforms = 0

    def __init__(self, *, name: str, arguments: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.arguments = dict(arguments or {})
        self.moves_pixels = name not in COLOR_ONLY
        from torchvision.transforms import v2  # slow to import

        classes = {
            key: item
            for key, item in vars(v2).items()
            if inspect.isclass(item) and issubclass(item, v2.Transform) and item is not v2.Transform
        }
        if name not in classes:
            hint = suggest(name, sorted(classes))
            raise UserError(f"augment: {name!r} is not a transform of torchvision.transforms.v2{hint}")
        try:
            self._transform = classes[name](**self.arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"augment: torchvision's {name}({self.arguments}): {error}") from error

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Transform `image` (C, H, W) uint8 with random numbers from `seed` alone; shape and type must not change."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            result = self._transform(image)
        if not isinstance(result, Tensor) or result.shape != image.shape or result.dtype != torch.uint8:
            is_tensor = isinstance(result, Tensor)
            got = f"{tuple(result.shape)} {result.dtype}" if is_tensor else type(result).__name__
            raise UserError(
                f"augment: torchvision's {self.name} turned an image {tuple(image.shape)} uint8 into {got}; only "
                "transforms that keep shape and type are supported"
            )
        return result


def transform_sample(
    transforms: Mapping[str, TorchvisionTransform], seed: int, epoch: int, image: Tensor, position: int
) -> Tensor:
    """Apply all transforms to `image` (C, H, W) uint8 at `position` in the epoch."""
    for key, transform in transforms.items():
        image = transform(image, hash_seed(seed, epoch, position, key))
    return image
