"""Networks without numbers: shapes alone, on torch's meta device."""

import copy
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

Buildable = nn.Module | Callable[[], nn.Module]


def as_meta(model_or_builder: Buildable) -> nn.Module:
    """A copy of a network on the meta device, or one built there; weights are neither copied nor drawn."""
    if isinstance(model_or_builder, nn.Module):
        return _copy(model_or_builder)
    try:
        with torch.device("meta"):
            return _copy(model_or_builder())
    except Exception as error:
        if not needs_numbers(error.__cause__ or error):
            raise
        return _copy(model_or_builder())  # its constructor computes with tensors: built for real


def _copy(model: nn.Module) -> nn.Module:
    memo: dict[int, object] = {}
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()]
        for tensor in tensors:
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _empty(tensor)
    return copy.deepcopy(model, memo)


def _empty(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        return nn.parameter.UninitializedParameter(tensor.requires_grad, "meta")  # type: ignore[call-arg,arg-type]
    if isinstance(tensor, nn.parameter.UninitializedBuffer):
        return nn.parameter.UninitializedBuffer(tensor.requires_grad, "meta")  # type: ignore[call-arg,arg-type]
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def needs_numbers(error: BaseException) -> bool:
    """Whether an error says that a network looks at values (`.item()`, numpy); shapes have none."""
    return isinstance(error, (NotImplementedError, RuntimeError, TypeError)) and bool(
        re.search(r"\bmeta\b", str(error), re.IGNORECASE)
    )


def images(in_channels: int, image_size: tuple[int, ...], batch_size: int = 1) -> Tensor:
    """A batch of images without pixels: (N, C, *size)."""
    return torch.empty(batch_size, in_channels, *image_size, device="meta")
