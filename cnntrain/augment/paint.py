"""Color matrices and normalization laid over whole batches, in as few passes over memory as possible."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cnntrain.transfer import constant, to_device


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, C, H, W) on the 0-255 scale, of any type -> float32, (value / 255 - mean) / std per channel."""
    scale = constant([1 / (255 * s) for s in std], images.device).view(1, -1, 1, 1)
    offset = constant([-m / s for m, s in zip(mean, std, strict=True)], images.device).view(1, -1, 1, 1)
    # Not in place: images that are float already may belong to the caller.
    return (images.float() * scale).add_(offset)


def paint(
    images: Tensor, color: Tensor, uses_mean: bool, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Images after their color matrix, clamped to 0-1 once, and normalized.

    Scale, matrix and normalization are one matrix; the clamp's bounds are moved along instead of the pixels.

    Args:
        images: (N, C, H, W) on the 0-255 scale, of any type; C is 1 or 3.
        color: (N, 3, 7) float64 on the CPU, see `Color`.
        uses_mean: whether its middle part can be other than zero.
        mean, std: per channel on the 0-1 scale.

    Returns:
        (N, C, H, W) float32.
    """
    count, channels, height, width = images.shape
    if channels == 1:  # a gray image is a color one with three equal channels
        parts = color[:, :1].split((3, 3, 1), dim=2)
        color = torch.cat([part.sum(2, keepdim=True) for part in parts], dim=2)  # (N, 1, 3)
    pixel, of_mean, offset = color.split((channels, channels, 1), dim=2)
    mean_column, std_column = (torch.tensor(values, dtype=torch.float64)[:, None] for values in (mean, std))
    folded = torch.cat(
        [
            pixel / (255 * std_column),
            of_mean / (255 * height * width * std_column),
            (offset - mean_column) / std_column,
        ],
        dim=2,
    )
    folded = to_device(folded, images.device, torch.float32)
    pixel, of_mean, offset = folded.split((channels, channels, 1), dim=2)
    values = images.float().reshape(count, channels, height * width)
    if uses_mean:
        # Rows in float32 (whole numbers stay exact), then float64: no bit depends on the batch's size.
        wide = torch.float32 if images.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        row_sums = values.view(count, channels, height, width).sum(3)
        sums = row_sums.sum(2, dtype=wide).float()  # (N, C)
        offset = offset + (of_mean * sums[:, None, :]).sum(2, keepdim=True)
    result = _affine(values, pixel, offset)
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        result[:, channel].clamp_(-m / s, (1 - m) / s)
    return result.view(images.shape)


def _affine(values: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """matrix (N, C, C) times values (N, C, P) plus offset (N, C, 1)."""
    if values.device.type == "cpu":
        return torch.baddbmm(offset, matrix, values)
    # A GPU's matrix product may round to TF32 (10 bits) and choose its order by the batch size.
    return affine_by_channel(values, matrix, offset)


def affine_by_channel(values: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """The same as a sum over channels, always in their order and in full precision."""
    result = torch.empty_like(values)
    for row in range(matrix.shape[1]):
        out = result[:, row]
        torch.addcmul(offset[:, row], values[:, 0], matrix[:, row, 0, None], out=out)
        for column in range(1, matrix.shape[2]):
            out.addcmul_(values[:, column], matrix[:, row, column, None])
    return result
