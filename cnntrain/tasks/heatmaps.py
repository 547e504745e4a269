"""Keypoint heatmaps: Gaussian targets from points, and points from heatmaps with sub-pixel precision.

A map of h x w cells covers the image with aligned corners: cell 0 lies on pixel 0 and cell w - 1 on pixel W - 1, so
that flipping the image flips the map.
"""

import torch
from torch import Tensor

from cnntrain.transfer import constant


def pixels_to_cells(points: Tensor, image_size: tuple[int, int], map_size: tuple[int, int]) -> Tensor:
    """Convert image pixels to cells, (..., 2) as (x, y). Sizes are (height, width)."""
    return points * constant(_cells_per_pixel(image_size, map_size), points.device, points.dtype)


def cells_to_pixels(points: Tensor, image_size: tuple[int, int], map_size: tuple[int, int]) -> Tensor:
    """Convert cells to image pixels, (..., 2) as (x, y). Sizes are (height, width)."""
    return points / constant(_cells_per_pixel(image_size, map_size), points.device, points.dtype)


def _cells_per_pixel(image_size: tuple[int, int], map_size: tuple[int, int]) -> list[float]:
    (height, width), (h, w) = image_size, map_size
    return [max(w - 1, 1) / max(width - 1, 1), max(h - 1, 1) / max(height - 1, 1)]


def log_gaussian(points: Tensor, map_size: tuple[int, int], sigma: float) -> Tensor:
    """Return -distance**2 / (2 sigma**2) of every cell to each point: (N, K, 2) in cells -> (N, K, h, w)."""
    h, w = map_size
    x = torch.arange(w, device=points.device, dtype=points.dtype) - points[..., 0:1]  # (N, K, w)
    y = torch.arange(h, device=points.device, dtype=points.dtype) - points[..., 1:2]  # (N, K, h)
    return -(y.square()[..., :, None] + x.square()[..., None, :]) / (2 * sigma**2)


def decode(log_heat: Tensor) -> Tensor:
    """Return the peak of each map, (N, K, h, w) -> (N, K, 2) as (x, y) in fractional cells.

    Starts at the highest cell and takes one Newton step on the logarithm of the heat. The logarithm of a Gaussian is
    quadratic, so the step is exact for a map that equals its target (Zhang et al., Distribution-aware coordinate
    representation, CVPR 2020, equation 8). A step is at most one cell long. Peaks on the border are not refined
    across it.
    """
    h, w = log_heat.shape[2:]
    peak = log_heat.flatten(2).argmax(2)  # (N, K)
    x, y = peak % w, peak // w

    def heat(dx: int, dy: int) -> Tensor:
        index = (y + dy).clamp(0, h - 1) * w + (x + dx).clamp(0, w - 1)
        return log_heat.flatten(2).gather(2, index[..., None])[..., 0]

    center = heat(0, 0)
    grad_x, grad_y = (heat(1, 0) - heat(-1, 0)) / 2, (heat(0, 1) - heat(0, -1)) / 2
    hess_xx, hess_yy = heat(1, 0) - 2 * center + heat(-1, 0), heat(0, 1) - 2 * center + heat(0, -1)
    hess_xy = (heat(1, 1) - heat(1, -1) - heat(-1, 1) + heat(-1, -1)) / 4
    inside_x, inside_y = (x > 0) & (x < w - 1), (y > 0) & (y < h - 1)
    hess_xy = torch.where(inside_x & inside_y, hess_xy, 0.0)

    determinant = hess_xx * hess_yy - hess_xy.square()
    is_maximum = (hess_xx < 0) & (hess_yy < 0) & (determinant > 0)  # not a saddle or a plateau
    safe = torch.where(is_maximum, determinant, 1.0)
    newton_x, newton_y = ((hess_xy * grad_y - hess_yy * grad_x) / safe, (hess_xy * grad_x - hess_xx * grad_y) / safe)
    # Elsewhere, take one Newton step along each axis separately.
    step_x = torch.where(is_maximum, newton_x, -grad_x / hess_xx.clamp(max=-1e-12))
    step_y = torch.where(is_maximum, newton_y, -grad_y / hess_yy.clamp(max=-1e-12))
    step_x = torch.where(inside_x & (hess_xx < 0), step_x, 0.0).clamp(-1, 1)
    step_y = torch.where(inside_y & (hess_yy < 0), step_y, 0.0).clamp(-1, 1)
    return torch.stack([x + step_x, y + step_y], -1)
