"""What each of torch's operations does to the axes of the image, by its name at the dispatcher
(`aten::NAME`).

Every function of torch, of a module or of `torch.nn.functional` ends in these few operations, so that
residual adds, concatenations and matrix products are followed as well as layers are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cnntrain.summary.axes import UNKNOWN, Axes, Axis, broadcast, join
from cnntrain.summary.conv_arithmetic import operation_geometry
from cnntrain.summary.op_rules import MOVES, Lookup, Rule, each, names, pieces, seen, tensors_of
from cnntrain.summary.receptive_field import (
    ReceptiveInterval,
    adaptive_window,
    interpolation,
    transposed_window,
    window,
)

VIEWS = names("""
    view _unsafe_view reshape _reshape_alias unsqueeze squeeze expand permute transpose t select slice
    split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unbind detach alias as_strided
    lift_fresh view_as narrow unfold diagonal
""")  # operations that move no number: they make no row of their own
COPIES = names("clone contiguous _to_copy zeros_like")
PASSING = names("""
    clone contiguous _to_copy detach alias lift_fresh as_strided native_dropout dropout bernoulli
    native_batch_norm batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    _batch_norm_with_update cudnn_batch_norm native_group_norm native_layer_norm _fused_rms_norm
    channel_shuffle native_channel_shuffle prelu _prelu_kernel rrelu_with_noise hardswish celu
