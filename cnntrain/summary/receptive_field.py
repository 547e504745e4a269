"""Exact receptive fields: which input pixels each position of a feature map reads, along each axis of the image.

Maps are treated as unbounded: padding reads pixels outside the image, as in the textbook formulas. Each position
then reads an interval, and the intervals repeat: after `period` positions they have moved by `advance` pixels.
Convolutions, pools, upsampling, transposed convolutions and sums of branches all keep this form, in whole numbers.

Source: Araujo, Norris, Sim: Computing Receptive Fields of Convolutional Neural Networks (Distill 2019), which has the
recursions for a chain of layers; here they are kept per position.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd, lcm
from typing import Literal

# Interval of a position that no input reaches (a transposed convolution with stride > kernel size).
_EMPTY = (1 << 40, -(1 << 40))


@dataclass(frozen=True)
class ReceptiveInterval:
    """Position i reads pixels lows[i % period] to highs[i % period], shifted by (i // period) * advance."""

    lows: tuple[int, ...] = (0,)
    highs: tuple[int, ...] = (0,)
    advance: int = 1

    @property
    def period(self) -> int:
        return len(self.lows)

    @property
    def jump(self) -> Fraction:
        """Pixels from one position to the next, on average: the product of the strides."""
        return Fraction(self.advance, self.period)

    @property
    def size(self) -> int:
        """Receptive field in pixels, the largest over all positions."""
        return max((high - low + 1 for low, high in zip(self.lows, self.highs, strict=True)), default=0)

    @property
    def start(self) -> float:
        """Center of the first position's receptive field in pixels; the center of the first pixel is 0.5."""
        return (self.lows[0] + self.highs[0] + 1) / 2

    def at(self, position: int) -> tuple[int, int]:
        """Return the first and the last pixel that `position` reads."""
        turns, rest = divmod(position, self.period)
        return self.lows[rest] + turns * self.advance, self.highs[rest] + turns * self.advance

    def hull(self, length: int) -> tuple[int, int]:
        """Return the first and the last pixel that positions 0 to length - 1 read."""
        intervals = [self.at(i) for i in range(length)]
        return min(low for low, _ in intervals), max(high for _, high in intervals)

    def compose(self, taps: Callable[[int], Iterable[int]], outputs: int = 1, inputs: int = 1) -> "ReceptiveInterval":
        """Return the interval of a layer whose output position o reads this map's positions `taps(o)`.

        `taps` repeats: taps(o + outputs) is taps(o) shifted by `inputs`. For a convolution, outputs is 1 and inputs is
        its stride.
        """
        turns = self.period // gcd(self.period, inputs)
        intervals = [[self.at(i) for i in taps(o)] or [_EMPTY] for o in range(outputs * turns)]
        lows = tuple(min(low for low, _ in interval) for interval in intervals)
        highs = tuple(max(high for _, high in interval) for interval in intervals)
        return ReceptiveInterval(lows, highs, self.advance * inputs * turns // self.period)._shortest()

    def join(self, other: "ReceptiveInterval", length: int) -> "ReceptiveInterval":
        """Return the interval of a sum of two maps with `length` positions: the hull of both, per position."""
        if self == other:
            return self
        if self.jump == other.jump:
            period = lcm(self.period, other.period)
            advance = self.advance * (period // self.period)
        else:  # branches whose sizes were rounded differently: no short period, so keep every position
            period, advance = length, int(self.jump * length)
        both = [(self.at(i), other.at(i)) for i in range(period)]
        lows = tuple(min(a[0], b[0]) for a, b in both)
        highs = tuple(max(a[1], b[1]) for a, b in both)
        return ReceptiveInterval(lows, highs, advance)._shortest()

    def _shortest(self) -> "ReceptiveInterval":
        """Return the same interval with its shortest period."""
        for period in range(1, self.period):
            if self.period % period or self.advance * period % self.period:
                continue
            advance = self.advance * period // self.period
            short = ReceptiveInterval(self.lows[:period], self.highs[:period], advance)
            if all(short.at(i) == (self.lows[i], self.highs[i]) for i in range(self.period)):
                return short
        return self


Change = Callable[[ReceptiveInterval], ReceptiveInterval]
"""Effect of a layer on the interval of one axis."""


def window(kernel: int, stride: int, padding: int, dilation: int = 1) -> Change:
    """Convolution or pool: output o reads o * stride - padding + dilation * k for k < kernel."""
    return lambda interval: interval.compose(
        lambda o: (o * stride - padding + dilation * k for k in range(kernel)), 1, stride
    )


def transposed_window(kernel: int, stride: int, padding: int, dilation: int = 1) -> Change:
    """Transposed convolution: input i contributes to outputs i * stride - padding + dilation * k for k < kernel."""

    def taps(o: int) -> Iterable[int]:
        shifted = (o + padding - dilation * k for k in range(kernel))
        return [position // stride for position in shifted if position % stride == 0]

    return lambda interval: interval.compose(taps, stride, 1)


def adaptive_window(size_in: int, size_out: int) -> Change:
    """Adaptive pool: output o reads floor(o * in / out) to ceil((o + 1) * in / out) - 1."""
    common = gcd(size_in, size_out)

    def taps(o: int) -> Iterable[int]:
        return range(o * size_in // size_out, -(-(o + 1) * size_in // size_out))

    return lambda interval: interval.compose(taps, size_out // common, size_in // common)


def interpolation(size_in: int, size_out: int, mode: str, align_corners: bool) -> Change:
    """`functional.interpolate` with mode `nearest`, `linear` (two taps) or `cubic` (four taps)."""
    corners = align_corners and size_out > 1
    ratio = Fraction(size_in - 1, size_out - 1) if corners else Fraction(size_in, size_out)
    shift = Fraction(0) if corners or mode == "nearest" else (ratio - 1) / 2

    def taps(o: int) -> Iterable[int]:
        source = o * ratio + shift
        floor = source // 1
        if mode == "nearest" or source == floor:
            return (floor,)
        return range(floor, floor + 2) if mode == "linear" else range(floor - 1, floor + 3)

    def change(interval: ReceptiveInterval) -> ReceptiveInterval:
        if ratio:
            return interval.compose(taps, ratio.denominator, ratio.numerator)
        low, high = interval.at(0)
        return ReceptiveInterval((low,), (high,), 0)

    return change


@dataclass(frozen=True)
class Axis:
    """One axis of the image, as a tensor depends on it.

    Attributes:
        kind: along: dimension `dim` of the tensor runs along the axis, position i reads `interval`.
            merged: the axis is part of dimension `dim`, together with others (flatten); entries read `interval`.
            fixed: every element reads the same `interval`.
            unknown: an operation without a rule.
        dim: negative, so that it survives broadcasting; 0 for fixed and unknown.
        whole: some path combined all positions (global pool, dense layer).
        adapted: an adaptive pool changed the size, so that `interval` depends on the image size.
        length: number of positions of a merged axis.
    """

    kind: Literal["along", "merged", "fixed", "unknown"]
    dim: int = 0
    interval: ReceptiveInterval = ReceptiveInterval()
    whole: bool = False
    adapted: bool = False
    length: int = 0

    def fixed_at(self, low: int, high: int) -> "Axis":
        """Return this axis if every element reads pixels `low` to `high`."""
        return replace(self, kind="fixed", dim=0, interval=ReceptiveInterval((low,), (high,), 0), length=0)

    def first(self) -> "Axis":
        """Return this axis of a tensor that repeats the first position."""
        return self.fixed_at(*self.interval.at(0))

    def combined(self, shape: Sequence[int]) -> "Axis":
        """Return this axis after all positions of a tensor of `shape` were combined."""
        if self.kind in ("fixed", "unknown"):
            return self
        length = shape[self.dim] if self.kind == "along" else self.length
        return replace(self.fixed_at(*self.interval.hull(length)), whole=True)


Axes = tuple[Axis, ...]
SizeStride = tuple[int, int]
UNKNOWN = Axis("unknown")


def image_axes(dimensions: int) -> Axes:
    """Return the axes of an image (N, C, *size) with `dimensions` spatial dimensions."""
    return tuple(Axis("along", dim) for dim in range(-dimensions, 0))


def broadcast_axes(axes: Axes, shape: Sequence[int], out_shape: Sequence[int]) -> Axes:
    """Return the axes of a tensor of `shape` after broadcasting to `out_shape`."""

    def is_repeated(axis: Axis) -> bool:
        return axis.kind == "along" and shape[axis.dim] == 1 < out_shape[axis.dim]

    return tuple(axis.first() if is_repeated(axis) else axis for axis in axes)


def join_axes(parts: Sequence[Axes], out_shape: Sequence[int]) -> Axes | None:
    """Return the axes of an element-wise function of several tensors; None if there are no tensors."""
    if not parts:
        return None
    joined = parts[0]
    for part in parts[1:]:
        joined = tuple(_join(a, b, out_shape) for a, b in zip(joined, part, strict=True))
    return joined


def _join(a: Axis, b: Axis, out_shape: Sequence[int]) -> Axis:
    whole, adapted = a.whole or b.whole, a.adapted or b.adapted
    if "unknown" in (a.kind, b.kind):
        return UNKNOWN
    if a.kind == b.kind == "fixed":
        return replace(a, interval=a.interval.join(b.interval, 1), whole=whole, adapted=adapted)
    if "fixed" in (a.kind, b.kind):  # squeeze-and-excitation: a map times one number per channel
        return replace(a if b.kind == "fixed" else b, whole=whole, adapted=adapted)
    if (a.kind, a.dim, a.length) != (b.kind, b.dim, b.length):
        return UNKNOWN
    return replace(a, interval=a.interval.join(b.interval, out_shape[a.dim]), whole=whole, adapted=adapted)


def view_axes(axes: Axes, old: Sequence[SizeStride], new: Sequence[SizeStride]) -> Axes:
    """Return the axes of a view; `old` and `new` are the (size, stride) of each dimension.

    Known are views that keep the dimension of an axis (permutation, channel shuffle) or merge it with others (flatten).
    """
    return tuple(_view_axis(axis, old, new) for axis in axes)


def _view_axis(axis: Axis, old: Sequence[SizeStride], new: Sequence[SizeStride]) -> Axis:
    if axis.kind in ("fixed", "unknown"):
        return axis
    size, stride = old[axis.dim]
    if len(new) >= -axis.dim and new[axis.dim] == (size, stride):
        return axis
    if (size, stride) in new:
        return replace(axis, dim=new.index((size, stride)) - len(new))
    if size == 1:
        return axis.first()
    for i, (new_size, new_stride) in enumerate(new):
        if new_stride and stride % new_stride == 0 and new_size * new_stride % (size * stride) == 0:
            return replace(axis, kind="merged", dim=i - len(new), length=axis.length or size)
    return UNKNOWN
