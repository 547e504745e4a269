"""Pieces of a per-pixel task: the Dice loss, and how outputs of another size meet a mask."""

import torch
from torch import Tensor


def dice_loss(logits: Tensor, label: Tensor, labeled: Tensor) -> Tensor:
    """1 - soft Dice of each image, mean over the classes that it has: (N,).

    Dice of a class is 2 sum(p g) / (sum(p) + sum(g)) over labeled pixels, p the probability and g the truth
    (Milletari et al., V-Net, 3DV 2016, without the squares, so that a perfect answer gives 0).

    Args:
        logits: (N, C, H, W). label: (N, H, W) int64. labeled: (N, H, W) bool, which pixels count.
    """
    probability = logits.softmax(1) * labeled[:, None]
    truth = torch.zeros_like(probability).scatter_(1, label[:, None], labeled[:, None].to(probability.dtype))
    overlap = (probability * truth).sum((2, 3))
    sizes, total = truth.sum((2, 3)), probability.sum((2, 3))
    present = sizes > 0
    dice = torch.where(present, 2 * overlap / (total + sizes).clamp(min=1e-12), 0.0)
    classes = present.sum(1)
    return torch.where(classes > 0, 1 - dice.sum(1) / classes.clamp(min=1), 0.0)


def choose_fit(given: tuple[int, ...], wanted: tuple[int, ...], scale: float | None) -> str | None:
    """How outputs of another size meet the mask: 'crop', 'upsample', or None where their sizes don't say.

    Args:
        given, wanted: (height, width) of the outputs and of the mask.
        scale: output pixels per image pixel of the network; None: not known.
    """
    if scale == 1:
        return "crop"  # a network without padding shows the middle
    if not scale:
        return "upsample" if is_fraction(given, wanted) else None
    covers_all = all(abs(g - scale * w) <= 1 for g, w in zip(given, wanted, strict=True))
    return "upsample" if covers_all else None


def is_fraction(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether `given` is `wanted` divided by one power of 2, rounded up or down."""
    for power in range(1, 8):
        step = 2**power
        if all(g in (w // step, -(-w // step)) for g, w in zip(given, wanted, strict=True)):
            return True
    return False


def center(tensor: Tensor, height: int, width: int) -> Tensor:
    """The middle (height, width) of the last two axes, as a view."""
    top, left = (tensor.shape[-2] - height) // 2, (tensor.shape[-1] - width) // 2
    return tensor[..., top : top + height, left : left + width]
