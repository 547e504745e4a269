"""Geometry of resizing an image to the target size, and the matrix from source pixels to target pixels.

Coordinates are (x, y) at pixel centers: the center of the first pixel is 0. Resizing by s keeps the edges aligned, so
x' = (x + 0.5) s - 0.5. Boxes are measured from the image's edge: the whole image is (0, 0, width, height).
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Resize = Literal["letterbox", "short_side", "stretch"]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class ResizePlacement:
    """A box of the source image that is resized to a rectangle of the target, in whole target pixels."""

    box: Box  # in source pixels from the edge; may extend beyond the image
    left: int
    top: int
    width: int
    height: int

    def matrix(self) -> Tensor:
        """Return the (3, 3) float64 matrix from source to target pixel centers."""
        return _matrix(self).clone()

    def reduced(self, divisor: int) -> "ResizePlacement":
        """Return the placement for a source image that was downsampled by `divisor`."""
        if divisor == 1:
            return self
        left, top, right, bottom = (side / divisor for side in self.box)
        return replace(self, box=(left, top, right, bottom))


@lru_cache(maxsize=64)  # most images of a data set have one of a few sizes
def _matrix(placement: ResizePlacement) -> Tensor:
    left, top, right, bottom = placement.box
    scale_x, scale_y = placement.width / (right - left), placement.height / (bottom - top)
    shift_x = (0.5 - left) * scale_x - 0.5 + placement.left
    shift_y = (0.5 - top) * scale_y - 0.5 + placement.top
    return torch.tensor([[scale_x, 0, shift_x], [0, scale_y, shift_y], [0, 0, 1]], dtype=torch.float64)


@lru_cache(maxsize=64)
def resize_geometry(
    width: int, height: int, target_size: tuple[int, int], resize: Resize, box: Box | None = None
) -> ResizePlacement:
    """Return the placement of an image of `width` x `height` pixels in a target of (height, width).

    Args:
        resize: `letterbox` keeps the whole image and pads it, `short_side` fills the target and crops the longer side
            at both ends, `stretch` fills the target and changes the aspect ratio.
        box: crop this box instead, extended around its center to the aspect ratio of the target.
    """
    target_height, target_width = target_size
    if box is not None:
        return ResizePlacement(match_aspect(box, target_size), 0, 0, target_width, target_height)
    if resize == "stretch":
        return ResizePlacement((0, 0, width, height), 0, 0, target_width, target_height)
    if resize == "letterbox":
        scale = min(target_width / width, target_height / height)
        inner_width = min(target_width, max(1, round(width * scale)))
        inner_height = min(target_height, max(1, round(height * scale)))
        left, top = (target_width - inner_width) // 2, (target_height - inner_height) // 2
        return ResizePlacement((0, 0, width, height), left, top, inner_width, inner_height)
    scale = max(target_width / width, target_height / height)
    half_width, half_height = target_width / scale / 2, target_height / scale / 2
    left, right = width / 2 - half_width, width / 2 + half_width
    top, bottom = height / 2 - half_height, height / 2 + half_height
    crop = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
    return ResizePlacement(crop, 0, 0, target_width, target_height)


def match_aspect(box: Box, target_size: tuple[int, int]) -> Box:
    """Return the smallest box around `box`, with the same center, that has the aspect ratio of the target."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    aspect = target_size[1] / target_size[0]
    width, height = max(width, height * aspect), max(height, width / aspect)
    center_x, center_y = (left + right) / 2, (top + bottom) / 2
    return center_x - width / 2, center_y - height / 2, center_x + width / 2, center_y + height / 2


def expand_box(box: Box, margin: float, target_size: tuple[int, int]) -> Box:
    """Extend `box` on each side by `margin` times its longer side, then to the aspect ratio of the target."""
    left, top, right, bottom = box
    extra = margin * max(right - left, bottom - top)
    return match_aspect((left - extra, top - extra, right + extra, bottom + extra), target_size)


def box_around_points(points: Tensor, margin: float) -> Box:
    """Return the bounding box of points (K, 2), extended on each side by `margin` times its longer side."""
    low, high = points.min(0).values.tolist(), points.max(0).values.tolist()
    extra = margin * max(high[0] - low[0], high[1] - low[1], 1.0)
    return low[0] + 0.5 - extra, low[1] + 0.5 - extra, high[0] + 0.5 + extra, high[1] + 0.5 + extra


def transform_points(points: Tensor, matrix: Tensor) -> Tensor:
    """Apply affine matrices (..., 3, 3) to points (..., K, 2), in float64."""
    return points.double() @ matrix[..., :2, :2].mT + matrix[..., None, :2, 2]


def parse_size(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) from `data.size`, which is one number for a square or [height, width]."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    valid = all(isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= 8192 for side in pair)
    if len(pair) != 2 or not valid:
        raise ValueError(f"size must be pixels from 1 to 8192, one number or [height, width], got {size!r}")
    return pair[0], pair[1]
