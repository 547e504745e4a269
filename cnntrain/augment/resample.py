"""Images and masks moved by matrices: by gathering pixels where they move in whole steps, else by one grid
resample.

Both fill what comes from outside the image in one of three ways (`border`): `zero` is black, `edge` repeats
the last pixel, `reflect` mirrors the image about the centre of its last pixel. A mask's outside is always the
ignore id. The border is filled before the colours are changed: black paper that the picture lies on, seen
through the same camera.
"""

import torch
from torch import Tensor
from torch.nn import functional

from cnntrain.augment.blur import gaussian_blur

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
        # Where each output row and column comes from: (N, H') and (N, W').
        rows = _places(matrix[:, 1, 1], matrix[:, 1, 2], output_size[0])
        columns = _places(matrix[:, 0, 0], matrix[:, 0, 2], output_size[1])
        # How far they reach beyond the image: known on the CPU, so that asking makes no device wait.
        self._margin = [*_reach(columns, size[1]), *_reach(rows, size[0])]
        left, right, top, _ = self._margin
        rows = (rows + top).mul_(size[1] + left + right).to(device, non_blocking=True)
        columns = (columns + left).to(device, non_blocking=True)
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


def _places(sign: Tensor, offset: Tensor, length: int) -> Tensor:
    """(N, length) int64: the input places of output 0, 1, ... under out = sign * in + offset, each (N,)."""
    return (sign[:, None] * (torch.arange(length, dtype=torch.float64) - offset[:, None])).long()


def _reach(places: Tensor, length: int) -> tuple[int, int]:
    """How many pixels `places` go beyond either end of an image of `length` pixels."""
    low, high = places.aminmax()
    return max(0, -int(low)), max(0, int(high) - length + 1)


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
        images = prefilter(images.float(), self._step_px)
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
    """(N, H', W', 2) float32: each output pixel's place in the input, from -1 (first centre) to 1 (last).

    Args:
        inverse: (N, 3, 3) float64 on the CPU, output to input pixels.
    """
    height, width = size
    to_unit = torch.tensor(
        [[2 / max(width - 1, 1), 0, -1], [0, 2 / max(height - 1, 1), -1], [0, 0, 1]], dtype=torch.float64
    )
    scaled = to_unit @ inverse
    projective = bool((scaled[:, 2, :2] != 0).any())
    rows = scaled.float().to(device, non_blocking=True)
    x = torch.arange(output_size[1], device=device, dtype=torch.float32)
    y = torch.arange(output_size[0], device=device, dtype=torch.float32)
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
    """(N, 2) float64: the input pixels along x and y that one output pixel steps over, at the centre."""
    height, width = output_size
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2, 1], dtype=torch.float64)
    place = inverse @ centre  # (N, 3)
    weight = place[:, 2, None, None]
    jacobian = (inverse[:, :2, :2] - place[:, :2, None] / weight * inverse[:, 2:, :2]) / weight
    return jacobian.norm(dim=2)


def prefilter(images: Tensor, step: Tensor) -> Tensor:
    """Images (N, C, H, W) float, blurred where `step` (N, 2) is so wide that sampling would skip pixels."""
    shrunk = (step > _LARGEST_STEP_PX).any(1).nonzero()[:, 0]
    if len(shrunk) == 0:
        return images
    step = step[shrunk]
    sigma_px = torch.where(step > _LARGEST_STEP_PX, 0.5 * (step**2 - 1).clamp(min=0).sqrt(), 0.0)
    rows = shrunk.to(images.device, non_blocking=True)
    return images.index_copy(0, rows, gaussian_blur(images.index_select(0, rows), sigma_px))
