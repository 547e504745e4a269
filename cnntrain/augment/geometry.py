"""Geometric augmentations: flips, crops, shifts, zoom, rotation, shear and perspective."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from cnntrain.augment.base import Geometry, check_probability, check_range, log_uniform_between, uniform_between
from cnntrain.errors import UserError
from cnntrain.types import Size


def identity(count: int) -> Tensor:
    """Return (count, 3, 3) float64 identity matrices, to be filled in."""
    return torch.eye(3, dtype=torch.float64).expand(count, 3, 3).clone()


def translation(x_px: Tensor, y_px: Tensor) -> Tensor:
    """Return (N, 3, 3) matrices that shift by (x_px, y_px), each (N,)."""
    matrix = identity(len(x_px))
    matrix[:, 0, 2] = x_px
    matrix[:, 1, 2] = y_px
    return matrix


def scaling(factor: Tensor) -> Tensor:
    """Return (N, 3, 3) matrices that scale both axes by `factor` (N,)."""
    matrix = identity(len(factor))
    matrix[:, 0, 0] = matrix[:, 1, 1] = factor
    return matrix


def rotation(radians: Tensor) -> Tensor:
    """Return (N, 3, 3) matrices that rotate counter-clockwise as seen (y points down) by `radians` (N,)."""
    matrix = identity(len(radians))
    matrix[:, 0, 0] = matrix[:, 1, 1] = torch.cos(radians)
    matrix[:, 0, 1] = torch.sin(radians)
    matrix[:, 1, 0] = -torch.sin(radians)
    return matrix


def shear(shear_x: Tensor, shear_y: Tensor) -> Tensor:
    """Return (N, 3, 3) matrices of the shear x' = x + shear_x * y, y' = y + shear_y * x'; each (N,)."""
    matrix = identity(len(shear_x))
    matrix[:, 0, 1] = shear_x
    matrix[:, 1, 0] = shear_y
    matrix[:, 1, 1] = 1 + shear_x * shear_y
    return matrix


def about_center(matrix: Tensor, height: int, width: int) -> Tensor:
    """Apply matrices (N, 3, 3) about the image center instead of the first pixel."""
    x, y = torch.tensor([[(width - 1) / 2], [(height - 1) / 2]], dtype=torch.float64)
    return translation(x, y) @ matrix @ translation(-x, -y)


def box_to_image(box: Tensor, output_size: Size) -> Tensor:
    """Return (N, 3, 3) matrices that resize a box to an image of `output_size`.

    `box` (N, 4) float64 is left, top, width and height in pixels from the image edge, not from the first pixel center.
    """
    matrix = identity(len(box))
    for axis, length in ((0, output_size[1]), (1, output_size[0])):
        scale = length / box[:, 2 + axis]
        matrix[:, axis, axis] = scale
        # Pixel centers lie half a pixel inside the edge, before and after the transform.
        matrix[:, axis, 2] = (0.5 - box[:, axis]) * scale - 0.5
    return matrix


def homography(source: Tensor, target: Tensor) -> Tensor:
    """Return (N, 3, 3) matrices that map four points `source` (4, 2) to `target` (N, 4, 2), no three collinear."""
    count = len(target)
    x, y = source.double().unbind(1)
    ones = torch.ones(4, dtype=torch.float64)
    equations = torch.zeros(count, 8, 8, dtype=torch.float64)
    for axis in (0, 1):  # four equations for the x of the targets, then four for the y
        rows = equations[:, 4 * axis : 4 * axis + 4]
        rows[:, :, 3 * axis : 3 * axis + 3] = torch.stack([x, y, ones], dim=1)
        rows[:, :, 6], rows[:, :, 7] = -x * target[:, :, axis], -y * target[:, :, axis]
    solution = torch.linalg.solve(equations, torch.cat([target[:, :, 0], target[:, :, 1]], dim=1))
    return torch.cat([solution, torch.ones(count, 1, dtype=torch.float64)], dim=1).view(count, 3, 3)


def keep_identity(matrix: Tensor, chosen: Tensor) -> Tensor:
    """Return `matrix` (N, 3, 3) where `chosen` (N,) is true, and the identity elsewhere."""
    return torch.where(chosen[:, None, None], matrix, torch.eye(3, dtype=torch.float64))


def check_size(size: int | Sequence[int] | None, owner: object) -> Size | None:
    """Return (height, width) from one number for both, a pair, or None."""
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise UserError(f"augment: {type(owner).__name__}: size must be pixels or [height, width], got {size}")
    return pair[0], pair[1]


