"""Layers of a list that slide no window: norms, dropouts, dense layers, reshapings."""

from torch import nn

from cnntrain.models.dropout import Dropout
from cnntrain.models.norm_act import ChannelShuffle, make_norm
from cnntrain.models.sequential.shapes import Place, sizes


def batch_norm(place: Place, momentum: float = 0.1, eps: float = 1e-5) -> nn.Module:
    """Batch normalization; `momentum` is the weight of the new batch (Keras writes one minus that)."""
    norm = make_norm("batch", place.channels, place.dimensions)
    norm.momentum, norm.eps = momentum, eps  # type: ignore[assignment]
    return norm


def layer_norm(place: Place) -> nn.Module:
    """Normalizes each example over all its channels and pixels."""
    return make_norm("layer", place.channels, place.dimensions)


def instance_norm(place: Place) -> nn.Module:
    """Normalizes each channel of each example over its pixels."""
    place.map_size()
    return make_norm("instance", place.channels, place.dimensions)


def group_norm(place: Place, groups: int | None = None) -> nn.Module:
    """Normalizes each example over groups of channels; without `groups`, up to 32 of them."""
    return nn.GroupNorm(groups, place.channels) if groups else make_norm("group", place.channels)


def lrn(place: Place, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> nn.Module:
    """Local response normalization over `size` channels (Krizhevsky et al. 2012, section 3.3).

    torch divides alpha by the size, the paper doesn't: alpha is given as the paper has it.
    """
    place.map_size()
    return nn.LocalResponseNorm(size, alpha * size, beta, k)


def dropout(place: Place, probability: float = 0.5) -> nn.Module:
    """Sets single numbers to zero in training."""
    return Dropout(probability)


def dropout1d(place: Place, probability: float = 0.5) -> nn.Module:
    """Sets whole channels of a signal to zero in training."""
    _only(place, 1)
    return nn.Dropout1d(probability)


def dropout2d(place: Place, probability: float = 0.5) -> nn.Module:
    """Sets whole channels of a map to zero in training."""
    _only(place, 2)
    return nn.Dropout2d(probability)


def _only(place: Place, dimensions: int) -> None:
    if place.dimensions != dimensions:
        raise ValueError(f"needs a map of {dimensions} dimensions, but gets {place.dimensions}")


def flatten(place: Place) -> nn.Module:
    """(channels, height, width) -> (features,)."""
    return nn.Flatten()


def linear(place: Place, out: int, bias: bool = True) -> nn.Module:
    """Dense layer of `out` features."""
    if place.dimensions:
        raise ValueError(
            f"needs a flat vector, but gets a map of {'x'.join(map(str, place.shape))}; put `flatten` or "
            "`global_avg_pool` before it"
        )
    return nn.Linear(place.channels, *sizes("out", out, 1), bias=bias)


def output(place: Place, kernel: int | None = None, bias: bool = True) -> nn.Module:
    """The last layer, as wide as the task asks: dense, or with `kernel: 1` one answer for every pixel."""
    if kernel is None:
        return linear(place, place.num_outputs, bias)
    place.map_size()
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[place.dimensions - 1]
    return kind(place.channels, place.num_outputs, kernel, padding="same", bias=bias)


def upsample(place: Place, scale: float = 2, mode: str = "nearest") -> nn.Module:
    """Enlarges the map; mode nearest, bilinear or bicubic."""
    place.map_size()
    return nn.Upsample(scale_factor=float(scale), mode=mode)


def pixel_shuffle(place: Place, factor: int = 2) -> nn.Module:
    """Channels become pixels: (C*f*f, H, W) -> (C, H*f, W*f)."""
    _only(place, 2)
    return nn.PixelShuffle(factor)


def channel_shuffle(place: Place, groups: int) -> nn.Module:
    """Deals the channels of `groups` groups out in turn."""
    if place.channels % groups:
        raise ValueError(f"{place.channels} channels are no multiple of {groups} groups")
    return ChannelShuffle(groups)


def pad(place: Place, pixels: int, mode: str = "zeros") -> nn.Module:
    """Adds `pixels` on every side; mode zeros, reflect, replicate or circular."""
    _only(place, 2)
    kinds = {"zeros": nn.ZeroPad2d, "reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d}
    kinds["circular"] = nn.CircularPad2d
    if mode not in kinds:
        raise ValueError(f"mode must be one of {', '.join(kinds)}, not {mode!r}")
    return kinds[mode](pixels)


def softmax(place: Place) -> nn.Module:
    """Probabilities over the channels; the usual losses want what comes before it."""
    return nn.Softmax(dim=1)


def prelu(place: Place) -> nn.Module:
    """ReLU with a learned slope per channel on the negative side (He et al. 2015)."""
    return nn.PReLU(place.channels)


def identity(place: Place) -> nn.Module:
    """Passes on what it gets."""
    return nn.Identity()


WORDS = (
    batch_norm,
    layer_norm,
    instance_norm,
    group_norm,
    lrn,
    dropout,
    dropout1d,
    dropout2d,
    flatten,
    linear,
    output,
    upsample,
    pixel_shuffle,
    channel_shuffle,
    pad,
    softmax,
    prelu,
    identity,
)
