"""Keypoints under the matrices that move the images: whoever mirrors, relabels; one function does both."""

import torch
from torch import Tensor

from cnntrain.transfer import to_device


def is_mirrored(matrix: Tensor, height: int, width: int) -> Tensor:
    """(N,) bool: whether a matrix (N, 3, 3) turns left into right.

    That is a negative determinant; for a perspective the Jacobian's at the center of the height x width px
    image. A turn by 180 degrees and two mirrors have a positive one, a flip composed with any rotation a
    negative one.
    """
    weight = matrix[:, 2, 0] * (width - 1) / 2 + matrix[:, 2, 1] * (height - 1) / 2 + matrix[:, 2, 2]
    return torch.linalg.det(matrix) * weight < 0  # the Jacobian's determinant is det / weight^3


def move_points(
    points: Tensor,
    valid: Tensor,
    matrix: Tensor,
    mirrored: Tensor,
    mirror: tuple[int, ...] | None,
    output_size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Points and visibility after the move, renamed where the image was mirrored.

    Args:
        points: (N, K, 2) (x, y) pixels at pixel centers; valid: (N, K) bool.
        matrix: (N, 3, 3) float64 on the CPU, input to output pixels; mirrored: (N,) bool on the CPU.
        mirror: each point's partner, or None (then nothing may be mirrored).
        output_size: (height, width): points outside it, or behind the camera, become invisible.
    """
    device = points.device
    keypoints = valid.shape[1]
    if mirror is not None and bool(mirrored.any()):
        partner = torch.where(mirrored[:, None], torch.tensor(mirror), torch.arange(keypoints))
        partner = to_device(partner, device)  # (N, K)
        points = points.gather(1, partner[:, :, None].expand(-1, -1, 2))
        valid = valid.gather(1, partner)
    rows = to_device(matrix, device, points.dtype)[:, None]  # (N, 1, 3, 3)
    x, y = points[..., 0, None], points[..., 1, None]
    place = rows[..., 0] * x + rows[..., 1] * y + rows[..., 2]  # (N, K, 3)
    before = place[..., 2] > 1e-6
    moved = place[..., :2] / torch.where(before, place[..., 2], 1.0)[..., None]
    height, width = output_size
    # A pixel reaches half a step around its center.
    inside = (moved >= -0.5).all(-1) & (moved[..., 0] <= width - 0.5) & (moved[..., 1] <= height - 0.5)
    return moved, valid & before & inside
