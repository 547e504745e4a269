"""Color augmentations as matrices on the 0-1 scale, and the function that applies them to a batch.

Most of them blend an image with another one: out = factor * image + (1 - factor) * other, where `other` is black, the
mean gray of the image, the gray of each pixel or the negative. Each of these is a 3x7 matrix [P | Q | p], see `Color`.
A sequence of color augmentations is a product of such matrices. Values are clamped to 0-1 once, after the last one.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cnntrain.augment.base import Color, check_probability, check_range, uniform_between
from cnntrain.transfer import constant, to_device, wide_dtype

# RGB to YIQ (NTSC, 1953). The first row is the luma of ITU-R BT.601, whose weights sum to one, so that gray stays
# gray. The other rows sum to zero: gray is the axis of hue rotations.
YIQ = torch.tensor(
    [[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]], dtype=torch.float64
)
_YIQ_INVERSE = torch.linalg.inv(YIQ)
_ZEROS, _ONES = torch.zeros(3, 1, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
_NONE, _EYE, _GRAY = torch.zeros_like(YIQ), torch.eye(3, dtype=torch.float64), YIQ[0].expand(3, 3)

# Color matrices [P | Q | p], (3, 7).
IDENTITY = torch.cat([_EYE, _NONE, _ZEROS], dim=1)
BLACK = torch.cat([_NONE, _NONE, _ZEROS], dim=1)
PIXEL_GRAY = torch.cat([_GRAY, _NONE, _ZEROS], dim=1)
MEAN_GRAY = torch.cat([_NONE, _GRAY, _ZEROS], dim=1)
NEGATIVE = torch.cat([-_EYE, _NONE, _ONES], dim=1)


def blend(factor: Tensor, other: Tensor) -> Tensor:
    """Return (N, 3, 7) matrices: `factor` (N,) times the image plus (1 - factor) times `other` (3, 7)."""
    return other + factor[:, None, None] * (IDENTITY - other)


def rotate_hue(turns: Tensor) -> Tensor:
    """Return (N, 3, 7) matrices that rotate about the gray axis in YIQ, by `turns` (N,) from red towards yellow."""
    angle = 2 * math.pi * turns
    rotation = torch.zeros(len(turns), 3, 3, dtype=torch.float64)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = torch.cos(angle)
    rotation[:, 1, 2] = torch.sin(angle)
    rotation[:, 2, 1] = -torch.sin(angle)
    pixel = _YIQ_INVERSE @ rotation @ YIQ
    return torch.cat([pixel, torch.zeros(len(turns), 3, 4, dtype=torch.float64)], dim=2)


def compose(matrices: Iterable[Tensor]) -> Tensor | None:
    """Return the product of color matrices (N, 3, 7) applied in this order; None if there are none."""
    total: Tensor | None = None
    for matrix in matrices:
        total = matrix if total is None else _compose_two(total, matrix)
    return total


def _compose_two(first: Tensor, second: Tensor) -> Tensor:
    pixel, mean, offset = first.split((3, 3, 1), dim=2)
    second_pixel, second_mean, second_offset = second.split((3, 3, 1), dim=2)
    # `first` changes the mean color m as well: to (pixel + mean) m + offset.
    new_mean = torch.cat([torch.zeros_like(pixel), pixel + mean, offset], dim=2)
    total = torch.baddbmm(second_mean @ new_mean, second_pixel, first)
    total[:, :, 6:] += second_offset
    return total


class _RandomBlend(Color):
    """Blend the image with `_other` by a random factor; a factor of 1 keeps the image."""

    num_uniforms = 2
    _other: Tensor

    def __init__(self, *, strength: float | Sequence[float] = 0.4, probability: float = 1.0) -> None:
        self.factor = check_range(strength, self, "strength", center=1.0, minimum=0.0)
        self.probability = check_probability(probability, self)

    def color_matrix(self, uniforms: Tensor) -> Tensor:
        factor = uniform_between(uniforms[:, 1], *self.factor)
        return blend(torch.where(uniforms[:, 0] < self.probability, factor, 1.0), self._other)


class Brightness(_RandomBlend):
    """Multiply by a factor from 1 - strength to 1 + strength, or from a pair [low, high]; 0 gives black."""

    _other = BLACK


class Contrast(_RandomBlend):
    """Scale the distance from the mean gray of the image, with a factor as in `Brightness`; 0 gives flat gray."""

    _other = MEAN_GRAY
    uses_mean = True


class Saturation(_RandomBlend):
    """Scale the distance of each color from its gray, with a factor as in `Brightness`; 0 gives a gray image."""

    _other = PIXEL_GRAY


class Hue(Color):
    """Rotate colors about the gray axis of YIQ by -strength to strength of a circle (at most 0.5), or a pair.

    Not torchvision's HSV hue, which is not linear and changes the luma.
    """

    num_uniforms = 2

    def __init__(self, *, strength: float | Sequence[float] = 0.1, probability: float = 1.0) -> None:
        self.turns = check_range(strength, self, "strength", center=0.0, minimum=-0.5, maximum=0.5)
        self.probability = check_probability(probability, self)

    def color_matrix(self, uniforms: Tensor) -> Tensor:
        turns = uniform_between(uniforms[:, 1], *self.turns)
        return rotate_hue(torch.where(uniforms[:, 0] < self.probability, turns, 0.0))


class _RandomReplacement(Color):
    """Replace the image by `_other` with `probability`."""

    num_uniforms = 1
    _other: Tensor

    def __init__(self, *, probability: float = 0.1) -> None:
        self.probability = check_probability(probability, self)

    def color_matrix(self, uniforms: Tensor) -> Tensor:
        return blend((uniforms[:, 0] >= self.probability).double(), self._other)


class Grayscale(_RandomReplacement):
    """Convert the image to gray with `probability`."""

    _other = PIXEL_GRAY


class Invert(_RandomReplacement):
    """Invert the colors with `probability`."""

    _other = NEGATIVE


class ColorJitter(Color):
    """Apply `Brightness`, `Contrast`, `Saturation` and `Hue` in this order; a strength of 0 leaves one out."""

    num_uniforms = 5

    def __init__(
        self,
        *,
        brightness: float | Sequence[float] = 0.4,
        contrast: float | Sequence[float] = 0.4,
        saturation: float | Sequence[float] = 0.4,
        hue: float | Sequence[float] = 0.0,
        probability: float = 1.0,
    ) -> None:
        self.probability = check_probability(probability, self)
        self.brightness = check_range(brightness, self, "brightness", center=1.0, minimum=0.0)
        self.contrast = check_range(contrast, self, "contrast", center=1.0, minimum=0.0)
        self.saturation = check_range(saturation, self, "saturation", center=1.0, minimum=0.0)
        self.turns = check_range(hue, self, "hue", center=0.0, minimum=-0.5, maximum=0.5)
        self.uses_mean = self.contrast != (1.0, 1.0)

    def color_matrix(self, uniforms: Tensor) -> Tensor:
        chosen = uniforms[:, 0] < self.probability
        blends = ((self.brightness, BLACK), (self.contrast, MEAN_GRAY), (self.saturation, PIXEL_GRAY))
        matrices = [
            blend(torch.where(chosen, uniform_between(uniforms[:, column], *factor), 1.0), other)
            for column, (factor, other) in enumerate(blends, start=1)
            if factor != (1.0, 1.0)
        ]
        if self.turns != (0.0, 0.0):
            turns = uniform_between(uniforms[:, 4], *self.turns)
            matrices.append(rotate_hue(torch.where(chosen, turns, 0.0)))
        total = compose(matrices)
        return IDENTITY.expand(len(uniforms), 3, 7) if total is None else total


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (value / 255 - mean) / std per channel as float32, for images (N, C, H, W) of any type."""
    scale = constant([1 / (255 * s) for s in std], images.device).view(1, -1, 1, 1)
    offset = constant([-m / s for m, s in zip(mean, std, strict=True)], images.device).view(1, -1, 1, 1)
    # The product is not computed in place: float images may belong to the caller.
    return (images.float() * scale).add_(offset)


