"""What an augmentation is: a matrix over places, a matrix over colors, or (where neither will do) an effect.

Each class draws nothing itself. It states how many uniform numbers an image needs (`draws`) and turns a table
of them, (N, draws) float64 on the CPU, into matrices; the pipeline draws the table, a function of the image's
position in the epoch and of the YAML key, and applies the product of all matrices to the whole batch at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cnntrain.errors import UserError


class Augmentation(ABC):
    """Base of all: `draws` is how many uniform numbers in [0, 1) one image needs."""

    draws: int


class Geometry(Augmentation):
    """Moves pixels: one homogeneous 3x3 matrix per image, from input to output pixels.

    Coordinates are (x, y) at pixel centers: the first pixel's center is 0, the last one's W - 1.

    Attributes:
        mirrors: whether its matrix can have a negative determinant as configured (left becomes right).
        whole_pixel: whether it only flips and shifts by whole pixels as configured, so that no interpolation
            is needed.
    """

    mirrors: bool = False
    whole_pixel: bool = False

    @abstractmethod
    def move(self, draws: Tensor, height: int, width: int) -> Tensor:
        """(N, 3, 3) float64 from draws (N, `draws`) for images of height x width pixels."""

    def rest(self, height: int, width: int) -> Tensor:
        """(3, 3) float64: what it does to images that are not augmented; the identity for most."""
        return torch.eye(3, dtype=torch.float64)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of what comes out."""
        return height, width

    def magnification(self, height: int, width: int) -> float:
        """Output pixels per input pixel, along one side, of the smallest part that it is meant to cut out."""
        return 1.0


class Color(Augmentation):
    """Changes colors on the 0-1 scale: one 3x7 matrix per image.

    A color v becomes P v + Q m + p, where m is the image's mean color at this point of the chain (only
    contrast asks for it); the matrix is [P | Q | p]. What reaches the pixels in the end is 3x4, because the
    mean moves with the matrix.

    Attributes:
        uses_mean: whether Q can be other than zero as configured.
    """

    uses_mean: bool = False

    @abstractmethod
    def paint(self, draws: Tensor) -> Tensor:
        """(N, 3, 7) float64 from draws (N, `draws`)."""


class Effect(Augmentation):
    """Anything that is no matrix: acts on the normalized float batch after geometry and color.

    Attributes:
        mixes_labels: whether the targets change with the images, so that only classification can take it.
    """

    mixes_labels: bool = False

    @abstractmethod
    def apply(
        self, images: Tensor, targets: dict[str, Tensor], draws: Tensor, std: Sequence[float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images and targets afterwards.

        Args:
            images: (N, C, H, W) float32, normalized; may be changed in place.
            targets: as in `Batch`; not to be changed in place.
            draws: (N, `draws`) float64 on the CPU.
            std: per channel; what was 1 on the 0-1 scale is 1 / std now.
        """


def checked_probability(value: float, owner: object) -> float:
    """`value`, a probability from 0 to 1."""
    if not 0.0 <= value <= 1.0:
        raise UserError(f"augment: {type(owner).__name__}: probability must lie between 0 and 1, not {value}")
    return float(value)


def checked_range(
    value: float | Sequence[float],
    owner: object,
    name: str,
    around: float | None = None,
    lowest: float = float("-inf"),
    highest: float = float("inf"),
) -> tuple[float, float]:
    """(low, high) from a pair, or from one number s that means `around` - s to `around` + s (cut off at
    `lowest`).

    Raises:
        UserError: no pair, low above high, or outside `lowest` to `highest`.
    """
    where = f"augment: {type(owner).__name__}: {name}"
    if isinstance(value, int | float):
        if around is None:
            raise UserError(f"{where} must be a pair [low, high], not {value}")
        if not value >= 0:
            raise UserError(f"{where} must not be negative, not {value}; or give a pair [low, high]")
        low, high = max(around - value, lowest), around + value
    else:
        pair = list(value)
        if len(pair) != 2:
            raise UserError(f"{where} must be a number or a pair [low, high], not {pair}")
        low, high = pair
    if not lowest <= low <= high <= highest:
        raise UserError(f"{where} must be ordered and lie between {lowest:g} and {highest:g}, not {value}")
    return float(low), float(high)


def between(uniform: Tensor, low: float, high: float) -> Tensor:
    """Uniform numbers in [0, 1) stretched to [low, high)."""
    return low + (high - low) * uniform


def by_kind(augmentations: Mapping[str, Augmentation], kind: type) -> dict[str, Augmentation]:
    """Those of one kind, in their order."""
    return {key: item for key, item in augmentations.items() if isinstance(item, kind)}
