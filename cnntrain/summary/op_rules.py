"""Rules for ATen operations: the receptive field of their outputs, and their multiply-adds.

Every function of torch, of a module or of `torch.nn.functional` is executed as a few ATen operations (`aten::NAME`), so
that residual additions, concatenations and functional calls are covered as well as layers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cnntrain.summary.conv_arithmetic import operation_geometry
from cnntrain.summary.receptive_field import (
    UNKNOWN,
    Axes,
    Axis,
    Change,
    adaptive_window,
    broadcast_axes,
    interpolation,
    join_axes,
    transposed_window,
    view_axes,
    window,
)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Views compute nothing and have no row in the table.
VIEWS = _names("""
    view _unsafe_view _reshape_alias unsqueeze squeeze expand permute transpose t select slice split split_with_sizes
    unsafe_split unsafe_split_with_sizes unbind detach alias as_strided lift_fresh unfold diagonal
""")
COPIES = _names("clone _to_copy zeros_like")
FACTORIES = _names("empty empty_like new_empty zeros new_zeros ones new_ones full arange linspace rand randn")
_SPLITS = _names("split split_with_sizes unsafe_split unsafe_split_with_sizes")
_MATRIX_PRODUCTS = _names("mm addmm bmm baddbmm")
_REDUCTIONS = _names("""
    mean sum amax amin max min var std var_mean logsumexp prod
    _softmax _log_softmax _safe_softmax cumsum
""")
BATCH_NORMS = _names("""
    native_batch_norm _native_batch_norm_legit_no_training _batch_norm_with_update cudnn_batch_norm
""")
_NORMS = BATCH_NORMS | _names("_native_batch_norm_legit native_group_norm native_layer_norm _fused_rms_norm")
# Element-wise if the shape stays; the statistics of a norm are not part of the receptive field.
_SAME_POSITION = _NORMS | _names("""
    clone _to_copy detach alias lift_fresh as_strided native_dropout dropout bernoulli
    channel_shuffle native_channel_shuffle prelu _prelu_kernel rrelu_with_noise hardswish celu
""")
# A small, constant cost per element counts as 0 multiply-adds; these are beginnings of names.
_NO_MULTIPLY_ADDS = (
    *_NORMS,
    *_REDUCTIONS,
    *_names("""
        native_dropout avg_pool adaptive_ _adaptive_ arg norm linalg_vector_norm cat stack roll flip repeat index gather
        scatter embedding masked_fill where topk sort tril triu one_hot col2im im2col pixel_ channel_shuffle
        native_channel_shuffle bernoulli hardswish celu prelu _prelu_kernel constant_pad_nd reflection_pad
        replication_pad upsample_ _upsample_
    """),
)


@dataclass
class OpCall:
    """One call of an ATen operation.

    Attributes:
        name: without `aten::`, and without the underscore of in-place variants.
        axes_of: returns how a tensor depends on the axes of the image; None if it does not depend on the image.
    """

    func: Any
    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    axes_of: Callable[[Tensor], Axes | None]
    in_place: bool = False
    outs: list[Tensor] = field(default_factory=list)

    @property
    def inputs(self) -> list[Tensor]:
        return tensors_in(self.args, self.kwargs)

    @property
    def axes(self) -> Axes:
        """Axes of the first argument."""
        return self.axes_of(self.args[0]) or ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first argument."""
        return tuple(self.args[0].shape)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return tuple(self.outs[0].shape)

    @property
    def is_pointwise(self) -> bool:
        return torch.Tag.pointwise in self.func.tags or self.func._schema.name.endswith("_")

    def argument(self, index: int, default: Any = None) -> Any:
        """Return a positional argument, or `default` if it is missing or None."""
        value = self.args[index] if len(self.args) > index else None
        return default if value is None else value


Rule = Callable[[OpCall], Axes | None]


