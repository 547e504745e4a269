"""Images and masks moved by matrices: by gathering pixels where they move in whole steps, else by one grid
resample.

Both fill what comes from outside the image in one of three ways (`border`): `zero` is black, `edge` repeats
the last pixel, `reflect` mirrors the image about the center of its last pixel. A mask's outside is always the
ignore id. The border is filled before the colors are changed: black paper that the picture lies on, seen
through the same camera.
"""

import torch
from torch import Tensor
from torch.nn import functional

from cnntrain.augment.blur import gaussian_blur
from cnntrain.transfer import arange, constant, to_device

BORDERS = {"zero": "zeros", "edge": "border", "reflect": "reflection"}  # ours: torch's
# Bilinear sampling looks at two pixels a side: beyond this many pixels per step it would skip some
# (aliasing).
_LARGEST_STEP_PX = 1.5


class Gather:
    """Moves batches by flips and whole-pixel shifts: exact, and in the type they have.

    Args:
        matrix: (N, 3, 3) float64 on the CPU, input to output pixels, diagonal +-1 and whole offsets.
        size, output_size: (height, width) in pixels.
        border: see the module.
        device: where the batches are.
    """

    def __init__(
        self,
        matrix: Tensor,
        size: tuple[int, int],
        output_size: tuple[int, int],
        border: str,
        device: torch.device,
    ) -> None:
        self._border = border
        self._output_size = output_size
        # Along each axis, output place r shows input place sign * r + start: (N, 2) int64 as (x, y).
        sign = matrix[:, :2, :2].diagonal(dim1=1, dim2=2).long()
        start = (sign * matrix[:, :2, 2].long()).neg_()
        last = constant((output_size[1] - 1, output_size[0] - 1), sign.device, torch.int64)
        end = torch.addcmul(start, sign, last)
        # How far they reach beyond the image: known on the CPU, so that asking makes no device wait.
        low, high = torch.minimum(start, end).amin(0).tolist(), torch.maximum(start, end).amax(0).tolist()
        left, top = (max(0, -each) for each in low)
        right, bottom = (max(0, high[axis] - size[1 - axis] + 1) for axis in (0, 1))
        self._margin = [left, right, top, bottom]
        width = left + size[1] + right
        # Three numbers per image go to the device, which computes the indices of all pixels.
        first = start[:, 0] + start[:, 1] * width + (left + top * width)
        steps = to_device(torch.stack([first, sign[:, 0], sign[:, 1] * width], dim=1), device)
        first, column_step, row_step = steps.unsqueeze(2).unbind(1)  # (N, 1) each
        rows = torch.addcmul(first, row_step, arange(output_size[0], device))  # (N, H')
        columns = column_step * arange(output_size[1], device)  # (N, W')
        self._index = (rows[:, :, None] + columns[:, None, :]).flatten(1)  # (N, H' * W')

    def images(self, images: Tensor) -> Tensor:
        """(N, C, H, W) of any type -> (N, C, H', W') of the same type."""
        return self._pick(pad(images, self._margin, self._border))

    def mask(self, mask: Tensor, ignore_index: int) -> Tensor:
        """(N, H, W) integer ids -> (N, H', W'), `ignore_index` where no pixel of the mask lands."""
        return self._pick(functional.pad(mask.unsqueeze(1), self._margin, value=ignore_index)).squeeze(1)

    def _pick(self, padded: Tensor) -> Tensor:
        count, channels = padded.shape[:2]
        index = self._index[:, None, :].expand(-1, channels, -1)
        return padded.reshape(count, channels, -1).gather(2, index).view(count, channels, *self._output_size)


def pad(images: Tensor, margin: list[int], border: str) -> Tensor:
    """Images (N, C, H, W) of any type with `margin` (left, right, top, bottom) pixels of `border` around."""
    if not any(margin):
        return images
    if border == "zero":
        return functional.pad(images, margin)
    for dim, before, after in ((2, *margin[2:]), (3, *margin[:2])):
        length = images.shape[dim]
        place = torch.arange(-before, length + after, device=images.device)
        if border == "reflect":
            period = max(2 * length - 2, 1)
            place = length - 1 - (place % period - (length - 1)).abs()
        images = images.index_select(dim, place.clamp_(0, length - 1))
    return images


