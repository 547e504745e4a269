"""Dropout (Srivastava et al. 2014) whose mask costs a fraction of torch's on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function_unary

LEVELS = 2**16  # of a probability; beyond them it is rounded


class Dropout(nn.Dropout):
    """nn.Dropout in all but the draw: see `dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)


def dropout(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Zeros with probability `p`, and what is left divided by 1 - p, in training; else the input.

    torch draws a double for each number on a CPU, one after the other. 16 random bits are enough for a number, and one
    draw of torch's generator has 64; p is rounded to a multiple of 2**-16, and what is left is scaled by exactly that.
    """
    if has_torch_function_unary(input):
        watched: Any = handle_torch_function(dropout, (input,), input, p=p, training=training)
        return watched
    threshold = round(p * LEVELS)
    ours = (
        input.device.type == "cpu" and not torch.compiler.is_compiling()
    )  # GPUs and the compiler fuse torch's
    if not training or not ours or not 0 < threshold < LEVELS:
        return functional.dropout(input, p, training)
    mask = torch.empty_like(input, requires_grad=False)
    draws = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    digits = draws.view(torch.int16).as_strided(mask.shape, mask.stride())
    torch.ge(digits, threshold - LEVELS // 2, out=mask)
    return input * mask.mul_(LEVELS / (LEVELS - threshold))
