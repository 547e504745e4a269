"""From the canvas back to the pixels of the source image, without waiting for the device."""

import torch
from torch import Tensor

from cnntrain.transfer import to_device


def unmap_points(points: Tensor, source_to_image: Tensor) -> Tensor:
    """Points (N, K, 2) on the canvas -> (N, K, 2) in the source, by the inverse of `source_to_image` (N, 3, 3)."""
    matrix = to_device(source_to_image, points.device, points.dtype)
    inverse = inverse_3x3(matrix)
    moved = points @ inverse[:, :2, :2].mT + inverse[:, None, :2, 2]
    weight = points @ inverse[:, 2:, :2].mT + inverse[:, None, 2:, 2]  # 1 unless it is a perspective
    return moved / weight


def inverse_3x3(matrix: Tensor) -> Tensor:
    """Inverse of (N, 3, 3) by cofactors; `torch.linalg.inv` would wait for the device to check for singular
    ones."""
    a, b, c = matrix.unbind(1)  # rows
    cofactors = torch.stack([torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)], 2)
    return cofactors / (a * torch.linalg.cross(b, c)).sum(1)[:, None, None]


def source_pixels_per_canvas_pixel(
    source_to_image: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(N,) on `device`: source pixels per image pixel, along one side, for `source_to_image` (N, 3, 3)."""
    a, b, c, d = source_to_image[:, :2, :2].flatten(1).unbind(1)
    return to_device((a * d - b * c).abs().rsqrt(), device, dtype)
