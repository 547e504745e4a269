"""Effects on the finished batch that are no matrix: erasing, blur, noise."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cnntrain.augment.base import Effect, between, checked_probability, checked_range
from cnntrain.augment.blur import gaussian_blur
from cnntrain.transfer import arange, to_device


def boxes_mask(box: Tensor, height: int, width: int, device: torch.device) -> Tensor:
    """(N, 1, height, width) bool: which pixels lie in the box of each image.

    Args:
        box: (N, 4) on the CPU: left, top, width, height in whole pixels.
    """
    left, top, box_width, box_height = to_device(box, device, torch.int64).unbind(1)
    x, y = arange(width, device), arange(height, device)
    columns = (x >= left[:, None]) & (x < (left + box_width)[:, None])  # (N, W)
    rows = (y >= top[:, None]) & (y < (top + box_height)[:, None])  # (N, H)
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


class RandomErasing(Effect):
    """Covers a random box with the mean color (Zhong et al. 2020, Random Erasing).

    Keypoints and mask stay as they are: what is hidden is still there.

    Args:
        scale: [low, high], share of the image's area.
        ratio: [low, high], width by height, drawn on a log scale.
    """

    draws = 5

    def __init__(
        self,
        *,
        scale: Sequence[float] = (0.02, 0.2),
        ratio: Sequence[float] = (0.3, 3.3),
        probability: float = 0.5,
    ) -> None:
        self.scale = checked_range(scale, self, "scale", lowest=0.0, highest=1.0)
        self.ratio = checked_range(ratio, self, "ratio", lowest=1e-2, highest=1e2)
        self.probability = checked_probability(probability, self)

    def apply(
        self, images: Tensor, targets: dict[str, Tensor], draws: Tensor, std: Sequence[float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        height, width = images.shape[2:]
        area_px = between(draws[:, 1], *self.scale) * height * width
        area_px = torch.where(draws[:, 0] < self.probability, area_px, 0.0)
        ratio = torch.exp(between(draws[:, 2], *(math.log(value) for value in self.ratio)))
        box_width = (area_px * ratio).sqrt().round().clamp(max=width)
        box_height = (area_px / ratio).sqrt().round().clamp(max=height)
        left = torch.floor(draws[:, 3] * (width - box_width + 1))
        top = torch.floor(draws[:, 4] * (height - box_height + 1))
        box = torch.stack([left, top, box_width, box_height], dim=1)
        kept = ~boxes_mask(box, height, width, images.device)
        return images.mul_(kept.to(images.dtype)), targets  # normalized: the mean color is 0


class Blur(Effect):
    """A Gaussian whose standard deviation is drawn from `sigma_px` = [low, high] pixels."""

    draws = 2

    def __init__(self, *, sigma_px: Sequence[float] = (0.1, 1.5), probability: float = 0.5) -> None:
        self.low, self.high = checked_range(sigma_px, self, "sigma_px", lowest=0.0, highest=100.0)
        self.probability = checked_probability(probability, self)

    def apply(
        self, images: Tensor, targets: dict[str, Tensor], draws: Tensor, std: Sequence[float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sigma_px = between(draws[:, 1], self.low, self.high)
        chosen = (draws[:, 0] < self.probability).nonzero()[:, 0]
        if len(chosen) == 0:
            return images, targets
        rows = to_device(chosen, images.device)
        blurred = gaussian_blur(images.index_select(0, rows), sigma_px[chosen, None].expand(-1, 2))
        return images.index_copy_(0, rows, blurred), targets


class Noise(Effect):
    """Adds to each pixel and channel a normal number of its own; its standard deviation is drawn per image.

    Args:
        strength: [low, high], standard deviation on the 0-1 scale.
    """

    draws = 3

    def __init__(self, *, strength: Sequence[float] = (0.0, 0.1), probability: float = 0.5) -> None:
        self.low, self.high = checked_range(strength, self, "strength", lowest=0.0, highest=10.0)
        self.probability = checked_probability(probability, self)

    def apply(
        self, images: Tensor, targets: dict[str, Tensor], draws: Tensor, std: Sequence[float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        strength = torch.where(draws[:, 0] < self.probability, between(draws[:, 1], self.low, self.high), 0.0)
        per_channel = strength[:, None] / torch.tensor(std, dtype=torch.float64)  # (N, C)
        per_channel = to_device(per_channel, images.device, torch.float32)[:, :, None, None]
        keys = to_device(draws[:, 2] * 2**32, images.device, torch.int64)
        noise = normal_field(keys, images[0].numel()).view(images.shape)
        return images.addcmul_(noise, per_channel), targets


def normal_field(keys: Tensor, count: int) -> Tensor:
    """(N, count) float32 standard normal numbers: a hash of each key and the place, the same on every device.

    torch's own generators won't do: their rows change with the batch's size.

    Args:
        keys: (N,) int64 from 0 to 2**32 - 1.
    """
    word = (torch.arange(count, device=keys.device) * 0x9E3779B9 + keys[:, None]) & 0xFFFFFFFF
    # Chris Wellons' lowbias32 finaliser (Hash Function Prospector, 2018), in 64 bits for want of unsigned 32.
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    word = ((word ^ (word >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    word = (word ^ (word >> 16)) >> 9  # 23 bits: float32 holds them and the half exactly, so never 0 or 1
    uniform = (word.float() + 0.5) * 2.0**-23
    return torch.erfinv(2 * uniform - 1) * math.sqrt(2)
