"""What a layer of a list needs to know about the place where it stands, and what it makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.func import functional_call

Shape = tuple[int, ...]
"""Of one example: (channels, height, width) for a map, (features,) for a flat vector."""


@dataclass(frozen=True)
class Place:
    """Where a layer stands: the shape that reaches it, the task's outputs, its path in the config."""

    shape: Shape
    num_outputs: int
    path: str

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def dimensions(self) -> int:
        """2 for images, 1 and 3 for signals and volumes, 0 for a flat vector."""
        return len(self.shape) - 1

    def moved(self, shape: Shape) -> "Place":
        return replace(self, shape=shape)

    def map_size(self) -> Shape:
        """(height, width) in pixels.

        Raises:
            ValueError: the input is a flat vector.
        """
        if len(self.shape) == 1:
            raise ValueError(
                f"needs a feature map, but gets {self.channels} flat numbers; move it before `flatten`"
            )
        return self.shape[1:]


_KEEP_SHAPE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.ReLU, nn.Dropout, nn.Identity)


def output_shape(module: nn.Module, shape: Shape) -> Shape:
    """The shape that `module` makes of an example of `shape`; run on the meta device, not calculated."""
    if isinstance(module, _KEEP_SHAPE):  # the most frequent ones, for speed
        return shape
    tensors = {name: tensor.to("meta") for name, tensor in module.named_parameters()}
    tensors |= {name: tensor.to("meta") for name, tensor in module.named_buffers()}
    with torch.no_grad():
        return tuple(functional_call(module, tensors, (torch.empty(2, *shape, device="meta"),)).shape[1:])


def sizes(name: str, value: object, dimensions: int, least: int = 1) -> Shape:
    """`value` once per dimension: 3 -> (3, 3); [3, 5] stays.

    Raises:
        ValueError: not a whole number, too small, or of another length.
    """
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if listed else [value] * dimensions  # type: ignore[arg-type]
    whole = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
    if len(values) != dimensions or len(whole) != dimensions:
        raise ValueError(f"{name} must be a whole number or a list of {dimensions}, not {value!r}")
    if min(whole) < least:
        raise ValueError(f"{name} must be at least {least}, not {value!r}")
    return tuple(whole)


def check_windows(size: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape) -> None:
    """Refuse a window that is larger than the padded map.

    Raises:
        ValueError: with the arithmetic, (W - D*(K-1) - 1 + 2P)/S + 1 < 1, and what to change.
    """
    for i, length in enumerate(size):
        span = dilation[i] * (kernel[i] - 1) + 1
        if length - span + 2 * padding[i] < 0:
            reach = f" ({span} = dilation {dilation[i]} * ({kernel[i]} - 1) + 1)" if dilation[i] > 1 else ""
            raise ValueError(
                f"({length} - {span} + 2*{padding[i]})/{stride[i]} + 1 < 1{reach}: the window does not fit "
                f"into the {'x'.join(map(str, size))} map; use a smaller kernel or more padding, take out a "
                "pool or a stride before it, or give larger images"
            )