class _Flip(Geometry):
    num_uniforms = 1
    pixel_exact = True
    _axis: int

    def __init__(self, *, probability: float = 0.5) -> None:
        self.probability = check_probability(probability, self)
        self.can_flip = self.probability > 0

    def matrix(self, uniforms: Tensor, height: int, width: int) -> Tensor:
        matrix = identity(len(uniforms))
        flipped = (uniforms[:, 0] < self.probability).double()
        matrix[:, self._axis, self._axis] = 1 - 2 * flipped
        matrix[:, self._axis, 2] = flipped * ((width, height)[self._axis] - 1)
        return matrix


class HorizontalFlip(_Flip):
    """Flip left and right with `probability`: x becomes W - 1 - x."""

    _axis = 0


class VerticalFlip(_Flip):
    """Flip top and bottom with `probability`: y becomes H - 1 - y."""

    _axis = 1


class Crop(Geometry):
    """Crop a window at a random whole-pixel position of the padded image; the center crop in evaluation.

    Args:
        size: (height, width) of the window or one number for both, in pixels; None keeps the image size.
        padding: pixels added on each side of the image.
    """

    num_uniforms = 2
    pixel_exact = True

    def __init__(self, *, size: int | Sequence[int] | None = None, padding: int = 4) -> None:
        self.size = check_size(size, self)
        if padding < 0:
            raise UserError(f"augment: Crop: padding must be 0 or more, got {padding}")
        self.padding = padding

    def output_size(self, height: int, width: int) -> Size:
        size = self.size or (height, width)
        if size[0] > height + 2 * self.padding or size[1] > width + 2 * self.padding:
            raise UserError(
                f"augment: Crop: a window of {size[0]}x{size[1]} px does not fit into {height}x{width} px padded by "
                f"{self.padding}; reduce size or increase padding"
            )
        return size

    def matrix(self, uniforms: Tensor, height: int, width: int) -> Tensor:
        window_height, window_width = self.output_size(height, width)
        positions = torch.tensor([width - window_width, height - window_height]) + 2 * self.padding + 1
        left_top = torch.floor(uniforms * positions) - self.padding  # (N, 2)
        return translation(-left_top[:, 0], -left_top[:, 1])

    def eval_matrix(self, height: int, width: int) -> Tensor:
        window_height, window_width = self.output_size(height, width)
        left, top = (width - window_width) // 2, (height - window_height) // 2
        return translation(torch.tensor([-left]), torch.tensor([-top]))[0]


class Shift(Geometry):
    """Shift the image by a whole number of pixels from -pixels to pixels along each axis."""

    num_uniforms = 2
    pixel_exact = True

    def __init__(self, *, pixels: int = 1) -> None:
        if pixels < 0:
            raise UserError(f"augment: Shift: pixels must be 0 or more, got {pixels}")
        self.pixels = pixels

    def matrix(self, uniforms: Tensor, height: int, width: int) -> Tensor:
        offset = torch.floor(uniforms * (2 * self.pixels + 1)) - self.pixels  # (N, 2)
        return translation(offset[:, 0], offset[:, 1])


