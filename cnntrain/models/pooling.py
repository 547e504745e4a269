"""Adaptive average pooling with a deterministic backward pass on CUDA (PyTorch's is nondeterministic)."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnntrain.transfer import constant


def make_pooling_deterministic(model: nn.Module) -> None:
    """Make the network's `nn.AdaptiveAvgPool2d` modules use `deterministic_adaptive_avg_pool2d`."""
    for module in model.modules():
        if type(module) is nn.AdaptiveAvgPool2d:
            size = module.output_size
            height, width = size if isinstance(size, tuple) else (size, size)
            module.forward = partial(deterministic_adaptive_avg_pool2d, height=height, width=width)


def deterministic_adaptive_avg_pool2d(input: Tensor, height: int | None, width: int | None) -> Tensor:
    """Compute `functional.adaptive_avg_pool2d` for (N, C, H, W) or (C, H, W) input; None keeps a side.

    If the output size divides the input size, the windows do not overlap and average pooling with a stride is used.
    Otherwise the input is multiplied by one matrix per side.
    """
    height, width = height or input.shape[-2], width or input.shape[-1]
    if (height, width) == (1, 1):
        return input.mean((-2, -1), keepdim=True)
    if input.shape[-2] % height == 0 and input.shape[-1] % width == 0:
        return functional.avg_pool2d(input, (input.shape[-2] // height, input.shape[-1] // width))
    rows = window_means(input.shape[-2], height, input.device)
    columns = window_means(input.shape[-1], width, input.device)
    with torch.autocast(input.device.type, enabled=False):  # bf16 would round the averaging weights
        return (rows @ input.float() @ columns.mT).to(input.dtype)


def window_means(length: int, output_length: int, device: torch.device) -> Tensor:
    """Return the averaging matrix (output_length, length) float32.

    Row i averages inputs floor(i * length / output_length) to ceil((i + 1) * length / output_length), end excluded, as
    in `torch.nn.AdaptiveAvgPool2d`.
    """
    rows = []
    for row in range(output_length):
        start, end = row * length // output_length, -(-(row + 1) * length // output_length)
        rows += [1 / (end - start) if start <= i < end else 0.0 for i in range(length)]
    return constant(rows, device).view(output_length, length)
