"""Effects that are not matrices: random erasing, Gaussian blur and noise, mixup and cutmix."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cnntrain.augment.base import Effect, Targets, check_probability, check_range, log_uniform_between, uniform_between
from cnntrain.errors import UserError
from cnntrain.transfer import arange, to_device


def box_mask(box: Tensor, height: int, width: int, device: torch.device) -> Tensor:
    """Return (N, 1, height, width) bool: which pixels lie inside `box` (N, 4): left, top, width, height in pixels."""
    left, top, box_width, box_height = to_device(box, device, torch.int64).unbind(1)
    x, y = arange(width, device), arange(height, device)
    columns = (x >= left[:, None]) & (x < (left + box_width)[:, None])  # (N, W)
    rows = (y >= top[:, None]) & (y < (top + box_height)[:, None])  # (N, H)
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


def gaussian_blur(images: Tensor, sigma_px: Tensor) -> Tensor:
    """Blur each image (N, C, H, W) with its own Gaussian, `sigma_px` (N, 2) along x and y; 0 leaves an axis unchanged.

    The kernel is applied as a sum of shifted copies instead of a convolution, so that the bits of an image do not
    depend on the rest of the batch.
    """
    for axis, dim in ((0, 3), (1, 2)):
        sigma = sigma_px[:, axis].double()
        radius = min(math.ceil(3 * float(sigma.max())), images.shape[dim] - 1)
        if radius < 1:
            continue
        offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
        own_radius = torch.ceil(3 * sigma)[:, None]  # independent of the larger sigmas of other images
        weights = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-6)[:, None]) ** 2)
        weights = weights * (offsets.abs() <= own_radius)
        weights = to_device(weights / weights.sum(1, keepdim=True), images.device, images.dtype)
        padding = [radius, radius, 0, 0] if dim == 3 else [0, 0, radius, radius]
        padded = F.pad(images, padding, mode="reflect")
        total = torch.zeros_like(images)
        for i in range(2 * radius + 1):
            total.addcmul_(padded.narrow(dim, i, images.shape[dim]), weights[:, i, None, None, None])
        images = total
    return images


def normal_noise(keys: Tensor, count: int) -> Tensor:
    """Return (N, count) float32 standard normal numbers, hashed from keys (N,) int64 below 2**32 and the position.

    The same numbers on every device. The generators of torch are not used because their rows depend on the batch size.
    """
    word = (torch.arange(count, device=keys.device) * 0x9E3779B9 + keys[:, None]) & 0xFFFFFFFF
    # The lowbias32 finalizer of Chris Wellons (Hash Function Prospector, 2018), in 64 bits because torch lacks
    # arithmetic on uint32.
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    word = ((word ^ (word >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    word = (word ^ (word >> 16)) >> 9  # float32 holds 23 bits plus a half exactly: never 0 or 1
    uniform = (word.float() + 0.5) * 2.0**-23
    return torch.erfinv(2 * uniform - 1) * math.sqrt(2)


def beta_quantile(uniforms: Tensor, alpha: float) -> Tensor:
    """Return the quantiles of Beta(alpha, alpha) at `uniforms` (N,)."""
    if alpha == 1:
        return uniforms
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, uniforms.numpy()))


class RandomErasing(Effect):
    """Replace a random box by the mean color (Zhong et al. 2020).

    Keypoints and masks are not changed.

    Args:
        scale: [low, high], area of the box as a fraction of the image area.
        ratio: [low, high], width / height of the box, drawn on a logarithmic scale.
        probability: of erasing a box.
    """

    num_uniforms = 5

    def __init__(
        self, *, scale: Sequence[float] = (0.02, 0.2), ratio: Sequence[float] = (0.3, 3.3), probability: float = 0.5
    ) -> None:
        self.scale = check_range(scale, self, "scale", minimum=0.0, maximum=1.0)
        self.ratio = check_range(ratio, self, "ratio", minimum=1e-2, maximum=1e2)
        self.probability = check_probability(probability, self)

    def apply(self, images: Tensor, targets: Targets, uniforms: Tensor, std: Sequence[float]) -> tuple[Tensor, Targets]:
        height, width = images.shape[2:]
        area_px = uniform_between(uniforms[:, 1], *self.scale) * height * width
        area_px = torch.where(uniforms[:, 0] < self.probability, area_px, 0.0)
        ratio = log_uniform_between(uniforms[:, 2], *self.ratio)
        box_width = (area_px * ratio).sqrt().round().clamp(max=width)
        box_height = (area_px / ratio).sqrt().round().clamp(max=height)
        left = torch.floor(uniforms[:, 3] * (width - box_width + 1))
        top = torch.floor(uniforms[:, 4] * (height - box_height + 1))
        box = torch.stack([left, top, box_width, box_height], dim=1)
        kept = ~box_mask(box, height, width, images.device)
        return images.mul_(kept.to(images.dtype)), targets  # the mean color is 0 after normalization


class GaussianBlur(Effect):
    """Blur with a Gaussian whose standard deviation is drawn from `sigma_px` = [low, high] pixels."""

    num_uniforms = 2

    def __init__(self, *, sigma_px: Sequence[float] = (0.1, 1.5), probability: float = 0.5) -> None:
        self.sigma_px = check_range(sigma_px, self, "sigma_px", minimum=0.0, maximum=100.0)
        self.probability = check_probability(probability, self)

    def apply(self, images: Tensor, targets: Targets, uniforms: Tensor, std: Sequence[float]) -> tuple[Tensor, Targets]:
        sigma_px = uniform_between(uniforms[:, 1], *self.sigma_px)
        chosen = (uniforms[:, 0] < self.probability).nonzero()[:, 0]
        if len(chosen) == 0:
            return images, targets
        index = to_device(chosen, images.device)
        blurred = gaussian_blur(images.index_select(0, index), sigma_px[chosen, None].expand(-1, 2))
        return images.index_copy_(0, index, blurred), targets


class GaussianNoise(Effect):
    """Add independent normal noise to each pixel and channel.

    Args:
        strength: [low, high], range of the standard deviation on the 0-1 scale, drawn per image.
        probability: of adding noise.
    """

    num_uniforms = 3

    def __init__(self, *, strength: Sequence[float] = (0.0, 0.1), probability: float = 0.5) -> None:
        self.strength = check_range(strength, self, "strength", minimum=0.0, maximum=10.0)
        self.probability = check_probability(probability, self)

    def apply(self, images: Tensor, targets: Targets, uniforms: Tensor, std: Sequence[float]) -> tuple[Tensor, Targets]:
        strength = uniform_between(uniforms[:, 1], *self.strength)
        strength = torch.where(uniforms[:, 0] < self.probability, strength, 0.0)
        per_channel = strength[:, None] / torch.tensor(std, dtype=torch.float64)  # (N, C)
        per_channel = to_device(per_channel, images.device, torch.float32)[:, :, None, None]
        keys = to_device(uniforms[:, 2] * 2**32, images.device, torch.int64)
        noise = normal_noise(keys, images[0].numel()).view(images.shape)
        return images.addcmul_(noise, per_channel), targets


class MixUpCutMix(Effect):
    """Mix each image with the previous one of the batch, by mixup or cutmix. (The order of an epoch is random.)

    Adds two targets: `label_b` (N,) int64, the label of the other image, and `mix` (N,) float32, the weight of `label`
    from 0 to 1 (1 where nothing was mixed): loss = mix * loss(label) + (1 - mix) * loss(label_b).

    Args:
        alpha: parameter of Beta(alpha, alpha), from which the weight is drawn; 1 is uniform, small values mix little.
        cutmix_share: probability of cutmix (pasting a box) instead of mixup (blending).
        probability: of mixing at all.
    """

    mixes_labels = True
    num_uniforms = 5

    def __init__(self, *, alpha: float = 0.2, cutmix_share: float = 0.0, probability: float = 1.0) -> None:
        if not alpha > 0:
            raise UserError(f"augment: {type(self).__name__}: alpha must be positive, got {alpha}")
        self.alpha = alpha
        self.cutmix_share = check_probability(cutmix_share, self, "cutmix_share")
        self.probability = check_probability(probability, self)

    def apply(self, images: Tensor, targets: Targets, uniforms: Tensor, std: Sequence[float]) -> tuple[Tensor, Targets]:
        if "label" not in targets:
            raise UserError("augment: mixup and cutmix mix class labels, which this dataset does not have")
        device, (height, width) = images.device, images.shape[2:]
        weight = beta_quantile(uniforms[:, 1], self.alpha)
        weight = torch.where(uniforms[:, 0] < self.probability, weight, 1.0)
        is_cutmix = uniforms[:, 2] < self.cutmix_share
        box = _cutmix_box(1 - weight, uniforms[:, 3:], height, width)
        weight = torch.where(is_cutmix, 1 - box[:, 2] * box[:, 3] / (height * width), weight)
        mix = to_device(weight, device, torch.float32)
        own = mix[:, None, None, None]
        if self.cutmix_share > 0:
            outside = (~box_mask(box, height, width, device)).float()
            own = torch.where(to_device(is_cutmix, device)[:, None, None, None], outside, own)
        # lerp(a, b, 0) keeps the bits of a.
        mixed = torch.lerp(images, images.roll(1, 0), 1 - own)
        return mixed, targets | {"label_b": targets["label"].roll(1, 0), "mix": mix}


def _cutmix_box(area: Tensor, uniforms: Tensor, height: int, width: int) -> Tensor:
    """Return boxes (N, 4) as in `box_mask` with `area` (N,) as a fraction of the image, cut at the image edge.

    `uniforms` (N, 2) is the position of the center along x and y (Yun et al. 2019, equation 2).
    """
    side = area.sqrt()
    low, high = [], []
    for length, uniform in zip((width, height), uniforms.unbind(1), strict=True):
        center, half = torch.floor(uniform * length), torch.floor(side * length / 2)
        low.append((center - half).clamp(0, length))
        high.append((center + half).clamp(0, length))
    return torch.stack([*low, high[0] - low[0], high[1] - low[1]], dim=1)


class MixUp(MixUpCutMix):
    """Blend each image with the previous one of the batch (Zhang et al. 2018)."""

    def __init__(self, *, alpha: float = 0.2, probability: float = 1.0) -> None:
        super().__init__(alpha=alpha, cutmix_share=0.0, probability=probability)


class CutMix(MixUpCutMix):
    """Paste a box of the previous image of the batch into each image (Yun et al. 2019)."""

    def __init__(self, *, alpha: float = 1.0, probability: float = 1.0) -> None:
        super().__init__(alpha=alpha, cutmix_share=1.0, probability=probability)
