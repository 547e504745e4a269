"""Any transform of torchvision v2, applied image by image where images are decoded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cnntrain.augment.base import Augmentation
from cnntrain.errors import UserError, suggest
from cnntrain.randomness import hash_seed

# They change colors and move no pixel: safe for keypoints and masks, which they don't know.
MOVES_NO_PIXEL = frozenset(
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
    """Names a class of torchvision.transforms.v2; the streaming path applies it to each uint8 image (C, H,
    W).

    Its draws are seeded by (seed, epoch, position, YAML key), like all others.

    Args:
        name: of the class, as in `RandomAutocontrast`.
        arguments: its keyword arguments.

    Raises:
        UserError: no such transform, or arguments that it does not take.
    """

    draws = 0

    def __init__(self, *, name: str, arguments: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.arguments = dict(arguments or {})
        self.moves_pixels = name not in MOVES_NO_PIXEL
        self._transform = self._build()

    def _build(self) -> Any:
        from torchvision.transforms import v2

        known = {
            name: item
            for name, item in vars(v2).items()
            if isinstance(item, type) and issubclass(item, v2.Transform) and item is not v2.Transform
        }
        made = known.get(self.name)
        if made is None:
            near = suggest(self.name, sorted(known))
            raise UserError(f"augment: {self.name!r} is no transform of torchvision.transforms.v2{near}")
        try:
            return made(**self.arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"augment: torchvision's {self.name}({self.arguments}): {error}") from error

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """`image` (C, H, W) uint8 -> the same shape and type; draws from `seed` alone.

        Raises:
            UserError: the transform changed the image's shape or type.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            result = self._transform(image)
        if not isinstance(result, Tensor) or result.shape != image.shape or result.dtype != torch.uint8:
            got = (
                f"{tuple(result.shape)} {result.dtype}"
                if isinstance(result, Tensor)
                else type(result).__name__
            )
            raise UserError(
                f"augment: torchvision's {self.name} made {got} of an image {tuple(image.shape)} uint8; "
                f"only transforms that keep shape and type can be named here"
            )
        return result


class SampleTransform:
    """All per-sample transforms of one epoch; pickles, so that worker processes can have it."""

    def __init__(self, transforms: Mapping[str, TorchvisionTransform], seed: int, epoch: int) -> None:
        self.transforms = dict(transforms)
        self.seed = seed
        self.epoch = epoch

    def __call__(self, image: Tensor, position: int) -> Tensor:
        """`image` (C, H, W) uint8, `position` in the epoch -> (C, H, W) uint8."""
        for key, transform in self.transforms.items():
            image = transform(image, hash_seed(self.seed, self.epoch, position, key))
        return image