def tensors_in(*values: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def output_axes(call: OpCall) -> list[Axes | None]:
    """Return the axes of each output; None for outputs that do not depend on the image."""
    if not call.outs or all(call.axes_of(t) is None for t in call.inputs):
        return [None] * len(call.outs)
    rule = RULES.get(call.name)
    if rule is None:
        same_shape = call.out_shape == call.inputs[0].shape
        elementwise = call.is_pointwise or (call.name in _SAME_POSITION and same_shape)
        rule = _elementwise if elementwise else _unknown
    axes = rule(call)
    return [axes if call.name in _SPLITS or out.shape == call.out_shape else None for out in call.outs]


def multiply_adds(call: OpCall) -> int | None:
    """Return the multiply-adds of one call without bias (ten 5x5 filters on 3x32x32, padding 2: 768,000).

    Convolution: K*K*C_in/G per output element; transposed: K*K*C_out/G per input element. None if unknown.
    """
    args = call.args
    if call.name == "convolution":
        images, weight, transposed = args[0], args[1], bool(args[6])
        counted = images if transposed else call.outs[0]
        return counted.numel() * weight.shape[1] * prod(weight.shape[2:])
    if call.name in _MATRIX_PRODUCTS:
        return args[-2].numel() * args[-1].shape[-1]
    if call.is_pointwise or call.name.startswith(_NO_MULTIPLY_ADDS):
        return 0
    from torch.utils.flop_counter import flop_registry  # imports triton

    formula = flop_registry.get(call.func._overloadpacket)
    return formula(*args, **call.kwargs, out_val=next(iter(call.outs), None)) // 2 if formula is not None else None


def _unknown(call: OpCall) -> Axes:
    axes = next((a for t in call.inputs if (a := call.axes_of(t)) is not None), ())
    return (UNKNOWN,) * len(axes)


def _elementwise(call: OpCall) -> Axes | None:
    parts = [
        broadcast_axes(axes, tensor.shape, call.out_shape)
        for tensor in call.inputs
        if (axes := call.axes_of(tensor)) is not None
    ]
    return join_axes(parts, call.out_shape)


def _change_last(call: OpCall, changes: Sequence[Change]) -> Axes:
    """Apply one change to each of the last dimensions."""

    def change(axis: Axis) -> Axis:
        if axis.dim < -len(changes) or axis.dim == 0:
            return axis
        if axis.kind == "merged":
            return UNKNOWN
        return replace(axis, interval=changes[axis.dim](axis.interval))

    return tuple(change(axis) for axis in call.axes)


def _view(call: OpCall) -> Axes:
    sizes = [list(zip(t.shape, t.stride(), strict=True)) for t in (call.args[0], call.outs[0])]
    return view_axes(call.axes, *sizes)


def _slice(call: OpCall) -> Axes:
    if call.shape == call.out_shape:
        return call.axes
    n, dim = len(call.shape), call.argument(1, 0)
    start, step = call.argument(2, 0), call.argument(4, 1)
    start = min(start + call.shape[dim] if start < 0 else start, call.shape[dim])

    def change(axis: Axis) -> Axis:
        if axis.dim != dim % n - n:
            return axis
        return UNKNOWN if axis.kind == "merged" else replace(axis, interval=window(1, step, -start)(axis.interval))

    return tuple(change(axis) for axis in call.axes)


def _cat(call: OpCall) -> Axes | None:
    axes = join_axes([axes for t in call.args[0] if (axes := call.axes_of(t)) is not None], call.out_shape)
    return axes and _unknown_along(axes, call.argument(1, 0), len(call.out_shape))


def _split(call: OpCall) -> Axes:
    return _unknown_along(call.axes, call.argument(2, 0), len(call.shape))


def _unknown_along(axes: Axes, dim: int, dimensions: int) -> Axes:
    return tuple(UNKNOWN if axis.dim == dim % dimensions - dimensions else axis for axis in axes)


def _windows(call: OpCall) -> Axes:
    geometry = operation_geometry(call.name, call.args)
    if geometry is None:
        return _unknown(call)
    make = transposed_window if geometry.transposed else window
    values = zip(geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    return _change_last(call, [make(*v) for v in values])


def _adaptive_pool(call: OpCall) -> Axes:
    def change(axis: Axis) -> Axis:
        if axis.dim < -len(call.args[1]) or axis.dim == 0:
            return axis
        before, after = call.shape[axis.dim], call.out_shape[axis.dim]
        if axis.kind == "merged":
            return UNKNOWN
        if before == after:
            return axis
        if after == 1:
            return axis.combined(call.shape)
        return replace(axis, interval=adaptive_window(before, after)(axis.interval), adapted=True)

    return tuple(change(axis) for axis in call.axes)


def _upsample(mode: str) -> Rule:
    def rule(call: OpCall) -> Axes:
        corners = mode != "nearest" and call.argument(2) is True
        sizes = zip(call.shape[2:], call.out_shape[2:], strict=True)
        return _change_last(call, [interpolation(a, b, mode, corners) for a, b in sizes])

    return rule


def _pad(call: OpCall) -> Axes:
    before = call.args[1][::2]  # (left, right) of the last dimension first
    return _change_last(call, [window(1, 1, pixels) for pixels in reversed(before)])


def _pixel_shuffle(call: OpCall) -> Axes:
    factor = int(call.args[1])
    return _change_last(call, [lambda interval: interval.compose(lambda o: (o // factor,), factor, 1)] * 2)


def _reduce(call: OpCall) -> Axes:
    """Reduction or softmax: the positions of some dimensions are combined."""
    n, given = len(call.shape), call.argument(1, call.kwargs.get("dim"))
    dims = {d % n - n for d in ([given] if isinstance(given, int) else given or range(n))}
    axes = tuple(axis.combined(call.shape) if axis.dim in dims else axis for axis in call.axes)
    if len(call.out_shape) == n:
        return axes
    return tuple(replace(a, dim=a.dim + sum(d > a.dim for d in dims)) if a.dim else a for a in axes)


def _matrix_product(call: OpCall) -> Axes:
    """Product with a weight: the summed dimension is combined. A product of two activations is unknown."""
    left, right = call.args[-2:]
    factors = [(axes, t, dim) for t, dim in ((left, -1), (right, -2)) if (axes := call.axes_of(t)) is not None]
    if len(factors) != 1:
        return _unknown(call)
    axes, matrix, summed = factors[0]
    return tuple(a.combined(matrix.shape) if a.dim == summed else a for a in axes)


RULES: dict[str, Rule] = {
    **dict.fromkeys(_names("view _unsafe_view _reshape_alias permute transpose t unsqueeze squeeze expand"), _view),
    **dict.fromkeys(_SPLITS, _split),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(_MATRIX_PRODUCTS, _matrix_product),
    "slice": _slice,
    "cat": _cat,
    "convolution": _windows,
    **{f"max_pool{n}d_with_indices": _windows for n in (2, 3)},
    **{f"{kind}_pool{n}d": _windows for n in (1, 2, 3) for kind in ("max", "avg")},
    **{f"_adaptive_avg_pool{n}d": _adaptive_pool for n in (2, 3)},
    **{f"adaptive_{kind}_pool{n}d": _adaptive_pool for n in (1, 2, 3) for kind in ("avg", "max")},
    **{f"upsample_nearest{n}d": _upsample("nearest") for n in (1, 2, 3)},
    **{f"upsample_{kind}": _upsample("linear") for kind in ("linear1d", "bilinear2d", "trilinear3d")},
    "upsample_bicubic2d": _upsample("cubic"),
    "constant_pad_nd": _pad,
    **{f"{kind}_pad{n}d": _pad for n in (1, 2, 3) for kind in ("reflection", "replication")},
    "pixel_shuffle": _pixel_shuffle,
}
