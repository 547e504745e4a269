"""Heat maps of keypoints: from points to Gaussian targets, and back with sub-pixel precision.

A map of h x w cells covers the canvas corner to corner, as everywhere at pixel centers: cell 0 lies on pixel
0 and cell w - 1 on pixel W - 1, so that a flip of the canvas is a flip of the map.
"""

import torch
from torch import Tensor

from cnntrain.transfer import constant


def to_cells(points: Tensor, canvas: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Canvas pixels -> cells, (..., 2) as (x, y); `canvas` and `cells` are (height, width)."""
    return points * constant(_ratio(canvas, cells), points.device, points.dtype)


def to_pixels(points: Tensor, canvas: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Cells -> canvas pixels, (..., 2) as (x, y)."""
    return points / constant(_ratio(canvas, cells), points.device, points.dtype)


def _ratio(canvas: tuple[int, int], cells: tuple[int, int]) -> list[float]:
    (height, width), (h, w) = canvas, cells
    return [max(w - 1, 1) / max(width - 1, 1), max(h - 1, 1) / max(height - 1, 1)]


def log_gaussian(points: Tensor, cells: tuple[int, int], sigma: float) -> Tensor:
    """-distance**2 / (2 sigma**2) of every cell from each point: (N, K, 2) in cells -> (N, K, h, w)."""
    h, w = cells
    x = torch.arange(w, device=points.device, dtype=points.dtype) - points[..., 0:1]  # (N,K,w)
    y = torch.arange(h, device=points.device, dtype=points.dtype) - points[..., 1:2]  # (N,K,h)
    return -(y.square()[..., :, None] + x.square()[..., None, :]) / (2 * sigma**2)


def decode(log_heat: Tensor) -> Tensor:
    """The peak of each map, (N, K, h, w) -> (N, K, 2) as (x, y) in cells, to a fraction of a cell.

    From the highest cell one Newton step on the logarithm of the heat, which is quadratic for a Gaussian: the
    step is exact for a heat map that equals its target (Zhang et al., Distribution-aware coordinate
    representation, CVPR 2020, equation 8). A peak on the border keeps its whole cell across it, and no step
    is longer than one cell.
    """
    h, w = log_heat.shape[2:]
    peak = log_heat.flatten(2).argmax(2)  # (N,K)
    x, y = peak % w, peak // w

    def heat(dx: int, dy: int) -> Tensor:
        index = (y + dy).clamp(0, h - 1) * w + (x + dx).clamp(0, w - 1)
        return log_heat.flatten(2).gather(2, index[..., None])[..., 0]

    center = heat(0, 0)
    slope_x, slope_y = (heat(1, 0) - heat(-1, 0)) / 2, (heat(0, 1) - heat(0, -1)) / 2
    bend_x, bend_y = heat(1, 0) - 2 * center + heat(-1, 0), heat(0, 1) - 2 * center + heat(0, -1)
    twist = (heat(1, 1) - heat(1, -1) - heat(-1, 1) + heat(-1, -1)) / 4
    inside_x, inside_y = (x > 0) & (x < w - 1), (y > 0) & (y < h - 1)
    twist = torch.where(inside_x & inside_y, twist, 0.0)

    determinant = bend_x * bend_y - twist.square()
    curved = (bend_x < 0) & (bend_y < 0) & (determinant > 0)  # a maximum, not a saddle or a plateau
    safe = torch.where(curved, determinant, 1.0)
    step_x = torch.where(
        curved, (twist * slope_y - bend_y * slope_x) / safe, -slope_x / bend_x.clamp(max=-1e-12)
    )
    step_y = torch.where(
        curved, (twist * slope_x - bend_x * slope_y) / safe, -slope_y / bend_y.clamp(max=-1e-12)
    )
    step_x = torch.where(inside_x & (bend_x < 0), step_x, 0.0).clamp(-1, 1)
    step_y = torch.where(inside_y & (bend_y < 0), step_y, 0.0).clamp(-1, 1)
    return torch.stack([x + step_x, y + step_y], -1)