""")  # one number in, one out, at the same place; a norm's statistics are no part of the receptive field
REDUCTIONS = names("mean sum amax amin max min var std var_mean logsumexp prod norm linalg_vector_norm")
SOFTMAXES = names("_softmax _log_softmax _safe_softmax softmax log_softmax cumsum sort")
MATRIX_PRODUCTS = names("mm addmm bmm baddbmm mv addmv dot")
FACTORIES = names("empty empty_like new_empty zeros new_zeros ones new_ones full arange linspace rand randn")


def is_pointwise(operation: Any) -> bool:
    """One number out for one number of each (broadcast) input, at the same place."""
    return torch.Tag.pointwise in operation.tags or operation._schema.name.endswith("_")


def follow(
    operation: Any,
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    outs: list[Tensor],
    lookup: Lookup,
) -> list[Axes | None]:
    """The axes of each tensor that an operation returns; None for one that does not depend on the image."""
    inputs = [t for t in tensors_of(args, kwargs) if lookup(t) is not None]
    if not inputs or not outs:
        return [None] * len(outs)
    if name.startswith(("split", "unsafe_split", "chunk", "unbind")):
        return pieces(name, args, outs, lookup)
    rule = RULES.get(name)
    if rule is None:
        same_size = outs[0].shape == inputs[0].shape
        rule = _pointwise if (name in PASSING and same_size) or is_pointwise(operation) else _unknown
    axes = rule(args, kwargs, outs[0], lookup)
    return [axes] + [axes if out.shape == outs[0].shape else None for out in outs[1:]]


def _pointwise(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    parts = [
        broadcast(axes, tensor.shape, out.shape)
        for tensor in tensors_of(args, kwargs)
        if (axes := lookup(tensor)) is not None
    ]
    return join(parts, out.shape)


def _unknown(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    axes = next((a for t in tensors_of(args, kwargs) if (a := lookup(t)) is not None), ())
    return (UNKNOWN,) * len(axes)


def _windows(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    name = "convolution" if len(args) > 8 else f"max_pool{len(args[1])}d"  # the window alone matters here
    geometry = operation_geometry(name, args)
    if geometry is None:
        return _unknown(args, kwargs, out, lookup)
    make = transposed_window if geometry.transposed else window
    numbers = zip(geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    return each(seen(args[0], lookup), args[0].shape, -len(geometry.kernel), [make(*n) for n in numbers])


def _avg_pool(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    return _windows(args[:4], kwargs, out, lookup)  # behind the padding stands no dilation


def _adaptive(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    n = len(args[1])

    def change(axis: Axis) -> Axis:
        if axis.kind != "along" or axis.dim < -n:
            return axis.settled(args[0].shape) if axis.kind == "merged" else axis
        before, after = args[0].shape[axis.dim], out.shape[axis.dim]
        if before == after:
            return axis
        if after == 1:
            return axis.settled(args[0].shape)
        return replace(axis, span=adaptive_window(before, after)(axis.span), adapted=True)

    return tuple(change(axis) for axis in seen(args[0], lookup))


def _upsample(mode: str) -> Rule:
    def rule(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
        corners = "nearest" not in mode and len(args) > 2 and args[2] is True
        n = out.dim() - 2
        changes = [interpolation(args[0].shape[d], out.shape[d], mode, corners) for d in range(-n, 0)]
        return each(seen(args[0], lookup), args[0].shape, -n, changes)

    return rule


def _pad(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    amounts = list(args[1])  # (left, right) of the last dimension first
    n = len(amounts) // 2
    changes = [window(1, 1, amounts[2 * (-d - 1)]) for d in range(-n, 0)]
    return each(seen(args[0], lookup), args[0].shape, -n, changes)


def _pixel_shuffle(
    args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup
) -> Axes | None:
    factor = int(args[1])

    def change(span: ReceptiveInterval) -> ReceptiveInterval:
        return span.read(lambda o: (o // factor,), factor, 1)

    return each(seen(args[0], lookup), args[0].shape, -2, [change, change])


def _pixel_unshuffle(
    args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup
) -> Axes | None:
    return each(seen(args[0], lookup), args[0].shape, -2, [window(int(args[1]), int(args[1]), 0)] * 2)


def _reduce(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    shape = args[0].shape
    given = args[1] if len(args) > 1 else kwargs.get("dim")
    dims = [given] if isinstance(given, int) else list(given or range(len(shape)))
    gone = {d % len(shape) - len(shape) for d in dims}
    kept = out.dim() == len(shape)

    def change(axis: Axis) -> Axis:
        if axis.kind in ("fixed", "unknown"):
            return axis
        if axis.dim in gone:
            return axis.settled(shape)
        return axis if kept else axis.moved(axis.dim + sum(1 for d in gone if d > axis.dim))

    return tuple(change(axis) for axis in seen(args[0], lookup))


def _norm(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    """A vector norm is a reduction whose order stands before its dimensions."""
    return _reduce((args[0], *args[2:]), kwargs, out, lookup)


def _softmax(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    shape = args[0].shape
    dim = (args[1] if len(args) > 1 else -1) % len(shape) - len(shape)
    return tuple(axis.settled(shape) if axis.dim == dim else axis for axis in seen(args[0], lookup))


def _product(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    """Rows of the left matrix by columns of the right: what is summed over is mixed."""
    left, right = [t for t in args if isinstance(t, Tensor)][-2:]
    parts: list[Axes] = []
    for matrix, summed in ((left, -1), (right, -2)):
        if (axes := lookup(matrix)) is not None:
            parts.append(tuple(a.settled(matrix.shape) if a.dim == summed else a for a in axes))
    return join(parts, out.shape)


def _attention(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    return tuple(axis.settled(args[0].shape) for axis in seen(args[0], lookup))


RULES: dict[str, Rule] = {
    "convolution": _windows,
    **{f"max_pool{n}d_with_indices": _windows for n in (2, 3)},
    **{f"max_pool{n}d": _windows for n in (1, 2, 3)},
    **{f"avg_pool{n}d": _avg_pool for n in (1, 2, 3)},
    **{f"_adaptive_avg_pool{n}d": _adaptive for n in (2, 3)},
    **{f"adaptive_{kind}_pool{n}d": _adaptive for n in (1, 2, 3) for kind in ("avg", "max")},
    **{f"upsample_nearest{n}d": _upsample("nearest") for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": _upsample("nearest-exact") for n in (1, 2, 3)},
    **{f"upsample_{kind}": _upsample("linear") for kind in ("linear1d", "bilinear2d", "trilinear3d")},
    "upsample_bicubic2d": _upsample("cubic"),
    "constant_pad_nd": _pad,
    **{f"{kind}_pad{n}d": _pad for n in (1, 2, 3) for kind in ("reflection", "replication")},
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(("norm", "linalg_vector_norm"), _norm),
    **dict.fromkeys(SOFTMAXES, _softmax),
    **dict.fromkeys(MATRIX_PRODUCTS, _product),
    **MOVES,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
}
