"""Kernel, stride, padding and dilation of convolutions and pools, and the arithmetic of map sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules import batchnorm, conv, pooling

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ConvGeometry:
    """Geometry of a convolution or pool; the tuples have one value per spatial dimension.

    Attributes:
        same: padding was given as 'same'.
    """

    kernel: Shape
    stride: Shape
    padding: Shape
    dilation: Shape
    out_channels: int | None = None
    groups: int = 1
    transposed: bool = False
    same: bool = False

    def notation(self) -> str:
        """Return for example `C64 K11 P2 S4`; with D and G if they are not 1, and 3x1 if the dimensions differ."""
        parts = [] if self.out_channels is None else [f"C{self.out_channels}"]
        parts += [f"K{_short(self.kernel)}", f"P{_short(self.padding)}", f"S{_short(self.stride)}"]
        if max(self.dilation) > 1:
            parts.append(f"D{_short(self.dilation)}")
        if self.groups > 1:
            parts.append(f"G{self.groups}")
        return " ".join(parts)

    def extent(self, axis: int) -> int:
        """Number of pixels from the first to the last tap of the kernel: D*(K-1) + 1."""
        return self.dilation[axis] * (self.kernel[axis] - 1) + 1

    def size_error(self, size: Sequence[int]) -> str:
        """Return `(4 - 5 + 2*0)/1 + 1 < 1` if the kernel is larger than the padded map of `size`, else ''."""
        if self.transposed:
            return ""
        for axis, length in enumerate(size):
            kernel, padding, extent = self.kernel[axis], self.padding[axis], self.extent(axis)
            if length + 2 * padding < extent:
                dilated = f" ({extent} = {self.dilation[axis]}*({kernel} - 1) + 1)" if extent > kernel else ""
                return f"({length} - {extent} + 2*{padding})/{self.stride[axis]} + 1 < 1{dilated}"
        return ""

    def count_unread(self, axis: int, size: int, out: int) -> int:
        """Return how many of `size` rows no window reads: after the last window, or between windows.

        Strided 1x1 shortcuts skip rows by design and count as 0.
        """
        if self.transposed or max(self.kernel) == 1:
            return 0
        stride, dilation, padding = self.stride[axis], self.dilation[axis], self.padding[axis]
        taps = range(0, self.kernel[axis] * dilation, dilation)
        read = {o * stride - padding + tap for o in range(out) for tap in taps}
        return size - len(read & set(range(size)))


def _short(values: Shape) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))


def _tuple(value: Any, length: int) -> Shape:
    """Return one value per dimension of an int or a list."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return tuple(int(v) for v in (values * length if len(values) == 1 else values))


def operation_geometry(name: str, arguments: Sequence[Any]) -> ConvGeometry | None:
    """Return the geometry of an ATen operation (`convolution`, `max_pool2d_with_indices`, ...); None for others."""
    if name == "convolution":
        weight, stride, padding, dilation = arguments[1], *arguments[3:6]
        transposed, groups = bool(arguments[6]), int(arguments[8])
        n = weight.dim() - 2
        out_channels = weight.shape[1] * groups if transposed else weight.shape[0]
        strides, pads, dilations = _tuple(stride, n), _tuple(padding, n), _tuple(dilation, n)
        return ConvGeometry(tuple(weight.shape[2:]), strides, pads, dilations, out_channels, groups, transposed)
    if name.startswith(("max_pool", "avg_pool")):
        n = int(name[name.index("pool") + 4])
        given = [*arguments[1:], None, None, None]
        kernel = _tuple(given[0], n)
        dilation = given[3] if name.startswith("max") else 1
        return ConvGeometry(kernel, _tuple(given[1] or kernel, n), _tuple(given[2] or 0, n), _tuple(dilation or 1, n))
    return None


def module_geometry(module: nn.Module) -> ConvGeometry | None:
    """Return the geometry of a convolution or pool of torch.nn; None for other modules.

    Padding that another operation adds ('same', reflect, circular) is included.
    """
    if isinstance(module, conv._ConvNd):
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        same = module.padding == "same"
        padding = _tuple(0 if isinstance(module.padding, str) else module.padding, len(kernel))
        if same:  # of the smaller side: an odd total puts one pixel more on the other
            padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
        return ConvGeometry(
            kernel, stride, padding, dilation, module.out_channels, module.groups, module.transposed, same=same
        )
    if isinstance(module, (pooling._MaxPoolNd, pooling._AvgPoolNd)):
        n = int(type(module).__name__[-2]) if type(module).__name__[-2:-1].isdigit() else 2
        kernel, padding = _tuple(module.kernel_size, n), _tuple(module.padding, n)
        stride = kernel if module.stride is None else _tuple(module.stride, n)
        return ConvGeometry(kernel, stride, padding, _tuple(getattr(module, "dilation", 1), n))
    return None


def describe_module(module: nn.Module) -> str:
    """Return for example `Conv2d(64 -> 192, K5 P2 S1)` or `Linear(9216 -> 4096)`."""
    kind, geometry = type(module).__name__, module_geometry(module)
    if isinstance(module, conv._ConvNd) and geometry is not None:
        notation = geometry.notation().split(" ", 1)[1]
        return f"{kind}({module.in_channels} -> {module.out_channels}, {notation})"
    if isinstance(module, nn.Linear):
        return f"{kind}({module.in_features} -> {module.out_features})"
    if isinstance(module, batchnorm._NormBase):
        return f"{kind}({module.num_features})"
    return f"{kind}({geometry.notation()})" if geometry else kind
