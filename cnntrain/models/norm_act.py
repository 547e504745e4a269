"""Norms and activations by name: what a block, a layer list and the `norm=` and `activation=` keys share."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from cnntrain.errors import UserError, suggest


class LayerNorm(nn.GroupNorm):
    """Normalizes each example over all its channels and pixels, with a scale and shift per channel.

    Source: Ba et al. 2016 for convolutions, as in Wu and He 2018, figure 2: it knows no image size.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}"


class ChannelShuffle(nn.Module):
    """Deals the channels of `groups` groups out in turn (ShuffleNet, Zhang et al. 2018, section 3.1)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.01),
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


def check_word(key: str, word: object, known: Sequence[str]) -> None:
    """UserError that names the key and the near miss, unless `word` is one of `known`."""
    if word not in known:
        near = suggest(str(word), tuple(known))
        raise UserError(f"model.{key}: {word!r} is not one of {', '.join(known)}{near}")


def make_activation(name: str, key: str = "activation") -> nn.Module:
    """The activation called `name`; UserError with the near miss where there is none."""
    check_word(key, name, tuple(ACTIVATIONS))
    return ACTIVATIONS[name]()


def make_norm(name: str, channels: int, dimensions: int = 2, key: str = "norm") -> nn.Module:
    """The norm called `name` for maps of `dimensions` dimensions (0: flat vectors).

    'group' takes the largest number of groups up to 32 that divides the channels (Wu and He 2018, section
    4.1). 'instance' of a flat vector would be zero everywhere: there it is 'layer'.
    """
    check_word(key, name, NORMS)
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
