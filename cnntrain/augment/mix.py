"""Mixing pairs of images and their labels: mixup and cutmix, for classification."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cnntrain.augment.base import Effect, checked_probability
from cnntrain.augment.effects import boxes_mask
from cnntrain.errors import UserError
from cnntrain.transfer import to_device


class Mix(Effect):
    """Each image mixed with its predecessor in the batch (the order of an epoch is random already).

    Adds two targets: `label_b` (N,) int64, the partner's label, and `mix` (N,) float32, the weight of `label`
    from 0 to 1 (1 where nothing was mixed): loss = mix * loss(label) + (1 - mix) * loss(label_b).

    Args:
        alpha: of the Beta(alpha, alpha) that the weight is drawn from; 1 is uniform, small ones mix little.
        cutmix_share: probability of pasting a box of the partner (cutmix) instead of blending with it
            (mixup).
        probability: of mixing at all.
    """

    mixes_labels = True
    draws = 5

    def __init__(self, *, alpha: float = 0.2, cutmix_share: float = 0.0, probability: float = 1.0) -> None:
        if not alpha > 0:
            raise UserError(f"augment: {type(self).__name__}: alpha must be positive, not {alpha}")
        self.alpha = alpha
        if not 0 <= cutmix_share <= 1:
            raise UserError(f"augment: Mix: cutmix_share must lie between 0 and 1, not {cutmix_share}")
        self.cutmix_share = cutmix_share
        self.probability = checked_probability(probability, self)

    def apply(
        self, images: Tensor, targets: dict[str, Tensor], draws: Tensor, std: Sequence[float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if "label" not in targets:
            raise UserError("augment: mixup and cutmix mix labels; this data set has none")
        device, (height, width) = images.device, images.shape[2:]
        weight = torch.where(draws[:, 0] < self.probability, beta_quantile(draws[:, 1], self.alpha), 1.0)
        cut = draws[:, 2] < self.cutmix_share
        # A box whose area is the partner's share, its center anywhere (Yun et al. 2019, equation 2).
        side = (1 - weight).sqrt()
        low, high = [], []
        for length, column in ((width, 3), (height, 4)):
            center = torch.floor(draws[:, column] * length)
            half = torch.floor(side * length / 2)
            low.append((center - half).clamp(0, length))
            high.append((center + half).clamp(0, length))
        box = torch.stack([low[0], low[1], high[0] - low[0], high[1] - low[1]], dim=1)
        weight = torch.where(cut, 1 - box[:, 2] * box[:, 3] / (height * width), weight)
        mix = to_device(weight, device, torch.float32)
        own = mix[:, None, None, None]
        if self.cutmix_share > 0:
            kept = (~boxes_mask(box, height, width, device)).float()
            own = torch.where(to_device(cut, device)[:, None, None, None], kept, own)
        # images + (partner - images) * share keeps an unmixed image's bits.
        mixed = torch.lerp(images, images.roll(1, 0), 1 - own)
        return mixed, targets | {"label_b": targets["label"].roll(1, 0), "mix": mix}


class Mixup(Mix):
    """Blends each image with its predecessor in the batch (Zhang et al. 2018)."""

    def __init__(self, *, alpha: float = 0.2, probability: float = 1.0) -> None:
        super().__init__(alpha=alpha, cutmix_share=0.0, probability=probability)


class Cutmix(Mix):
    """Pastes a box of its predecessor in the batch into each image (Yun et al. 2019)."""

    def __init__(self, *, alpha: float = 1.0, probability: float = 1.0) -> None:
        super().__init__(alpha=alpha, cutmix_share=1.0, probability=probability)


def beta_quantile(uniform: Tensor, alpha: float) -> Tensor:
    """Where the Beta(alpha, alpha) distribution reaches `uniform` (N,)."""
    if alpha == 1:
        return uniform
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, uniform.numpy()))
