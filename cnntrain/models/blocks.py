"""Modules that more than one network is built of."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnntrain.models.norm_act import make_activation, make_norm


class ConvNormActivation(nn.Sequential):
    """A convolution, its norm, its activation; either of the last two may be 'none'."""

    def __init__(self, conv: nn.Module, norm: str = "batch", activation: str = "relu") -> None:
        channels, dimensions = conv.weight.shape[0], conv.weight.dim() - 2  # type: ignore[union-attr,operator]
        super().__init__(conv)
        if norm != "none":
            self.append(make_norm(norm, channels, dimensions))  # type: ignore[arg-type]
        if activation != "none":
            self.append(make_activation(activation))


class Residual(nn.Module):
    """body(x) + shortcut(x): He et al. 2016, equation 1."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class Branches(nn.Module):
    """Several networks on the same map, their channels concatenated."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class PadShortcut(nn.Module):
    """Shortcut without parameters: every `stride`-th pixel, new channels filled with zeros.

    Source: He et al. 2016, section 3.3, option A. The zeros stand behind the old channels.
    """

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
