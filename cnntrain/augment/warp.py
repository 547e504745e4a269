"""Geometry that needs interpolation: resized crop, zoom, rotation, shear, perspective."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cnntrain.augment.base import Geometry, between, checked_probability, checked_range
from cnntrain.augment.geometry import checked_size, identities, translation
from cnntrain.errors import UserError


def about_center(matrix: Tensor, height: int, width: int) -> Tensor:
    """(N, 3, 3): `matrix` (N, 3, 3) with the image's center as its origin."""
    x, y = torch.tensor([[(width - 1) / 2], [(height - 1) / 2]], dtype=torch.float64)
    return translation(x, y) @ matrix @ translation(-x, -y)


def box_to_canvas(box: Tensor, output_size: tuple[int, int]) -> Tensor:
    """(N, 3, 3) that stretch boxes over height x width px.

    Args:
        box: (N, 4) float64: left, top, width, height in pixels from the image's edge (not from a pixel's
            center).
    """
    matrix = identities(len(box))
    for axis, length in ((0, output_size[1]), (1, output_size[0])):
        scale = length / box[:, 2 + axis]
        matrix[:, axis, axis] = scale
        # The first center is half a pixel from the edge on both sides of the move.
        matrix[:, axis, 2] = (0.5 - box[:, axis]) * scale - 0.5
    return matrix


