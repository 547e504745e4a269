"""Distances that a regression may minimize, by name. All are 0 at 0 and grow with the absolute error."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor], Tensor]


def mse(error: Tensor) -> Tensor:
    """error**2"""
    return error.square()


def l1(error: Tensor) -> Tensor:
    """|error|"""
    return error.abs()


def smooth_l1(error: Tensor, beta: float) -> Tensor:
    """Quadratic within `beta`, linear beyond (Girshick, Fast R-CNN, 2015, equation 3)."""
    size = error.abs()
    return torch.where(size < beta, 0.5 * size.square() / beta, size - 0.5 * beta)


def wing(error: Tensor, width: float, curvature: float) -> Tensor:
    """Logarithmic within `width`, linear beyond (Feng et al., Wing Loss, CVPR 2018, equation 5).

    Small errors get a larger gradient than under L1, up to width / curvature times.
    """
    size = error.abs()
    offset = width - width * math.log1p(width / curvature)
    return torch.where(size < width, width * torch.log1p(size / curvature), size - offset)


def make_distance(name: str, beta: float, width: float, curvature: float) -> Distance:
    """The distance called `name`, with its constants bound."""
    if name == "smooth_l1":
        return lambda error: smooth_l1(error, beta)
    if name == "wing":
        return lambda error: wing(error, width, curvature)
    return {"mse": mse, "l1": l1}[name]