def apply_color_matrix(
    images: Tensor, matrix: Tensor, uses_mean: bool, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Multiply colors by a matrix, clamp them to 0-1 once, and normalize.

    Scaling, color matrix and normalization are folded into one matrix. The limits of the clamp are normalized instead
    of the pixels.

    Args:
        images: (N, C, H, W) on the 0-255 scale, of any type; C is 1 or 3. The result is float32.
        matrix: (N, 3, 7) float64 on the CPU, see `Color`.
        uses_mean: whether the columns for the mean color can be nonzero.
    """
    count, channels, height, width = images.shape
    if channels == 1:  # a gray image is a color image with three equal channels
        parts = matrix[:, :1].split((3, 3, 1), dim=2)
        matrix = torch.cat([part.sum(2, keepdim=True) for part in parts], dim=2)  # (N, 1, 3)
    of_pixel, of_mean, offset = matrix.split((channels, channels, 1), dim=2)
    mean_column, std_column = (torch.tensor(values, dtype=torch.float64)[:, None] for values in (mean, std))
    folded = torch.cat(
        [
            of_pixel / (255 * std_column),
            of_mean / (255 * height * width * std_column),
            (offset - mean_column) / std_column,
        ],
        dim=2,
    )
    folded = to_device(folded, images.device, torch.float32)
    of_pixel, of_mean, offset = folded.split((channels, channels, 1), dim=2)
    values = images.float().reshape(count, channels, height * width)
    if uses_mean:
        # Sum rows in float32 (exact for whole numbers), then in float64: the result does not depend on the batch size.
        row_sums = values.view(count, channels, height, width).sum(3)
        sums = row_sums.sum(2, dtype=wide_dtype(images.device)).float()  # (N, C)
        offset = offset + (of_mean * sums[:, None, :]).sum(2, keepdim=True)
    if values.device.type == "cpu":
        result = torch.baddbmm(offset, of_pixel, values)
    else:
        result = multiply_channels(values, of_pixel, offset)
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        result[:, channel].clamp_(-m / s, (1 - m) / s)
    return result.view(images.shape)


def multiply_channels(values: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """Return matrix (N, C, C) @ values (N, C, P) + offset (N, C, 1), summed over channels in a fixed order.

    A matrix product on a GPU may round to TF32 (10 bits) and may choose its order by the batch size.
    """
    result = torch.empty_like(values)
    for row in range(matrix.shape[1]):
        out = result[:, row]
        torch.addcmul(offset[:, row], values[:, 0], matrix[:, row, 0, None], out=out)
        for column in range(1, matrix.shape[2]):
            out.addcmul_(values[:, column], matrix[:, row, column, None])
    return result
