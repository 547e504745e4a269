"""Norms, activations, dropout, and small blocks shared by the networks and the layer list."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from cnntrain.errors import UserError, suggest

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
NORMS = ("batch", "layer", "instance", "group", "none")
_LEVELS = 2**16  # resolution of the dropout probability


class LayerNorm(nn.GroupNorm):
    """Normalize each image over all its channels and pixels, with a scale and a shift per channel.

    Unlike `nn.LayerNorm`, it does not depend on the image size. Source: Wu and He 2018, Group Normalization, figure 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)


class ChannelShuffle(nn.Module):
    """Interleave the channels of `groups` groups (ShuffleNet, Zhang et al. 2018, section 3.1)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class ConvNormActivation(nn.Sequential):
    """A convolution, a norm and an activation; norm and activation may be 'none'."""

    def __init__(self, conv: nn.Module, norm: str = "batch", activation: str = "relu") -> None:
        channels, dimensions = conv.weight.shape[0], conv.weight.dim() - 2  # type: ignore[union-attr,operator]
        super().__init__(conv)
        if norm != "none":
            self.append(make_norm(norm, channels, dimensions))  # type: ignore[arg-type]
        if activation != "none":
            self.append(make_activation(activation))


class Residual(nn.Module):
    """body(x) + shortcut(x) (He et al. 2016, equation 1)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class Branches(nn.Module):
    """Apply several networks to the same input and concatenate their channels."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class PadShortcut(nn.Module):
    """Shortcut without parameters: subsample by `stride` and append channels of zeros.

    Source: He et al. 2016, section 3.3, option A.
    """

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class Dropout(nn.Dropout):
    """`nn.Dropout` with a faster mask on CPUs; see `dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)


def dropout(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Compute `F.dropout`; on CPUs with a faster mask (Srivastava et al. 2014).

    On CPUs, PyTorch draws one double per element, sequentially. Here each element uses 16 random bits, so one 64-bit
    draw covers four elements. `p` is rounded to a multiple of 2**-16; the scale 1 / (1 - p) uses the rounded value.
    Measured: 4 % of a training step of model=fmnist_cnn.
    """
    if has_torch_function_unary(input):
        overridden: Any = handle_torch_function(dropout, (input,), input, p=p, training=training)
        return overridden
    threshold = round(p * _LEVELS)
    fast = input.device.type == "cpu" and not torch.compiler.is_compiling()  # GPUs and the compiler fuse PyTorch's
    if not training or not fast or not 0 < threshold < _LEVELS:
        return F.dropout(input, p, training)
    mask = torch.empty_like(input, requires_grad=False)
    draws = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    digits = draws.view(torch.int16).as_strided(mask.shape, mask.stride())
    torch.ge(digits, threshold - _LEVELS // 2, out=mask)
    return input * mask.mul_(_LEVELS / (_LEVELS - threshold))


def check_choice(key: str, value: object, choices: Sequence[str]) -> None:
    """Raise UserError that names the key and suggests a similar choice, unless `value` is one of `choices`."""
    if value not in choices:
        similar = suggest(str(value), tuple(choices))
        raise UserError(f"model.{key}: {value!r} is not one of {', '.join(choices)}{similar}")


def make_activation(name: str) -> nn.Module:
    """Return a new activation; UserError if `name` is unknown."""
    check_choice("activation", name, tuple(ACTIVATIONS))
    return ACTIVATIONS[name]()


def make_norm(name: str, channels: int, dimensions: int = 2) -> nn.Module:
    """Return a new norm for inputs with `dimensions` spatial dimensions (0: vectors); UserError if `name` is unknown.

    'group' uses the largest number of groups up to 32 that divides the channels (Wu and He 2018, section 4.1).
    For vectors, 'instance' falls back to 'layer', because instance norm would return zeros.
    """
    check_choice("norm", name, NORMS)
    if name == "batch":
        return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions](channels)
    if name == "layer" or (name == "instance" and dimensions == 0):
        return LayerNorm(channels)
    if name == "instance":
        kind = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dimensions - 1]
        return kind(channels, affine=True)
    if name == "group":
        return nn.GroupNorm(math.gcd(32, channels), channels)
    return nn.Identity()
