"""Exact receptive fields along one image axis: which input pixels a position of a feature map reads.

The map is treated as unbounded (padding reads pixels outside the image, as the textbook formulas do), so
that what a
position reads is an interval of pixels that repeats: after `period` positions it has moved by `advance`
pixels. Strided windows, upsampling, transposed convolutions and joins of branches all stay in this form, in
whole numbers.

Source: Araujo, Norris, Sim: Computing Receptive Fields of Convolutional Neural Networks (Distill 2019),
which gives the recursions for a chain; the intervals here are the same recursion, kept per position.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

# What a position reads that no input reaches (a transposed convolution with stride > kernel).
_NOTHING = (1 << 40, -(1 << 40))


@dataclass(frozen=True)
class ReceptiveInterval:
    """Position i reads pixels lows[i % period] .. highs[i % period], moved by (i // period) * advance."""

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
        """The receptive field in pixels, the largest over positions."""
        return max((high - low + 1 for low, high in zip(self.lows, self.highs, strict=True)), default=0)

    @property
    def start(self) -> float:
        """Center of the first position's field, in pixels; the first pixel's own center is 0.5."""
        return (self.lows[0] + self.highs[0] + 1) / 2

    def at(self, position: int) -> tuple[int, int]:
        """First and last pixel (inclusive) that `position` reads."""
        turns, rest = divmod(position, self.period)
        return self.lows[rest] + turns * self.advance, self.highs[rest] + turns * self.advance

    def hull(self, length: int) -> tuple[int, int]:
        """First and last pixel read by positions 0 .. length - 1 together."""
        intervals = [self.at(i) for i in range(length)]
        return min(low for low, _ in intervals), max(high for _, high in intervals)

    def read(
        self, taps: Callable[[int], Iterable[int]], every_out: int = 1, every_in: int = 1
    ) -> "ReceptiveInterval":
        """The span of a layer whose output o reads this map's positions `taps(o)`.

        `taps` repeats: taps(o + every_out) is taps(o) moved by every_in. A convolution has every_out 1,
        every_in its stride.
        """
        turns = self.period // gcd(self.period, every_in)
        intervals = [[self.at(i) for i in taps(o)] or [_NOTHING] for o in range(every_out * turns)]
        lows = tuple(min(low for low, _ in interval) for interval in intervals)
        highs = tuple(max(high for _, high in interval) for interval in intervals)
        return ReceptiveInterval(lows, highs, self.advance * every_in * turns // self.period)._shortest()

    def join(self, other: "ReceptiveInterval", length: int) -> "ReceptiveInterval":
        """The span of a sum of two maps of `length` positions: the hull of both, position by position."""
        if self == other:
            return self
        if self.jump == other.jump:
            period, advance = lcm(self.period, other.period), 0
            advance = self.advance * (period // self.period)
        else:  # branches whose sizes were rounded differently: no short period, so every position is kept
            period, advance = length, int(self.jump * length)
        both = [(self.at(i), other.at(i)) for i in range(period)]
        lows = tuple(min(a[0], b[0]) for a, b in both)
        highs = tuple(max(a[1], b[1]) for a, b in both)
        return ReceptiveInterval(lows, highs, advance)._shortest()

    def _shortest(self) -> "ReceptiveInterval":
        """The same span with its shortest period, so that later arithmetic stays small."""
        for period in range(1, self.period):
            if self.period % period or self.advance * period % self.period:
                continue
            short = ReceptiveInterval(
                self.lows[:period], self.highs[:period], self.advance * period // self.period
            )
            if all(short.at(i) == (self.lows[i], self.highs[i]) for i in range(self.period)):
                return short
        return self


PIXEL = ReceptiveInterval()
"""The span of the image itself: each position reads its own pixel."""


def fixed(low: int, high: int) -> ReceptiveInterval:
    """The span of something that has no position: it reads low .. high wherever it is used."""
    return ReceptiveInterval((low,), (high,), 0)


def window(
    kernel: int, stride: int, padding: int, dilation: int = 1
) -> Callable[[ReceptiveInterval], ReceptiveInterval]:
    """A convolution or pooling window: output o reads o * stride - padding + dilation * k for k < kernel."""
    return lambda span: span.read(
        lambda o: (o * stride - padding + dilation * k for k in range(kernel)), 1, stride
    )


def transposed_window(
    kernel: int, stride: int, padding: int, dilation: int = 1
) -> Callable[[ReceptiveInterval], ReceptiveInterval]:
    """A transposed convolution: input i writes i * stride - padding + dilation * k; o reads what hits it."""

    def taps(o: int) -> Iterable[int]:
        places = (o + padding - dilation * k for k in range(kernel))
        return [place // stride for place in places if place % stride == 0]

    return lambda span: span.read(taps, stride, 1)


def adaptive_window(size_in: int, size_out: int) -> Callable[[ReceptiveInterval], ReceptiveInterval]:
    """torch's adaptive pooling: output o reads floor(o * in / out) up to ceil((o + 1) * in / out) - 1."""
    common = gcd(size_in, size_out)

    def taps(o: int) -> Iterable[int]:
        return range(o * size_in // size_out, -(-(o + 1) * size_in // size_out))

    return lambda span: span.read(taps, size_out // common, size_in // common)


def interpolation(
    size_in: int, size_out: int, mode: str, align_corners: bool
) -> Callable[[ReceptiveInterval], ReceptiveInterval]:
    """torch's interpolate by `nearest`, `nearest-exact`, `linear` (two neighbors) or `cubic` (four)."""
    corners = align_corners and size_out > 1
    ratio = Fraction(size_in - 1, size_out - 1) if corners else Fraction(size_in, size_out)
    shift = Fraction(0) if corners or mode == "nearest" else (ratio - 1) / 2
    if mode == "nearest-exact":
        shift = ratio / 2

    def taps(o: int) -> Iterable[int]:
        source = o * ratio + shift
        floor = source.numerator // source.denominator
        if "nearest" in mode or source == floor:
            return (floor,)
        return range(floor, floor + 2) if mode == "linear" else range(floor - 1, floor + 3)

    return lambda span: span.read(taps, ratio.denominator, ratio.numerator) if ratio else fixed(*span.at(0))
