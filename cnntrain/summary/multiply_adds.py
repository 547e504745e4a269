"""Multiply-adds of torch's operations, as the lectures count them: a bias, an addition or a pool has none."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from cnntrain.summary.op_rules import names
from cnntrain.summary.shape_rules import is_pointwise

# Operations that take one small step per number: 'no multiply-adds' is an honest count for them.
_ELEMENTWISE = names("""
    native_batch_norm batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    _batch_norm_with_update cudnn_batch_norm native_layer_norm native_group_norm _fused_rms_norm
    native_dropout max_pool1d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d
    avg_pool3d max_unpool2d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d mean sum amax amin max min var std var_mean std_mean argmax
    argmin norm linalg_vector_norm logsumexp prod cat stack roll flip flatten repeat index index_select
    gather scatter embedding masked_fill where topk sort cumsum tril triu one_hot col2im im2col
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle _softmax _log_softmax
    _safe_softmax bernoulli hardswish celu prelu _prelu_kernel constant_pad_nd reflection_pad1d
    reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d
    upsample_trilinear3d upsample_bicubic2d
""")


def is_elementwise(name: str, pointwise: bool) -> bool:
    """Whether an operation is known to make no multiply-adds worth the name."""
    return pointwise or name in _ELEMENTWISE


def multiply_adds(
    operation: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
) -> int | None:
    """Multiply-adds of one call, without bias (ten 5x5 filters on 3x32x32, padded by 2: 768,000); None where
    unknown.

    Convolution: every output number takes K*K*C_in/G. Transposed: every input number gives K*K*C_out/G.
    """
    if name == "convolution":
        images, weight, transposed = args[0], args[1], bool(args[6])
        counted: Tensor = images if transposed else out
        return counted.numel() * weight.shape[1] * prod(weight.shape[2:])
    if name in ("mm", "bmm"):
        return args[0].numel() * args[1].shape[-1]
    if name in ("addmm", "baddbmm"):
        return args[1].numel() * args[2].shape[-1]
    if is_elementwise(name, is_pointwise(operation)):
        return None
    from torch.utils.flop_counter import flop_registry  # imports triton

    formula = flop_registry.get(operation._overloadpacket)
    return formula(*args, **kwargs, out_val=out) // 2 if formula is not None else None
