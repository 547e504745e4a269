"""Color on the 0-1 scale as matrices: brightness, contrast, saturation, hue, grayscale, invert.

Most of them blend an image with something plain: out = factor * image + (1 - factor) * other, and `other` is
black, the mean gray, the pixel's own gray or the negative, itself a 3x7 matrix [P | Q | p] (see `Color`). A
chain is a product of such matrices and is clamped once, at its end: a color that an early member pushes out
of range may come back.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cnntrain.augment.base import Color, between, checked_probability, checked_range

# ITU-R BT.601 luma; the weights sum to one, so that gray stays gray.
LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
# RGB to YIQ (NTSC, 1953). The I and Q rows sum to zero: the gray axis is the axis of rotation.
YIQ = torch.tensor(
    [[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]],
    dtype=torch.float64,
)
_FROM_YIQ = torch.linalg.inv(YIQ)


def _matrix(pixel: Tensor | None = None, mean: Tensor | None = None, offset: float = 0.0) -> Tensor:
    """(3, 7): [pixel | mean | offset], with zeros for what is None."""
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    column = torch.full((3, 1), offset, dtype=torch.float64)
    return torch.cat([nothing if pixel is None else pixel, nothing if mean is None else mean, column], dim=1)


_EYE = torch.eye(3, dtype=torch.float64)
UNCHANGED = _matrix(pixel=_EYE)
BLACK = _matrix()
OWN_GRAY = _matrix(pixel=LUMA.expand(3, 3))
MEAN_GRAY = _matrix(mean=LUMA.expand(3, 3))
NEGATIVE = _matrix(pixel=-_EYE, offset=1.0)


def blend(factor: Tensor, other: Tensor) -> Tensor:
    """(N, 3, 7): factor (N,) of the image itself, the rest of `other` (3, 7)."""
    return other + factor[:, None, None] * (UNCHANGED - other)


def turn_hue(turns: Tensor) -> Tensor:
    """(N, 3, 7): a turn about the gray axis in YIQ by `turns` (N,) of a full circle, red to yellow."""
    angle = 2 * math.pi * turns
    rotation = torch.zeros(len(turns), 3, 3, dtype=torch.float64)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = torch.cos(angle)
    rotation[:, 1, 2] = torch.sin(angle)
    rotation[:, 2, 1] = -torch.sin(angle)
    pixel = _FROM_YIQ @ rotation @ YIQ
    return torch.cat([pixel, torch.zeros(len(turns), 3, 4, dtype=torch.float64)], dim=2)


def chain(first: Tensor, then: Tensor) -> Tensor:
    """(N, 3, 7): `first` and `then` (each (N, 3, 7)) one after the other."""
    pixel, mean, offset = first.split((3, 3, 1), dim=2)
    then_pixel, then_mean, then_offset = then.split((3, 3, 1), dim=2)
    # `first` has moved the mean color as well: to (pixel + mean) m + offset.
    mean_moved = torch.cat([torch.zeros_like(pixel), pixel + mean, offset], dim=2)
    total = torch.baddbmm(then_mean @ mean_moved, then_pixel, first)
    total[:, :, 6:] += then_offset
    return total


class _Blend(Color):
    """A random factor between the image and `_other`; a factor of 1 leaves the image alone."""

    draws = 2
    _other: Tensor

    def __init__(self, *, strength: float | Sequence[float] = 0.4, probability: float = 1.0) -> None:
        self.low, self.high = checked_range(strength, self, "strength", around=1.0, lowest=0.0)
        self.probability = checked_probability(probability, self)

    def paint(self, draws: Tensor) -> Tensor:
        factor = between(draws[:, 1], self.low, self.high)
        return blend(torch.where(draws[:, 0] < self.probability, factor, 1.0), self._other)


class Brightness(_Blend):
    """Multiplies by a factor from 1 - strength to 1 + strength, or from a pair [low, high]; 0 is black."""

    _other = BLACK


class Contrast(_Blend):
    """Stretches about the image's mean gray by a factor as `Brightness`; 0 is flat gray."""

    _other = MEAN_GRAY
    uses_mean = True


class Saturation(_Blend):
    """Stretches each color about its own gray by a factor as `Brightness`; 0 is a gray image."""

    _other = OWN_GRAY


class Hue(Color):
    """Rotates about the gray axis (YIQ) by -strength to strength of a full circle (at most 0.5), or a pair
    [low, high].

    Not torchvision's HSV: that is no linear map, and it changes the luma.
    """

    draws = 2

    def __init__(self, *, strength: float | Sequence[float] = 0.1, probability: float = 1.0) -> None:
        self.low, self.high = checked_range(strength, self, "strength", around=0.0, lowest=-0.5, highest=0.5)
        self.probability = checked_probability(probability, self)

    def paint(self, draws: Tensor) -> Tensor:
        turns = between(draws[:, 1], self.low, self.high)
        return turn_hue(torch.where(draws[:, 0] < self.probability, turns, 0.0))


class _Switch(Color):
    """Replaces the image by `_other` with `probability`."""

    draws = 1
    _other: Tensor

    def __init__(self, *, probability: float = 0.1) -> None:
        self.probability = checked_probability(probability, self)

    def paint(self, draws: Tensor) -> Tensor:
        return blend((draws[:, 0] >= self.probability).double(), self._other)


class Grayscale(_Switch):
    """Takes the colors away with `probability`."""

    _other = OWN_GRAY


class Invert(_Switch):
    """Makes a negative of the image with `probability`."""

    _other = NEGATIVE


class ColorJitter(Color):
    """Brightness, contrast, saturation and hue in this order, each as in its own class; 0 leaves one out."""

    draws = 5

    def __init__(
        self,
        *,
        brightness: float | Sequence[float] = 0.4,
        contrast: float | Sequence[float] = 0.4,
        saturation: float | Sequence[float] = 0.4,
        hue: float | Sequence[float] = 0.0,
        probability: float = 1.0,
    ) -> None:
        self.probability = checked_probability(probability, self)
        self.blends = [
            (checked_range(strength, self, name, around=1.0, lowest=0.0), other)
            for name, strength, other in (
                ("brightness", brightness, BLACK),
                ("contrast", contrast, MEAN_GRAY),
                ("saturation", saturation, OWN_GRAY),
            )
        ]
        self.hue = checked_range(hue, self, "hue", around=0.0, lowest=-0.5, highest=0.5)
        self.uses_mean = self.blends[1][0] != (1.0, 1.0)

    def paint(self, draws: Tensor) -> Tensor:
        chosen = draws[:, 0] < self.probability
        total: Tensor | None = None
        for column, ((low, high), other) in enumerate(self.blends, start=1):
            if (low, high) == (1.0, 1.0):
                continue
            matrix = blend(torch.where(chosen, between(draws[:, column], low, high), 1.0), other)
            total = matrix if total is None else chain(total, matrix)
        if self.hue != (0.0, 0.0):
            matrix = turn_hue(torch.where(chosen, between(draws[:, 4], *self.hue), 0.0))
            total = matrix if total is None else chain(total, matrix)
        return UNCHANGED.expand(len(draws), 3, 7) if total is None else total