class GridResample:
    """Moves batches by any homography: one bilinear resample in float32 (nearest for masks)."""

    def __init__(
        self,
        matrix: Tensor,
        size: tuple[int, int],
        output_size: tuple[int, int],
        border: str,
        device: torch.device,
    ) -> None:
        inverse = torch.linalg.inv(matrix)  # an image asks where its pixels come from
        self._border = BORDERS[border]
        self._grid = sampling_grid(inverse, size, output_size, device)
        self._step_px = step_px(inverse, output_size)

    def images(self, images: Tensor) -> Tensor:
        """(N, C, H, W) of any type -> (N, C, H', W') float32 on the same scale."""
        values = images.float()
        images = prefilter(values.clone() if values is images else values, self._step_px)
        return functional.grid_sample(
            images, self._grid, mode="bilinear", padding_mode=self._border, align_corners=True
        )

    def mask(self, mask: Tensor, ignore_index: int) -> Tensor:
        """(N, H, W) integer ids -> (N, H', W'), `ignore_index` where no pixel of the mask lands."""
        # Shifted, so that the zeros outside are the ignore id.
        shifted = (mask.float() - ignore_index).unsqueeze(1)
        moved = functional.grid_sample(
            shifted, self._grid, mode="nearest", padding_mode="zeros", align_corners=True
        )
        return (moved + ignore_index).squeeze(1).to(mask.dtype)


def sampling_grid(
    inverse: Tensor, size: tuple[int, int], output_size: tuple[int, int], device: torch.device
) -> Tensor:
    """(N, H', W', 2) float32: each output pixel's place in the input, from -1 (first center) to 1 (last).

    Args:
        inverse: (N, 3, 3) float64 on the CPU, output to input pixels.
    """
    height, width = size
    to_unit = torch.tensor(
        [[2 / max(width - 1, 1), 0, -1], [0, 2 / max(height - 1, 1), -1], [0, 0, 1]], dtype=torch.float64
    )
    scaled = to_unit @ inverse
    projective = bool((scaled[:, 2, :2] != 0).any())
    rows = to_device(scaled, device, torch.float32)
    y, x = (arange(length, device, torch.float32) for length in output_size)
    along_x = rows[:, :, 0, None] * x  # (N, 3, W')
    along_y = rows[:, :, 1, None] * y + rows[:, :, 2, None]  # (N, 3, H')
    grid = torch.empty(len(inverse), *output_size, 2, device=device)
    for axis in (0, 1):
        torch.add(along_x[:, axis, None, :], along_y[:, axis, :, None], out=grid[..., axis])
    if projective:
        weight = (along_x[:, 2, None, :] + along_y[:, 2, :, None]).unsqueeze(-1)  # (N, H', W', 1)
        # Behind the camera nothing is seen: far outside.
        grid = torch.where(weight > 1e-6, grid / weight.clamp(min=1e-6), 2e3)
    return grid


def step_px(inverse: Tensor, output_size: tuple[int, int]) -> Tensor:
    """(N, 2) float64: the input pixels along x and y that one output pixel steps over, at the center."""
    height, width = output_size
    center = torch.tensor([(width - 1) / 2, (height - 1) / 2, 1], dtype=torch.float64)
    place = inverse @ center  # (N, 3)
    weight = place[:, 2, None, None]
    jacobian = (inverse[:, :2, :2] - place[:, :2, None] / weight * inverse[:, 2:, :2]) / weight
    return jacobian.norm(dim=2)


def prefilter(images: Tensor, step: Tensor) -> Tensor:
    """Images (N, C, H, W) float, blurred in place where `step` (N, 2) is so wide that sampling would skip pixels."""
    shrunk = (step > _LARGEST_STEP_PX).any(1).nonzero()[:, 0]
    if len(shrunk) == 0:
        return images
    step = step[shrunk]
    # With the bilinear sampling, which adds 1 / 6, as wide as the triangle of 2 output pixels by which Pillow and
    # torchvision shrink: its variance is step**2 / 6.
    sigma_px = torch.where(step > _LARGEST_STEP_PX, ((step**2 - 1) / 6).clamp(min=0).sqrt(), 0.0)
    rows = to_device(shrunk, images.device)
    return images.index_copy_(0, rows, gaussian_blur(images.index_select(0, rows), sigma_px))
