"""Gaussian blur with a strength of its own for each image of a batch, along each axis."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from cnntrain.transfer import to_device


def gaussian_blur(images: Tensor, sigma_px: Tensor) -> Tensor:
    """Each image blurred by its own Gaussian; a sigma of 0 leaves its axis alone.

    The sum runs over shifted copies, not through a convolution: an image's bits then don't depend on its
    neighbors.

    Args:
        images: (N, C, H, W) float.
        sigma_px: (N, 2) on the CPU, standard deviation along x and y in pixels.
    """
    for axis, dim in ((0, 3), (1, 2)):
        sigma = sigma_px[:, axis].double()
        radius = min(math.ceil(3 * float(sigma.max())), images.shape[dim] - 1)
        if radius < 1:
            continue
        taps = torch.arange(-radius, radius + 1, dtype=torch.float64)
        reach = torch.ceil(3 * sigma)[:, None]  # each image's own radius: its neighbors' must not widen it
        weights = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-6)[:, None]) ** 2) * (taps.abs() <= reach)
        weights = to_device(weights / weights.sum(1, keepdim=True), images.device, images.dtype)
        margin = [radius, radius, 0, 0] if dim == 3 else [0, 0, radius, radius]
        padded = functional.pad(images, margin, mode="reflect")
        total = torch.zeros_like(images)
        for tap in range(2 * radius + 1):
            shifted = padded.narrow(dim, tap, images.shape[dim])
            total.addcmul_(shifted, weights[:, tap, None, None, None])
        images = total
    return images
