"""TrivialAugment: one random operation of random strength per image, without parameters to tune."""

import torch
from torch import Tensor

from cnntrain.augment.base import Color, Geometry, check_probability
from cnntrain.augment.color import BLACK, IDENTITY, MEAN_GRAY, PIXEL_GRAY, blend
from cnntrain.augment.geometry import about_center, identity, rotation, shear, translation


class TrivialAugment(Geometry, Color):
    """Apply one of nine operations with equal probability.

    The operations are: none, brightness, contrast, saturation, shear along x, shear along y, shift along x, shift
    along y, and rotation. After TrivialAugment (Mueller, Hutter 2021) in its wide variant: factors from 0.01 to 1.99,
    shear up to 0.99, shift up to a seventh of the side (32 of 224 px), rotation up to 135 degrees. Strengths are
    uniform from zero to the maximum, with a random sign. Sharpness, posterize, solarize, autocontrast and equalize
    are left out because they are not matrices.

    Args:
        strength: fraction of the maximum strengths, 0 to 1.
        probability: of applying an operation at all.
    """

    num_uniforms = 4
    uses_mean = True
    _NUM_OPERATIONS = 9

    def __init__(self, *, strength: float = 1.0, probability: float = 1.0) -> None:
        self.strength = check_probability(strength, self, "strength")
        self.probability = check_probability(probability, self)

    def _choose(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Return the number of the operation (N,) and its signed strength (N,) from -1 to 1."""
        chosen = uniforms[:, 0] < self.probability
        operation = torch.where(chosen, torch.floor(uniforms[:, 1] * self._NUM_OPERATIONS), 0.0)
        sign = torch.where(uniforms[:, 3] < 0.5, -1.0, 1.0)
        return operation, self.strength * uniforms[:, 2] * sign

    def color_matrix(self, uniforms: Tensor) -> Tensor:
        operation, strength = self._choose(uniforms)
        factor = 1 + 0.99 * strength
        matrix = IDENTITY.expand(len(uniforms), 3, 7)
        for number, other in ((1, BLACK), (2, MEAN_GRAY), (3, PIXEL_GRAY)):
            matrix = torch.where((operation == number)[:, None, None], blend(factor, other), matrix)
        return matrix

    def matrix(self, uniforms: Tensor, height: int, width: int) -> Tensor:
        operation, strength = self._choose(uniforms)
        zero = torch.zeros_like(strength)
        matrix = identity(len(uniforms))
        for number, candidate in (
            (4, about_center(shear(0.99 * strength, zero), height, width)),
            (5, about_center(shear(zero, 0.99 * strength), height, width)),
            (6, translation(strength * width / 7, zero)),
            (7, translation(zero, strength * height / 7)),
            (8, about_center(rotation(torch.deg2rad(135 * strength)), height, width)),
        ):
            matrix = torch.where((operation == number)[:, None, None], candidate, matrix)
        return matrix