class RandomResizedCrop(Geometry):
    """A box of random area and aspect ratio, stretched over the output (Szegedy et al. 2015, section 6).

    A box that is too long for the image is cut to it (torchvision draws again up to ten times instead).
    Images at rest get the largest box in the middle that has the output's aspect ratio.

    Args:
        size: (height, width) of the output or one number for both, in pixels; None keeps the canvas size.
        scale: [low, high], share of the image's area.
        ratio: [low, high], the box's width by height in units of the output's, drawn on a log scale: how much
            the picture is squeezed. (The same as torchvision's where the output is square.)
    """

    draws = 4

    def __init__(
        self,
        *,
        size: int | Sequence[int] | None = None,
        scale: Sequence[float] = (0.35, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
    ) -> None:
        self.size = checked_size(size, self)
        self.scale = checked_range(scale, self, "scale", lowest=1e-3, highest=1.0)
        self.ratio = checked_range(ratio, self, "ratio", lowest=1e-2, highest=1e2)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return self.size or (height, width)

    def magnification(self, height: int, width: int) -> float:
        output_height, output_width = self.output_size(height, width)
        return max(output_height / height, output_width / width) / math.sqrt(self.scale[0])

    def move(self, draws: Tensor, height: int, width: int) -> Tensor:
        area_px = between(draws[:, 0], *self.scale) * height * width
        output_height, output_width = self.output_size(height, width)
        squeeze = torch.exp(between(draws[:, 1], *(math.log(value) for value in self.ratio)))
        ratio = squeeze * output_width / output_height
        box_width = (area_px * ratio).sqrt().clamp(max=width)
        box_height = (area_px / ratio).sqrt().clamp(max=height)
        left, top = (width - box_width) * draws[:, 2], (height - box_height) * draws[:, 3]
        box = torch.stack([left, top, box_width, box_height], dim=1)
        return box_to_canvas(box, (output_height, output_width))

    def rest(self, height: int, width: int) -> Tensor:
        output_height, output_width = self.output_size(height, width)
        shrink = min(height / output_height, width / output_width)
        box_width, box_height = output_width * shrink, output_height * shrink
        box = [(width - box_width) / 2, (height - box_height) / 2, box_width, box_height]
        return box_to_canvas(torch.tensor([box], dtype=torch.float64), (output_height, output_width))[0]


class _AboutCenter(Geometry):
    """A matrix about the center, where `probability` says so."""

    probability: float

    def move(self, draws: Tensor, height: int, width: int) -> Tensor:
        matrix = about_center(self._about_origin(draws[:, 1:]), height, width)
        chosen = (draws[:, 0] < self.probability)[:, None, None]
        return torch.where(chosen, matrix, torch.eye(3, dtype=torch.float64))

    def _about_origin(self, draws: Tensor) -> Tensor:
        raise NotImplementedError


class Zoom(_AboutCenter):
    """Enlarges by a factor from `factor` = [low, high], drawn on a log scale; below 1 it shrinks."""

    draws = 2

    def __init__(self, *, factor: Sequence[float] = (0.8, 1.25), probability: float = 1.0) -> None:
        self.low, self.high = checked_range(factor, self, "factor", lowest=0.05, highest=20)
        self.probability = checked_probability(probability, self)

    def _about_origin(self, draws: Tensor) -> Tensor:
        matrix = identities(len(draws))
        factor = torch.exp(between(draws[:, 0], math.log(self.low), math.log(self.high)))
        matrix[:, 0, 0] = matrix[:, 1, 1] = factor
        return matrix


def rotation(radians: Tensor) -> Tensor:
    """(N, 3, 3) that turn counter-clockwise (as seen: y points down) by `radians` (N,)."""
    matrix = identities(len(radians))
    matrix[:, 0, 0] = matrix[:, 1, 1] = torch.cos(radians)
    matrix[:, 0, 1] = torch.sin(radians)
    matrix[:, 1, 0] = -torch.sin(radians)
    return matrix


def shear(x: Tensor, y: Tensor) -> Tensor:
    """(N, 3, 3): x grows by `x` times y, then y by `y` times the new x; each (N,). The area stays."""
    matrix = identities(len(x))
    matrix[:, 0, 1] = x
    matrix[:, 1, 0] = y
    matrix[:, 1, 1] = 1 + x * y
    return matrix


class Rotation(_AboutCenter):
    """Turns by -degrees to degrees, or by a pair [low, high]; positive is counter-clockwise."""

    draws = 2

    def __init__(self, *, degrees: float | Sequence[float] = 15.0, probability: float = 1.0) -> None:
        self.low, self.high = checked_range(degrees, self, "degrees", around=0.0, lowest=-360, highest=360)
        self.probability = checked_probability(probability, self)

    def _about_origin(self, draws: Tensor) -> Tensor:
        return rotation(torch.deg2rad(between(draws[:, 0], self.low, self.high)))


class Shear(_AboutCenter):
    """Slants by angles from -degrees to degrees along x, then y; each a number or a pair [low, high]."""

    draws = 3

    def __init__(
        self,
        *,
        x_degrees: float | Sequence[float] = 10.0,
        y_degrees: float | Sequence[float] = 0.0,
        probability: float = 1.0,
    ) -> None:
        self.x = checked_range(x_degrees, self, "x_degrees", around=0.0, lowest=-80, highest=80)
        self.y = checked_range(y_degrees, self, "y_degrees", around=0.0, lowest=-80, highest=80)
        self.probability = checked_probability(probability, self)

    def _about_origin(self, draws: Tensor) -> Tensor:
        x, y = (torch.tan(torch.deg2rad(between(draws[:, i], *r))) for i, r in ((0, self.x), (1, self.y)))
        return shear(x, y)


class Perspective(Geometry):
    """Pulls each corner towards the center by up to `distortion` of half the width and height (0 to 0.6).

    Beyond two thirds the corners may cross, and parts of the picture would come to lie behind the camera.
    """

    draws = 9

    def __init__(self, *, distortion: float = 0.3, probability: float = 0.5) -> None:
        if not 0 <= distortion <= 0.6:
            raise UserError(f"augment: Perspective: distortion must lie between 0 and 0.6, not {distortion}")
        self.distortion = distortion
        self.probability = checked_probability(probability, self)

    def move(self, draws: Tensor, height: int, width: int) -> Tensor:
        right, bottom = width - 1.0, height - 1.0
        corners = torch.tensor([[0, 0], [right, 0], [right, bottom], [0, bottom]], dtype=torch.float64)
        inwards = torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]], dtype=torch.float64)
        pull = draws[:, 1:].reshape(-1, 4, 2) * self.distortion * torch.tensor([right / 2, bottom / 2])
        matrix = homography(corners, corners + inwards * pull)
        return torch.where((draws[:, 0] < self.probability)[:, None, None], matrix, torch.eye(3).double())


def homography(source: Tensor, target: Tensor) -> Tensor:
    """(N, 3, 3) that carry four points `source` (4, 2) to `target` (N, 4, 2), none three on a line."""
    count = len(target)
    x, y = source.double().unbind(1)
    equations = torch.zeros(count, 8, 8, dtype=torch.float64)
    for axis in (0, 1):
        rows, columns = slice(4 * axis, 4 * axis + 4), 3 * axis
        equations[:, rows, columns], equations[:, rows, columns + 1], equations[:, rows, columns + 2] = (
            x,
            y,
            1.0,
        )
        equations[:, rows, 6], equations[:, rows, 7] = -x * target[:, :, axis], -y * target[:, :, axis]
    solution = torch.linalg.solve(equations, torch.cat([target[:, :, 0], target[:, :, 1]], dim=1))
    return torch.cat([solution, torch.ones(count, 1, dtype=torch.float64)], dim=1).view(count, 3, 3)
