"""Apply geometric matrices to images, masks and keypoints.

Images and masks that only flip and shift by whole pixels are gathered (`GatherSampler`, exact); all others are
interpolated on a grid (`GridSampler`).

What lies outside an image is filled according to `border`: `zero` is black, `edge` repeats the last pixel, `reflect`
mirrors the image about the center of its last pixel. A mask is always filled with the ignore index. Borders are filled
before colors are changed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cnntrain.augment.effects import gaussian_blur
from cnntrain.transfer import arange, constant, to_device
from cnntrain.types import Size

PADDING_MODES = {"zero": "zeros", "edge": "border", "reflect": "reflection"}  # border: name in grid_sample
# Bilinear sampling reads two pixels per axis. With more input pixels per output pixel than this, it would alias.
MAX_STEP_PX = 1.5


class GatherSampler:
    """Apply flips and whole-pixel shifts to batches, exactly and without changing their type.

    Args:
        matrix: (N, 3, 3) float64 on the CPU, from input to output pixels, with +-1 on the diagonal and whole offsets.
        input_size, output_size: (height, width) in pixels.
        border: `zero`, `edge` or `reflect`.
        device: device of the batches.
    """

    def __init__(self, matrix: Tensor, input_size: Size, output_size: Size, border: str, device: torch.device) -> None:
        self._border = border
        self._output_size = output_size
        # Along each axis, output pixel i shows input pixel sign * i + start; both are (N, 2) int64 as (x, y).
        sign = matrix[:, :2, :2].diagonal(dim1=1, dim2=2).long()
        start = (sign * matrix[:, :2, 2].long()).neg_()
        last = constant((output_size[1] - 1, output_size[0] - 1), sign.device, torch.int64)
        end = torch.addcmul(start, sign, last)
        # Padding that covers all images. It is computed on the CPU to avoid a host sync.
        low, high = torch.minimum(start, end).amin(0).tolist(), torch.maximum(start, end).amax(0).tolist()
        left, top = (max(0, -first) for first in low)
        right, bottom = max(0, high[0] - input_size[1] + 1), max(0, high[1] - input_size[0] + 1)
        self._padding = [left, right, top, bottom]
        row_length = left + input_size[1] + right
        # Copy three numbers per image to the device, which computes the index of every output pixel from them.
        first = start[:, 0] + start[:, 1] * row_length + (left + top * row_length)
        steps = to_device(torch.stack([first, sign[:, 0], sign[:, 1] * row_length], dim=1), device)
        first, column_step, row_step = steps.unsqueeze(2).unbind(1)  # (N, 1) each
        rows = torch.addcmul(first, row_step, arange(output_size[0], device))  # (N, H')
        columns = column_step * arange(output_size[1], device)  # (N, W')
        self._index = (rows[:, :, None] + columns[:, None, :]).flatten(1)  # (N, H' * W')

    def images(self, images: Tensor) -> Tensor:
        """(N, C, H, W) of any type -> (N, C, H', W') of the same type."""
        return self._gather(pad(images, self._padding, self._border))

    def masks(self, masks: Tensor, ignore_index: int) -> Tensor:
        """(N, H, W) class ids -> (N, H', W'), `ignore_index` outside the mask."""
        padded = F.pad(masks.unsqueeze(1), self._padding, value=ignore_index)
        return self._gather(padded).squeeze(1)

    def _gather(self, padded: Tensor) -> Tensor:
        count, channels = padded.shape[:2]
        index = self._index[:, None, :].expand(-1, channels, -1)
        return padded.reshape(count, channels, -1).gather(2, index).view(count, channels, *self._output_size)


def pad(images: Tensor, padding: list[int], border: str) -> Tensor:
    """Pad images (N, C, H, W) of any type by (left, right, top, bottom) pixels.

    `F.pad` cannot replicate or reflect uint8 images, nor pad by more than the image size.
    """
    if not any(padding):
        return images
    if border == "zero":
        return F.pad(images, padding)
    for dim, before, after in ((2, *padding[2:]), (3, *padding[:2])):
        length = images.shape[dim]
        index = torch.arange(-before, length + after, device=images.device)
        if border == "reflect":
            period = max(2 * length - 2, 1)
            index = length - 1 - (index % period - (length - 1)).abs()
        images = images.index_select(dim, index.clamp_(0, length - 1))
    return images


class GridSampler:
    """Apply any homographies to batches: bilinear interpolation in float32, nearest neighbor for masks."""

    def __init__(self, matrix: Tensor, input_size: Size, output_size: Size, border: str, device: torch.device) -> None:
        inverse = torch.linalg.inv(matrix)  # from output to input pixels
        self._padding_mode = PADDING_MODES[border]
        self._grid = sampling_grid(inverse, input_size, output_size, device)
        self._step_px = sampling_step(inverse, output_size)

    def images(self, images: Tensor) -> Tensor:
        """(N, C, H, W) of any type -> (N, C, H', W') float32 on the same scale."""
        copied = images.clone() if images.dtype == torch.float32 else images.float()
        filtered = blur_before_shrinking(copied, self._step_px)
        return F.grid_sample(filtered, self._grid, mode="bilinear", padding_mode=self._padding_mode, align_corners=True)

    def masks(self, masks: Tensor, ignore_index: int) -> Tensor:
        """(N, H, W) class ids -> (N, H', W'), `ignore_index` outside the mask."""
        # Subtract the ignore index, so that the zeros outside become the ignore index when it is added again.
        shifted = (masks.float() - ignore_index).unsqueeze(1)
        sampled = F.grid_sample(shifted, self._grid, mode="nearest", padding_mode="zeros", align_corners=True)
        return (sampled + ignore_index).squeeze(1).to(masks.dtype)


def sampling_grid(inverse: Tensor, input_size: Size, output_size: Size, device: torch.device) -> Tensor:
    """Return (N, H', W', 2) float32: the input position of each output pixel, from -1 (first center) to 1 (last)."""
    height, width = input_size
    to_unit = torch.tensor(
        [[2 / max(width - 1, 1), 0, -1], [0, 2 / max(height - 1, 1), -1], [0, 0, 1]], dtype=torch.float64
    )
    matrix = to_unit @ inverse
    is_projective = bool((matrix[:, 2, :2] != 0).any())
    matrix = to_device(matrix, device, torch.float32)
    y, x = (arange(length, device, torch.float32) for length in output_size)
    along_x = matrix[:, :, 0, None] * x  # (N, 3, W')
    along_y = matrix[:, :, 1, None] * y + matrix[:, :, 2, None]  # (N, 3, H')
    grid = torch.empty(len(inverse), *output_size, 2, device=device)
    for axis in (0, 1):
        torch.add(along_x[:, axis, None, :], along_y[:, axis, :, None], out=grid[..., axis])
    if is_projective:
        weight = (along_x[:, 2, None, :] + along_y[:, 2, :, None]).unsqueeze(-1)  # (N, H', W', 1)
        # Points behind the camera are moved far outside the image.
        grid = torch.where(weight > 1e-6, grid / weight.clamp(min=1e-6), 2e3)
    return grid


def sampling_step(inverse: Tensor, output_size: Size) -> Tensor:
    """Return (N, 2) float64: input pixels along x and y per output pixel, at the center of the output."""
    height, width = output_size
    center = torch.tensor([(width - 1) / 2, (height - 1) / 2, 1], dtype=torch.float64)
    position = inverse @ center  # (N, 3)
    weight = position[:, 2, None, None]
    jacobian = (inverse[:, :2, :2] - position[:, :2, None] / weight * inverse[:, 2:, :2]) / weight
    return jacobian.norm(dim=2)


def blur_before_shrinking(images: Tensor, step_px: Tensor) -> Tensor:
    """Blur images (N, C, H, W) float in place where sampling with `step_px` (N, 2) would skip pixels."""
    shrunk = (step_px > MAX_STEP_PX).any(1).nonzero()[:, 0]
    if len(shrunk) == 0:
        return images
    step = step_px[shrunk]
    # Pillow and torchvision shrink with a triangle of 2 output pixels, whose variance is step**2 / 6. Bilinear
    # sampling contributes 1 / 6, the blur the rest.
    sigma_px = torch.where(step > MAX_STEP_PX, ((step**2 - 1) / 6).clamp(min=0).sqrt(), 0.0)
    index = to_device(shrunk, images.device)
    return images.index_copy_(0, index, gaussian_blur(images.index_select(0, index), sigma_px))


def is_flipped(matrix: Tensor, height: int, width: int) -> Tensor:
    """Return (N,) bool: whether a matrix (N, 3, 3) exchanges left and right.

    It does if its determinant is negative; for a perspective, the determinant of its Jacobian at the center of the
    height x width px image. Two flips, and a rotation by 180 degrees, have a positive one.
    """
    weight = matrix[:, 2, 0] * (width - 1) / 2 + matrix[:, 2, 1] * (height - 1) / 2 + matrix[:, 2, 2]
    return torch.linalg.det(matrix) * weight < 0  # the determinant of the Jacobian is det / weight**3


def swap_flip_pairs(
    points: Tensor, valid: Tensor, flipped: Tensor, flip_pairs: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Exchange left and right in points (N, K, 2) and valid (N, K) of flipped images, (N,) bool on the CPU."""
    if not bool(flipped.any()):
        return points, valid
    partner = torch.where(flipped[:, None], torch.tensor(flip_pairs), torch.arange(len(flip_pairs)))
    partner = to_device(partner, points.device)  # (N, K)
    return points.gather(1, partner[:, :, None].expand(-1, -1, 2)), valid.gather(1, partner)


def transform_points(points: Tensor, valid: Tensor, matrix: Tensor, output_size: Size) -> tuple[Tensor, Tensor]:
    """Apply matrices (N, 3, 3) float64 on the CPU to points (N, K, 2) with valid (N, K) bool.

    Points outside the output or behind the camera become invalid.
    """
    rows = to_device(matrix, points.device, points.dtype)[:, None]  # (N, 1, 3, 3)
    x, y = points[..., 0, None], points[..., 1, None]
    position = rows[..., 0] * x + rows[..., 1] * y + rows[..., 2]  # (N, K, 3)
    in_front = position[..., 2] > 1e-6
    moved = position[..., :2] / torch.where(in_front, position[..., 2], 1.0)[..., None]
    height, width = output_size
    # A pixel extends half a pixel around its center.
    inside = (moved >= -0.5).all(-1) & (moved[..., 0] <= width - 0.5) & (moved[..., 1] <= height - 0.5)
    return moved, valid & in_front & inside
