"""Where an image of any size lies on the canvas, and the matrix that says so.

Coordinates are (x, y) at pixel centers: the first pixel's center is 0. Resizing by s keeps edges on edges, so
that x' = (x + 0.5) s - 0.5. Boxes count from the image's edge: the whole image is (0, 0, width, height).
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Resize = Literal["letterbox", "short_side", "stretch"]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ResizePlacement:
    """A box of the source is resized onto a rectangle of the canvas.

    Attributes:
        box: left, top, right, bottom in source pixels from the edge; may lie partly outside the image.
        left, top, width, height: the rectangle, whole canvas pixels.
    """

    box: Box
    left: int
    top: int
    width: int
    height: int

    def matrix(self) -> Tensor:
        """(3, 3) float64, from source to canvas pixel centers."""
        return _matrix(self).clone()

    def reduced(self, divisor: int) -> "ResizePlacement":
        """The same for a source that was made smaller by this."""
        if divisor == 1:
            return self
        left, top, right, bottom = (side / divisor for side in self.box)
        return replace(self, box=(left, top, right, bottom))


@lru_cache(maxsize=64)  # most images of a set are of a few sizes
def _matrix(placement: ResizePlacement) -> Tensor:
    left, top, right, bottom = placement.box
    scale_x, scale_y = placement.width / (right - left), placement.height / (bottom - top)
    shift_x = (0.5 - left) * scale_x - 0.5 + placement.left
    shift_y = (0.5 - top) * scale_y - 0.5 + placement.top
    return torch.tensor([[scale_x, 0, shift_x], [0, scale_y, shift_y], [0, 0, 1]], dtype=torch.float64)


@lru_cache(maxsize=64)
def place(
    width: int, height: int, canvas: tuple[int, int], resize: Resize, box: Box | None = None
) -> ResizePlacement:
    """How an image of `width` x `height` pixels comes onto a canvas of (height, width).

    `letterbox` shows all of it with borders, `short_side` fills the canvas and cuts what stands over at both
    ends, `stretch` fills it and changes the aspect. A given `box` is widened to the canvas's aspect instead,
    around its center, and fills the canvas.
    """
    canvas_height, canvas_width = canvas
    if box is not None:
        return ResizePlacement(widen(box, canvas), 0, 0, canvas_width, canvas_height)
    if resize == "stretch":
        return ResizePlacement((0, 0, width, height), 0, 0, canvas_width, canvas_height)
    if resize == "letterbox":
        scale = min(canvas_width / width, canvas_height / height)
        inner_width = min(canvas_width, max(1, round(width * scale)))
        inner_height = min(canvas_height, max(1, round(height * scale)))
        left, top = (canvas_width - inner_width) // 2, (canvas_height - inner_height) // 2
        return ResizePlacement((0, 0, width, height), left, top, inner_width, inner_height)
    scale = max(canvas_width / width, canvas_height / height)
    half_width, half_height = canvas_width / scale / 2, canvas_height / scale / 2
    cut = (width / 2 - half_width, height / 2 - half_height, width / 2 + half_width, height / 2 + half_height)
    inside = (max(cut[0], 0.0), max(cut[1], 0.0), min(cut[2], float(width)), min(cut[3], float(height)))
    return ResizePlacement(inside, 0, 0, canvas_width, canvas_height)


def widen(box: Box, canvas: tuple[int, int]) -> Box:
    """The smallest box of the canvas's aspect that has `box` in its middle."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    aspect = canvas[1] / canvas[0]
    width, height = max(width, height * aspect), max(height, width / aspect)
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    return middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2


def box_around(points: Tensor, margin: float) -> Box:
    """The box of points (K, 2), larger on each side by `margin` times its longer side."""
    low, high = points.min(0).values.tolist(), points.max(0).values.tolist()
    longer = max(high[0] - low[0], high[1] - low[1], 1.0)
    more = margin * longer
    return low[0] + 0.5 - more, low[1] + 0.5 - more, high[0] + 0.5 + more, high[1] + 0.5 + more


def move(points: Tensor, matrix: Tensor) -> Tensor:
    """Points (..., K, 2) through affine matrices (..., 3, 3), in float64."""
    return points.double() @ matrix[..., :2, :2].mT + matrix[..., None, :2, 2]


def canvas_size(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) from `data.size`: one number for a square, or [height, width].

    Raises:
        ValueError: neither of the two, or below 1 or above 8192 px.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    whole = all(isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= 8192 for side in pair)
    if len(pair) != 2 or not whole:
        raise ValueError(f"size must be pixels from 1 to 8192, one number or [height, width], got {size!r}")
    return pair[0], pair[1]
