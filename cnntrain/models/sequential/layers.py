"""Layers of a list that slide a window: convolutions and pools."""

from torch import nn

from cnntrain.models.blocks import ConvNormActivation
from cnntrain.models.sequential.shapes import Place, Shape, check_windows, sizes

_PADDINGS = "same, valid, full or a whole number"


def resolve_padding(padding: object, kernel: Shape, stride: Shape, dilation: Shape) -> Shape | str:
    """Padding in pixels; the word 'same' stays where an even window needs one pixel more on one side.

    same: the map keeps its size (with a stride: ceil(size / stride)); valid: none; full: every overlap
    counts.

    Raises:
        ValueError: an unknown word, or 'same' with an even window and a stride, which no symmetric padding
        gives.
    """
    spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "full":
        return tuple(spans)
    if padding == "same":
        if all(span % 2 == 0 for span in spans):
            return tuple(span // 2 for span in spans)
        if max(stride) > 1:
            raise ValueError(
                "padding: same with an even kernel and a stride is not symmetric; give a whole number"
            )
        return "same"
    if isinstance(padding, str):
        raise ValueError(f"padding must be {_PADDINGS}, not {padding!r}")
    return sizes("padding", padding, len(kernel), least=0)


def conv(
    place: Place,
    out: int,
    kernel: object = 3,
    stride: object = 1,
    padding: object = "valid",
    dilation: object = 1,
    groups: int = 1,
    bias: bool = True,
    padding_mode: str = "zeros",
) -> nn.Module:
    """Convolution of as many dimensions as its input has; `out` channels."""
    size = place.map_size()
    n = place.dimensions
    (out,) = sizes("out", out, 1)
    kernel, stride, dilation = (
        sizes(name, value, n)
        for name, value in (("kernel", kernel), ("stride", stride), ("dilation", dilation))
    )
    pixels = resolve_padding(padding, kernel, stride, dilation)
    if not isinstance(pixels, str):
        check_windows(size, kernel, stride, pixels, dilation)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    return kind(
        place.channels,
        out,
        kernel,  # type: ignore[arg-type]
        stride=stride,  # type: ignore[arg-type]
        padding=pixels,  # type: ignore[arg-type]
        dilation=dilation,  # type: ignore[arg-type]
        groups=groups,
        bias=bias,
        padding_mode=padding_mode,  # type: ignore[arg-type]
    )


def transposed_conv(
    place: Place, out: int, kernel: object = 2, stride: object = 2, padding: object = 0, bias: bool = True
) -> nn.Module:
    """Transposed convolution: size (W - 1)*S - 2P + K."""
    place.map_size()
    n = place.dimensions
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    return kind(
        place.channels,
        *sizes("out", out, 1),
        sizes("kernel", kernel, n),  # type: ignore[arg-type]
        stride=sizes("stride", stride, n),  # type: ignore[arg-type]
        padding=sizes("padding", padding, n, least=0),  # type: ignore[arg-type]
        bias=bias,
    )


def depthwise_separable(
    place: Place,
    out: int,
    kernel: int = 3,
    stride: int = 1,
    padding: object = "same",
    bias: bool = False,
    norm: str = "batch",
    activation: str = "relu",
) -> nn.Module:
    """A depthwise convolution, then a 1x1 one; each with its norm and activation, unless they are 'none'.

    Source: MobileNets (Howard et al. 2017), section 3.1.
    """
    depthwise = conv(place, place.channels, kernel, stride, padding, groups=place.channels, bias=bias)
    pointwise = conv(place.moved((place.channels, *(1,) * place.dimensions)), out, 1, bias=bias)
    return nn.Sequential(
        ConvNormActivation(depthwise, norm, activation),
        ConvNormActivation(pointwise, norm, activation),
    )


def _pool(
    place: Place, kind: str, kernel: object, stride: object, padding: object, ceil: bool, **more: object
) -> nn.Module:
    size, n = place.map_size(), place.dimensions
    kernel = sizes("kernel", kernel, n)
    stride = kernel if stride is None else sizes("stride", stride, n)
    pixels = resolve_padding(padding, kernel, stride, (1,) * n)
    if isinstance(pixels, str):
        raise ValueError("padding: same needs an odd kernel in a pool; use ceil: true or a whole number")
    if not ceil:  # a window that hangs over the edge is legal there; torch says where it is not
        check_windows(size, kernel, stride, pixels, (1,) * n)
    return getattr(nn, f"{kind}Pool{n}d")(kernel, stride=stride, padding=pixels, ceil_mode=ceil, **more)


def max_pool(
    place: Place, kernel: object = 2, stride: object = None, padding: object = 0, ceil: bool = False
) -> nn.Module:
    """Largest value of each window; the stride is the kernel's size unless given."""
    return _pool(place, "Max", kernel, stride, padding, ceil)


def avg_pool(
    place: Place,
    kernel: object = 2,
    stride: object = None,
    padding: object = 0,
    ceil: bool = False,
    count_padding: bool = True,
) -> nn.Module:
    """Mean of each window; the stride is the kernel's size unless given."""
    return _pool(place, "Avg", kernel, stride, padding, ceil, count_include_pad=count_padding)


def adaptive_avg_pool(place: Place, size: object = 1) -> nn.Module:
    """Mean over a grid of `size` cells, whatever the map's size."""
    place.map_size()
    n = place.dimensions
    return getattr(nn, f"AdaptiveAvgPool{n}d")(sizes("size", size, n))


def adaptive_max_pool(place: Place, size: object = 1) -> nn.Module:
    """Largest value over a grid of `size` cells, whatever the map's size."""
    place.map_size()
    n = place.dimensions
    return getattr(nn, f"AdaptiveMaxPool{n}d")(sizes("size", size, n))


def global_avg_pool(place: Place) -> nn.Module:
    """Mean of each channel, flat."""
    return nn.Sequential(adaptive_avg_pool(place), nn.Flatten())


def global_max_pool(place: Place) -> nn.Module:
    """Largest value of each channel, flat."""
    return nn.Sequential(adaptive_max_pool(place), nn.Flatten())


WORDS = (
    conv,
    transposed_conv,
    depthwise_separable,
    max_pool,
    avg_pool,
    adaptive_avg_pool,
    adaptive_max_pool,
    global_avg_pool,
    global_max_pool,
)
