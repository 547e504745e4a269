"""Layers that a list in YAML can name. A function's parameters are the layer's arguments; `LAYERS` lists them all."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from cnntrain.models.norm_act import ChannelShuffle, ConvNormActivation, Dropout, make_norm
from cnntrain.types import format_shape

Shape = tuple[int, ...]
"""Of one example: (channels, height, width) for a feature map, (features,) for a vector."""
_PADDINGS = "same, valid, full or a whole number"


@dataclass(frozen=True)
class LayerContext:
    """What a layer is built for: its input's shape, the task's number of outputs, its path in the config."""

    shape: Shape
    num_outputs: int
    path: str

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def dimensions(self) -> int:
        """Number of spatial dimensions: 2 for images, 1 for signals, 3 for volumes, 0 for vectors."""
        return len(self.shape) - 1

    def at(self, path: str, shape: Shape | None = None) -> "LayerContext":
        """Return the context of a layer at `path` below this one; by default with the same input."""
        return replace(self, path=self.path + path, shape=self.shape if shape is None else shape)

    def require_map(self, dimensions: int | None = None) -> int:
        """Return the number of spatial dimensions; ValueError for a vector, or if it is not `dimensions`."""
        if not self.dimensions:
            raise ValueError(
                f"needs a feature map, but its input is a vector of {self.channels} numbers; move it before `flatten`"
            )
        if dimensions not in (None, self.dimensions):
            raise ValueError(
                f"needs an input with {dimensions} spatial dimensions, but its input has {self.dimensions}"
            )
        return self.dimensions


def per_dimension(name: str, value: object, dimensions: int, minimum: int = 1) -> Shape:
    """Return one value per dimension: 3 -> (3, 3); [3, 5] -> (3, 5). ValueError if `value` has no such form."""
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if listed else [value] * dimensions  # type: ignore[arg-type]
    whole = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
    if len(values) != dimensions or len(whole) != dimensions:
        raise ValueError(f"{name} must be a whole number or a list of {dimensions}, not {value!r}")
    if min(whole) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {value!r}")
    return tuple(whole)


def resolve_padding(padding: object, kernel: Shape, stride: Shape, dilation: Shape) -> Shape | str:
    """Return the padding in pixels, or 'same' where an even kernel needs one pixel more on one side.

    same: keep the size (with a stride: ceil(size / stride)); valid: no padding; full: pad by
    dilation * (kernel - 1), so that every overlap gives an output.
    """
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "full":
        return tuple(reach)
    if padding == "same":
        if all(pixels % 2 == 0 for pixels in reach):
            return tuple(pixels // 2 for pixels in reach)
        if max(stride) > 1:
            raise ValueError("padding: same is not symmetric with an even kernel and a stride; set a whole number")
        return "same"
    if isinstance(padding, str):
        raise ValueError(f"padding must be {_PADDINGS}, not {padding!r}")
    return per_dimension("padding", padding, len(kernel), minimum=0)


def conv(
    context: LayerContext,
    out: int,
    kernel: object = 3,
    stride: object = 1,
    padding: object = "valid",
    dilation: object = 1,
    groups: int = 1,
    bias: bool = True,
    padding_mode: str = "zeros",
) -> nn.Module:
    """Convolution with `out` output channels and as many dimensions as its input."""
    n = context.require_map()
    (out,) = per_dimension("out", out, 1)
    kernel = per_dimension("kernel", kernel, n)
    stride = per_dimension("stride", stride, n)
    dilation = per_dimension("dilation", dilation, n)
    pixels = resolve_padding(padding, kernel, stride, dilation)
    kind = getattr(nn, f"Conv{n}d")
    return kind(context.channels, out, kernel, stride, pixels, dilation, groups, bias, padding_mode)


def transposed_conv(
    context: LayerContext, out: int, kernel: object = 2, stride: object = 2, padding: object = 0, bias: bool = True
) -> nn.Module:
    """Transposed convolution; output size (W - 1)*S - 2P + K."""
    n = context.require_map()
    (out,) = per_dimension("out", out, 1)
    kernel, stride = per_dimension("kernel", kernel, n), per_dimension("stride", stride, n)
    pixels = per_dimension("padding", padding, n, minimum=0)
    return getattr(nn, f"ConvTranspose{n}d")(context.channels, out, kernel, stride, pixels, bias=bias)


def depthwise_separable(
    context: LayerContext,
    out: int,
    kernel: int = 3,
    stride: int = 1,
    padding: object = "same",
    bias: bool = False,
    norm: str = "batch",
    activation: str = "relu",
) -> nn.Module:
    """Depthwise convolution and 1x1 convolution, each followed by `norm` and `activation` (both may be 'none').

    Source: MobileNets (Howard et al. 2017), section 3.1.
    """
    depthwise = conv(context, context.channels, kernel, stride, padding, groups=context.channels, bias=bias)
    pointwise = conv(context, out, 1, bias=bias)
    return nn.Sequential(
        ConvNormActivation(depthwise, norm, activation), ConvNormActivation(pointwise, norm, activation)
    )


def _pool(
    context: LayerContext, kind: str, kernel: object, stride: object, padding: object, **options: object
) -> nn.Module:
    n = context.require_map()
    kernel = per_dimension("kernel", kernel, n)
    stride = kernel if stride is None else per_dimension("stride", stride, n)
    pixels = resolve_padding(padding, kernel, stride, (1,) * n)
    if isinstance(pixels, str):
        raise ValueError("padding: same needs an odd kernel in a pool; use ceil: true or a whole number")
    return getattr(nn, f"{kind}Pool{n}d")(kernel, stride=stride, padding=pixels, **options)


def max_pool(
    context: LayerContext, kernel: object = 2, stride: object = None, padding: object = 0, ceil: bool = False
) -> nn.Module:
    """Maximum of each window; the stride defaults to the kernel size."""
    return _pool(context, "Max", kernel, stride, padding, ceil_mode=ceil)


def avg_pool(
    context: LayerContext,
    kernel: object = 2,
    stride: object = None,
    padding: object = 0,
    ceil: bool = False,
    count_padding: bool = True,
) -> nn.Module:
    """Mean of each window; the stride defaults to the kernel size."""
    return _pool(context, "Avg", kernel, stride, padding, ceil_mode=ceil, count_include_pad=count_padding)


def adaptive_avg_pool(context: LayerContext, size: object = 1) -> nn.Module:
    """Mean over a grid of `size` cells, for any input size."""
    n = context.require_map()
    return getattr(nn, f"AdaptiveAvgPool{n}d")(per_dimension("size", size, n))


def adaptive_max_pool(context: LayerContext, size: object = 1) -> nn.Module:
    """Maximum over a grid of `size` cells, for any input size."""
    n = context.require_map()
    return getattr(nn, f"AdaptiveMaxPool{n}d")(per_dimension("size", size, n))


def global_avg_pool(context: LayerContext) -> nn.Module:
    """Mean of each channel, as a vector."""
    return nn.Sequential(adaptive_avg_pool(context), nn.Flatten())


def global_max_pool(context: LayerContext) -> nn.Module:
    """Maximum of each channel, as a vector."""
    return nn.Sequential(adaptive_max_pool(context), nn.Flatten())


def batch_norm(context: LayerContext, momentum: float = 0.1, eps: float = 1e-5) -> nn.Module:
    """Batch normalization; `momentum` is the weight of the new batch (Keras uses one minus that)."""
    norm = make_norm("batch", context.channels, context.dimensions)
    norm.momentum, norm.eps = momentum, eps  # type: ignore[assignment]
    return norm


def layer_norm(context: LayerContext) -> nn.Module:
    """Normalize each image over all channels and pixels."""
    return make_norm("layer", context.channels, context.dimensions)


def instance_norm(context: LayerContext) -> nn.Module:
    """Normalize each channel of each image over its pixels."""
    return make_norm("instance", context.channels, context.require_map())


def group_norm(context: LayerContext, groups: int | None = None) -> nn.Module:
    """Normalize each image over groups of channels; by default up to 32 groups."""
    return nn.GroupNorm(groups, context.channels) if groups else make_norm("group", context.channels)


def lrn(context: LayerContext, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> nn.Module:
    """Local response normalization over `size` channels (Krizhevsky et al. 2012, section 3.3).

    `alpha` is as in the paper; PyTorch's is divided by `size`.
    """
    context.require_map()
    return nn.LocalResponseNorm(size, alpha * size, beta, k)


def dropout(context: LayerContext, probability: float = 0.5) -> nn.Module:
    """Set elements to zero in training."""
    return Dropout(probability)


def dropout1d(context: LayerContext, probability: float = 0.5) -> nn.Module:
    """Set whole channels of a signal to zero in training."""
    context.require_map(1)
    return nn.Dropout1d(probability)


def dropout2d(context: LayerContext, probability: float = 0.5) -> nn.Module:
    """Set whole channels of a feature map to zero in training."""
    context.require_map(2)
    return nn.Dropout2d(probability)


def flatten(context: LayerContext) -> nn.Module:
    """(channels, height, width) -> (features,)."""
    return nn.Flatten()


def linear(context: LayerContext, out: int, bias: bool = True) -> nn.Module:
    """Dense layer with `out` features."""
    if context.dimensions:
        raise ValueError(
            f"needs a vector, but its input is a feature map of {format_shape(context.shape)}; put `flatten` or "
            "`global_avg_pool` before it"
        )
    return nn.Linear(context.channels, *per_dimension("out", out, 1), bias=bias)


def output(context: LayerContext, kernel: int | None = None, bias: bool = True) -> nn.Module:
    """Last layer, with the task's number of outputs: dense, or with `kernel: 1` a convolution (outputs per pixel)."""
    if kernel is None:
        return linear(context, context.num_outputs, bias)
    return conv(context, context.num_outputs, kernel, padding="same", bias=bias)