class RandomResizedCrop(Geometry):
    """Resize a box of random area and aspect ratio to the output size (Szegedy et al. 2015, section 6).

    A box longer than the image is cut to the image (torchvision draws again, up to ten times). In evaluation, the
    largest centered box with the aspect ratio of the output is used.

    Args:
        size: (height, width) of the output or one number for both, in pixels; None keeps the image size.
        scale: [low, high], area of the box as a fraction of the image area.
        ratio: [low, high], aspect ratio (width / height) of the box divided by that of the output, drawn on a
            logarithmic scale. Equal to torchvision's ratio for square outputs.
    """

    num_uniforms = 4

    def __init__(
        self,
        *,
        size: int | Sequence[int] | None = None,
        scale: Sequence[float] = (0.35, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
    ) -> None:
        self.size = check_size(size, self)
        self.scale = check_range(scale, self, "scale", minimum=1e-3, maximum=1.0)
        self.ratio = check_range(ratio, self, "ratio", minimum=1e-2, maximum=1e2)

    def output_size(self, height: int, width: int) -> Size:
        return self.size or (height, width)

    def magnification(self, height: int, width: int) -> float:
        output_height, output_width = self.output_size(height, width)
        return max(output_height / height, output_width / width) / math.sqrt(self.scale[0])

    def matrix(self, uniforms: Tensor, height: int, width: int) -> Tensor:
        output_height, output_width = self.output_size(height, width)
        area_px = uniform_between(uniforms[:, 0], *self.scale) * height * width
        ratio = log_uniform_between(uniforms[:, 1], *self.ratio) * output_width / output_height
        box_width = (area_px * ratio).sqrt().clamp(max=width)
        box_height = (area_px / ratio).sqrt().clamp(max=height)
        left, top = (width - box_width) * uniforms[:, 2], (height - box_height) * uniforms[:, 3]
        box = torch.stack([left, top, box_width, box_height], dim=1)
        return box_to_image(box, (output_height, output_width))

    def eval_matrix(self, height: int, width: int) -> Tensor:
        output_height, output_width = self.output_size(height, width)
        scale = min(height / output_height, width / output_width)
        box_width, box_height = output_width * scale, output_height * scale
        box = [(width - box_width) / 2, (height - box_height) / 2, box_width, box_height]
        return box_to_image(torch.tensor([box], dtype=torch.float64), (output_height, output_width))[0]


class _CenteredTransform(Geometry):
    """A linear transform about the image center, applied with `probability`."""

    probability: float

    def matrix(self, uniforms: Tensor, height: int, width: int) -> Tensor:
        matrix = about_center(self._linear(uniforms[:, 1:]), height, width)
        return keep_identity(matrix, uniforms[:, 0] < self.probability)

    @abstractmethod
    def _linear(self, uniforms: Tensor) -> Tensor:
        """Return (N, 3, 3) matrices about the origin."""


class Zoom(_CenteredTransform):
    """Scale by a factor from `factor` = [low, high], drawn on a logarithmic scale; above 1 enlarges."""

    num_uniforms = 2

    def __init__(self, *, factor: Sequence[float] = (0.8, 1.25), probability: float = 1.0) -> None:
        self.factor = check_range(factor, self, "factor", minimum=0.05, maximum=20)
        self.probability = check_probability(probability, self)

    def _linear(self, uniforms: Tensor) -> Tensor:
        return scaling(log_uniform_between(uniforms[:, 0], *self.factor))


class Rotation(_CenteredTransform):
    """Rotate by an angle from -degrees to degrees, or from a pair [low, high]; positive is counter-clockwise."""

    num_uniforms = 2

    def __init__(self, *, degrees: float | Sequence[float] = 15.0, probability: float = 1.0) -> None:
        self.degrees = check_range(degrees, self, "degrees", center=0.0, minimum=-360, maximum=360)
        self.probability = check_probability(probability, self)

    def _linear(self, uniforms: Tensor) -> Tensor:
        return rotation(torch.deg2rad(uniform_between(uniforms[:, 0], *self.degrees)))


class Shear(_CenteredTransform):
    """Shear along x, then along y, by angles from -degrees to degrees or from a pair [low, high]."""

    num_uniforms = 3

    def __init__(
        self,
        *,
        x_degrees: float | Sequence[float] = 10.0,
        y_degrees: float | Sequence[float] = 0.0,
        probability: float = 1.0,
    ) -> None:
        self.x_degrees = check_range(x_degrees, self, "x_degrees", center=0.0, minimum=-80, maximum=80)
        self.y_degrees = check_range(y_degrees, self, "y_degrees", center=0.0, minimum=-80, maximum=80)
        self.probability = check_probability(probability, self)

    def _linear(self, uniforms: Tensor) -> Tensor:
        x = torch.tan(torch.deg2rad(uniform_between(uniforms[:, 0], *self.x_degrees)))
        y = torch.tan(torch.deg2rad(uniform_between(uniforms[:, 1], *self.y_degrees)))
        return shear(x, y)


class Perspective(Geometry):
    """Move each corner towards the center by up to `distortion` of half the width and height (0 to 0.6).

    Above two thirds, corners could cross and parts of the image could lie behind the camera.
    """

    num_uniforms = 9

    def __init__(self, *, distortion: float = 0.3, probability: float = 0.5) -> None:
        if not 0 <= distortion <= 0.6:
            raise UserError(f"augment: Perspective: distortion must be between 0 and 0.6, got {distortion}")
        self.distortion = distortion
        self.probability = check_probability(probability, self)

    def matrix(self, uniforms: Tensor, height: int, width: int) -> Tensor:
        right, bottom = width - 1.0, height - 1.0
        corners = torch.tensor([[0, 0], [right, 0], [right, bottom], [0, bottom]], dtype=torch.float64)
        inwards = torch.tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]], dtype=torch.float64)
        pull = uniforms[:, 1:].reshape(-1, 4, 2) * self.distortion * torch.tensor([right / 2, bottom / 2])
        matrix = homography(corners, corners + inwards * pull)
        return keep_identity(matrix, uniforms[:, 0] < self.probability)
