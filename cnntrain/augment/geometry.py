"""Geometry that needs no interpolation: flips, and shifts by whole pixels (crop, shift)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cnntrain.augment.base import Geometry, checked_probability
from cnntrain.errors import UserError


def identities(count: int) -> Tensor:
    """(count, 3, 3) float64, each the identity, to be filled in."""
    return torch.eye(3, dtype=torch.float64).expand(count, 3, 3).clone()


def translation(x_px: Tensor, y_px: Tensor) -> Tensor:
    """(N, 3, 3) that move by (x_px, y_px), each (N,)."""
    matrix = identities(len(x_px))
    matrix[:, 0, 2] = x_px
    matrix[:, 1, 2] = y_px
    return matrix


class _Flip(Geometry):
    draws = 1
    whole_pixel = True
    _axis: int

    def __init__(self, *, probability: float = 0.5) -> None:
        self.probability = checked_probability(probability, self)
        self.mirrors = self.probability > 0

    def move(self, draws: Tensor, height: int, width: int) -> Tensor:
        matrix = identities(len(draws))
        flipped = (draws[:, 0] < self.probability).double()
        matrix[:, self._axis, self._axis] = 1 - 2 * flipped
        matrix[:, self._axis, 2] = flipped * ((width, height)[self._axis] - 1)
        return matrix


class HorizontalFlip(_Flip):
    """Exchanges left and right with `probability`: x becomes W - 1 - x."""

    _axis = 0


class VerticalFlip(_Flip):
    """Exchanges top and bottom with `probability`: y becomes H - 1 - y."""

    _axis = 1


def checked_size(size: int | Sequence[int] | None, owner: object) -> tuple[int, int] | None:
    """(height, width) from one number for both, a pair, or None.

    Raises:
        UserError: not positive, or neither one number nor two.
    """
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise UserError(f"augment: {type(owner).__name__}: size must be px or [height, width], not {size}")
    return pair[0], pair[1]


class Crop(Geometry):
    """A window of `size` at a random whole-pixel place of the image padded by `padding` on each side.

    Args:
        size: (height, width) or one number for both, in pixels; None keeps the canvas size.
        padding: how far the window may leave the image. Images at rest get the window in the middle.
    """

    draws = 2
    whole_pixel = True

    def __init__(self, *, size: int | Sequence[int] | None = None, padding: int = 4) -> None:
        self.size = checked_size(size, self)
        if padding < 0:
            raise UserError(f"augment: Crop: padding must not be negative, not {padding}")
        self.padding = padding

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        size = self.size or (height, width)
        if size[0] > height + 2 * self.padding or size[1] > width + 2 * self.padding:
            raise UserError(
                f"augment: Crop: a window of {size[0]}x{size[1]} px does not fit {height}x{width} px padded "
                f"by {self.padding}; make size smaller or padding larger"
            )
        return size

    def move(self, draws: Tensor, height: int, width: int) -> Tensor:
        window_height, window_width = self.output_size(height, width)
        places = torch.tensor([width - window_width, height - window_height]) + 2 * self.padding + 1
        left_top = torch.floor(draws * places) - self.padding  # (N, 2)
        return translation(-left_top[:, 0], -left_top[:, 1])

    def rest(self, height: int, width: int) -> Tensor:
        window_height, window_width = self.output_size(height, width)
        left, top = (width - window_width) // 2, (height - window_height) // 2
        return translation(torch.tensor([-left]), torch.tensor([-top]))[0]


class Shift(Geometry):
    """Moves the image by a whole number of pixels from -pixels to pixels along each axis."""

    draws = 2
    whole_pixel = True

    def __init__(self, *, pixels: int = 1) -> None:
        if pixels < 0:
            raise UserError(f"augment: Shift: pixels must not be negative, not {pixels}")
        self.pixels = pixels

    def move(self, draws: Tensor, height: int, width: int) -> Tensor:
        offset = torch.floor(draws * (2 * self.pixels + 1)) - self.pixels  # (N, 2)
        return translation(offset[:, 0], offset[:, 1])