def upsample(context: LayerContext, scale: float = 2, mode: str = "nearest") -> nn.Module:
    """Upsample a feature map; mode nearest, bilinear or bicubic."""
    context.require_map()
    return nn.Upsample(scale_factor=float(scale), mode=mode)


def pixel_shuffle(context: LayerContext, factor: int = 2) -> nn.Module:
    """Rearrange channels into pixels: (C*f*f, H, W) -> (C, H*f, W*f)."""
    context.require_map(2)
    return nn.PixelShuffle(factor)


def channel_shuffle(context: LayerContext, groups: int) -> nn.Module:
    """Interleave the channels of `groups` groups."""
    if context.channels % groups:
        raise ValueError(f"{context.channels} channels are not divisible by {groups} groups")
    return ChannelShuffle(groups)


def pad(context: LayerContext, pixels: int, mode: str = "zeros") -> nn.Module:
    """Add `pixels` on every side; mode zeros, reflect, replicate or circular."""
    context.require_map(2)
    kinds = {"zeros": nn.ZeroPad2d, "reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d}
    kinds["circular"] = nn.CircularPad2d
    if mode not in kinds:
        raise ValueError(f"mode must be one of {', '.join(kinds)}, not {mode!r}")
    return kinds[mode](pixels)


def softmax(context: LayerContext) -> nn.Module:
    """Probabilities over the channels; the losses of cnntrain expect the logits before it."""
    return nn.Softmax(dim=1)


def prelu(context: LayerContext) -> nn.Module:
    """ReLU with a learned negative slope per channel (He et al. 2015)."""
    return nn.PReLU(context.channels)


def identity(context: LayerContext) -> nn.Module:
    """Return the input."""
    return nn.Identity()


LAYERS = (
    *(conv, transposed_conv, depthwise_separable, max_pool, avg_pool),
    *(adaptive_avg_pool, adaptive_max_pool, global_avg_pool, global_max_pool),
    *(batch_norm, layer_norm, instance_norm, group_norm, lrn, dropout, dropout1d, dropout2d),
    *(flatten, linear, output, upsample, pixel_shuffle, channel_shuffle, pad, softmax, prelu, identity),
)
