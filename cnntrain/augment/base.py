"""Base classes of augmentations: a geometric matrix, a color matrix, or an effect on pixel values.

An augmentation does not draw random numbers. It declares how many uniform numbers it needs per image
(`num_uniforms`) and turns a table of them, (N, num_uniforms) float64 on the CPU, into one matrix per image. The
pipeline draws the table, multiplies all matrices of an image and applies the product to the whole batch at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import inf, log

import torch
from torch import Tensor

from cnntrain.errors import UserError
from cnntrain.types import Size

Targets = dict[str, Tensor]  # see `Batch.targets`


class Augmentation(ABC):
    """Base class of all augmentations."""

    num_uniforms: int  # how many uniform random numbers in [0, 1) one image needs


class Geometry(Augmentation):
    """A geometric transform: one homogeneous 3x3 matrix per image, from input to output pixels.

    Coordinates are (x, y) at pixel centers: the center of the first pixel is 0, that of the last is W - 1.
    """

    can_flip: bool = False  # with the given settings, the matrix can have a negative determinant
    pixel_exact: bool = False  # the matrix only flips and shifts by whole pixels: no interpolation is needed

    @abstractmethod
    def matrix(self, uniforms: Tensor, height: int, width: int) -> Tensor:
        """Return (N, 3, 3) float64 matrices from uniforms (N, num_uniforms), for images of height x width pixels."""

    def eval_matrix(self, height: int, width: int) -> Tensor:
        """Return the (3, 3) float64 matrix for images that are not augmented; the identity by default."""
        return torch.eye(3, dtype=torch.float64)

    def output_size(self, height: int, width: int) -> Size:
        return height, width

    def magnification(self, height: int, width: int) -> float:
        """Return the largest number of output pixels per input pixel along one side, as declared by random crops."""
        return 1.0


class Color(Augmentation):
    """A color transform on the 0-1 scale: one 3x7 matrix [P | Q | p] per image.

    A color v becomes P v + Q m + p, where m is the mean color of the image before this transform. Only contrast uses
    m. The pixels are finally multiplied by one 3x4 matrix, because the mean is known by then.
    """

    uses_mean: bool = False  # Q can be nonzero with the given settings

    @abstractmethod
    def color_matrix(self, uniforms: Tensor) -> Tensor:
        """Return (N, 3, 7) float64 matrices from uniforms (N, num_uniforms)."""


class Effect(Augmentation):
    """A transform that is not a matrix. It acts on the normalized batch, after geometry and color."""

    mixes_labels: bool = False  # changes the labels together with the images (classification only)

    @abstractmethod
    def apply(self, images: Tensor, targets: Targets, uniforms: Tensor, std: Sequence[float]) -> tuple[Tensor, Targets]:
        """Return the new images and targets.

        Args:
            images: (N, C, H, W) float32, normalized. May be modified in place.
            targets: must not be modified in place.
            uniforms: (N, num_uniforms) float64 on the CPU.
            std: standard deviation per channel on the 0-1 scale: a difference of 1 there is 1 / std in `images`.
        """


def check_probability(value: float, owner: object, name: str = "probability") -> float:
    """Return `value` if it lies between 0 and 1."""
    if not 0.0 <= value <= 1.0:
        raise UserError(f"augment: {type(owner).__name__}: {name} must be between 0 and 1, got {value}")
    return float(value)


def check_range(
    value: float | Sequence[float],
    owner: object,
    name: str,
    center: float | None = None,
    minimum: float = -inf,
    maximum: float = inf,
) -> tuple[float, float]:
    """Return (low, high) from a pair, or from a number s that stands for `center` - s to `center` + s.

    The lower end of a range given by one number is clipped to `minimum`.
    """
    where = f"augment: {type(owner).__name__}: {name}"
    if isinstance(value, int | float):
        if center is None:
            raise UserError(f"{where} must be a pair [low, high], got {value}")
        if not value >= 0:
            raise UserError(f"{where} must be 0 or more, or a pair [low, high]; got {value}")
        low, high = max(center - value, minimum), center + value
    else:
        pair = list(value)
        if len(pair) != 2:
            raise UserError(f"{where} must be a number or a pair [low, high], got {pair}")
        low, high = pair
    if not minimum <= low <= high <= maximum:
        raise UserError(f"{where} must be ascending and between {minimum:g} and {maximum:g}, got {value}")
    return float(low), float(high)


def uniform_between(uniforms: Tensor, low: float, high: float) -> Tensor:
    """Map uniform numbers in [0, 1) to [low, high)."""
    return low + (high - low) * uniforms


def log_uniform_between(uniforms: Tensor, low: float, high: float) -> Tensor:
    """Map uniform numbers in [0, 1) to [low, high), uniformly on a logarithmic scale."""
    return torch.exp(uniform_between(uniforms, log(low), log(high)))
