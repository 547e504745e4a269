"""A policy without parameters to tune: one random operation of random strength per image."""

import torch
from torch import Tensor

from cnntrain.augment.base import Color, Geometry, checked_probability
from cnntrain.augment.color import BLACK, MEAN_GRAY, OWN_GRAY, UNCHANGED, blend
from cnntrain.augment.geometry import identities, translation
from cnntrain.augment.warp import about_center, rotation, shear


class Trivial(Geometry, Color):
    """One of nine operations, evenly: nothing, brightness, contrast, saturation, shear or shift along x or y,
    rotation.

    After TrivialAugment (Mueller, Hutter 2021), wide strengths: factors from 0.01 to 1.99, shear to 0.99,
    shift to 32 px of 224 in its share of the side, rotation to 135 degrees, each evenly from nothing to the
    most, either way. Its sharpness, posterize, solarize, autocontrast and equalize are no matrices and are
    left out.

    Args:
        strength: share of the widest strengths, 0 to 1.
        probability: of doing anything.
    """

    draws = 4
    uses_mean = True
    _OPERATIONS = 9

    def __init__(self, *, strength: float = 1.0, probability: float = 1.0) -> None:
        self.strength = checked_probability(strength, self)
        self.probability = checked_probability(probability, self)

    def _chosen(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) number of the operation, (N,) strength from -1 to 1."""
        operation = torch.where(
            draws[:, 0] < self.probability, torch.floor(draws[:, 1] * self._OPERATIONS), 0.0
        )
        side = torch.where(draws[:, 3] < 0.5, -1.0, 1.0)
        return operation, self.strength * draws[:, 2] * side

    def paint(self, draws: Tensor) -> Tensor:
        operation, strength = self._chosen(draws)
        factor = 1 + 0.99 * strength
        matrix = UNCHANGED.expand(len(draws), 3, 7)
        for number, other in ((1, BLACK), (2, MEAN_GRAY), (3, OWN_GRAY)):
            matrix = torch.where((operation == number)[:, None, None], blend(factor, other), matrix)
        return matrix

    def move(self, draws: Tensor, height: int, width: int) -> Tensor:
        operation, strength = self._chosen(draws)
        zero = torch.zeros_like(strength)
        matrix = identities(len(draws))
        for number, candidate in (
            (4, about_center(shear(0.99 * strength, zero), height, width)),
            (5, about_center(shear(zero, 0.99 * strength), height, width)),
            (6, translation(strength * width / 7, zero)),
            (7, translation(zero, strength * height / 7)),
            (8, about_center(rotation(torch.deg2rad(135 * strength)), height, width)),
        ):
            matrix = torch.where((operation == number)[:, None, None], candidate, matrix)
        return matrix
