"""Transforms of torchvision v2, applied to single images where they are decoded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cnntrain.augment.base import Augmentation
from cnntrain.errors import UserError, suggest
from cnntrain.randomness import hash_seed

# They change colors and move no pixel, so that keypoints and masks stay valid.
COLOR_ONLY = frozenset(
    (
        "ColorJitter",
        "GaussianBlur",
        "GaussianNoise",
        "Grayscale",
        "Identity",
        "JPEG",
        "RandomAdjustSharpness",
        "RandomAutocontrast",
        "RandomChannelPermutation",
        "RandomEqualize",
        "RandomGrayscale",
        "RandomInvert",
        "RandomPhotometricDistort",
        "RandomPosterize",
        "RandomSolarize",
    )
)


class TorchvisionTransform(Augmentation):
    """A class of torchvision.transforms.v2, applied by the loader to each decoded uint8 image (C, H, W).

    Its random numbers are seeded by (seed, epoch, position, YAML key), like those of all augmentations.

    Args:
        name: name of the class, for example `RandomAutocontrast`.
        arguments: keyword arguments of the class.

    Attributes:
        moves_pixels: whether it may move pixels.

    Raises:
        UserError: there is no such transform, or it does not accept the arguments.
    """

    num_uniforms = 0

    def __init__(self, *, name: str, arguments: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.arguments = dict(arguments or {})
        self.moves_pixels = name not in COLOR_ONLY
        self._transform = self._build()

    def _build(self) -> Any:
        from torchvision.transforms import v2

        classes = {
            name: item
            for name, item in vars(v2).items()
            if isinstance(item, type) and issubclass(item, v2.Transform) and item is not v2.Transform
        }
        if self.name not in classes:
            hint = suggest(self.name, sorted(classes))
            raise UserError(f"augment: {self.name!r} is not a transform of torchvision.transforms.v2{hint}")
        try:
            return classes[self.name](**self.arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"augment: torchvision's {self.name}({self.arguments}): {error}") from error

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Transform `image` (C, H, W) uint8, with random numbers from `seed` alone.

        Raises:
            UserError: the shape or type of the image changed.
        """
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


class SampleTransform:
    """All per-sample transforms of one epoch. Can be pickled for worker processes."""

    def __init__(self, transforms: Mapping[str, TorchvisionTransform], seed: int, epoch: int) -> None:
        self.transforms = dict(transforms)
        self.seed = seed
        self.epoch = epoch

    def __call__(self, image: Tensor, position: int) -> Tensor:
        """Transform `image` (C, H, W) uint8 at `position` in the epoch."""
        for key, transform in self.transforms.items():
            image = transform(image, hash_seed(self.seed, self.epoch, position, key))
        return image
