"""How a tensor's dimensions follow the axes of the image: what is moved, merged, mixed, or lost sight of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from cnntrain.summary.receptive_field import PIXEL, ReceptiveInterval, fixed

Shape = Sequence[int]
_EVERYTHING = (-(1 << 30), 1 << 30)  # the whole image, whatever its size


@dataclass(frozen=True)
class Axis:
    """One axis of the image, as one tensor sees it.

    kind:
        along: dimension `dim` walks along the axis, by `span`.
        merged: it is inside dimension `dim` together with others (flattened, or tokens); every entry reads
        `span`.size.
        fixed: no dimension walks along it; the tensor reads the interval `span` of it.
        unknown: an operation was met that the rules don't know.
    dim counts from the right (-1 is the last), so that it survives broadcasting; 0 where there is none.
    whole: some path took all positions together (global pooling, a dense layer, attention).
    adapted: it went through an adaptive pool that changed the size, so that `span` depends on the image's
    size.
    parts, part: for a merged one, the sizes that were merged, and which of them is this axis; a later view
        that takes them apart again (a dense layer on every pixel does) finds the axis back.
    """

    kind: Literal["along", "merged", "fixed", "unknown"]
    dim: int = 0
    span: ReceptiveInterval = PIXEL
    whole: bool = False
    adapted: bool = False
    parts: tuple[int, ...] = ()
    part: int = 0

    def settled(self, shape: Shape) -> "Axis":
        """The axis after all positions of a tensor of `shape` were mixed."""
        if self.kind == "along":
            return Axis("fixed", 0, fixed(*self.span.hull(shape[self.dim])), True, self.adapted)
        if self.kind == "merged":
            hull = self.span.hull(self.parts[self.part]) if self.parts else _EVERYTHING
            return Axis("fixed", 0, fixed(*hull), True, self.adapted)
        return self

    def moved(self, dim: int) -> "Axis":
        return replace(self, dim=dim)


Axes = tuple[Axis, ...]
UNKNOWN = Axis("unknown")


def image_axes(dimensions: int) -> Axes:
    """The axes of an image (N, C, *size) with `dimensions` of them: each position reads itself."""
    return tuple(Axis("along", dim) for dim in range(-dimensions, 0))


def broadcast(axes: Axes, shape: Shape, out_shape: Shape) -> Axes:
    """The axes of a tensor of `shape` stretched to `out_shape`: a size of 1 repeats its only position."""
    return tuple(
        Axis("fixed", 0, fixed(*axis.span.at(0)), axis.whole, axis.adapted)
        if axis.kind == "along" and shape[axis.dim] == 1 and out_shape[axis.dim] > 1
        else axis
        for axis in axes
    )


def join(parts: Sequence[Axes], out_shape: Shape) -> Axes | None:
    """The axes of what is computed from several tensors, position by position; None without any part."""
    if not parts:
        return None
    joined = parts[0]
    for part in parts[1:]:
        joined = tuple(_join(a, b, out_shape) for a, b in zip(joined, part, strict=True))
    return joined


def _join(a: Axis, b: Axis, out_shape: Shape) -> Axis:
    whole, adapted = a.whole or b.whole, a.adapted or b.adapted
    if "unknown" in (a.kind, b.kind):
        return UNKNOWN
    if a.kind == b.kind and a.dim == b.dim:
        if a.kind == "fixed":
            (low_a, high_a), (low_b, high_b) = a.span.at(0), b.span.at(0)
            return Axis("fixed", 0, fixed(min(low_a, low_b), max(high_a, high_b)), whole, adapted)
        parts = a.parts if (a.parts, a.part) == (b.parts, b.part) else ()
        return Axis(a.kind, a.dim, a.span.join(b.span, out_shape[a.dim]), whole, adapted, parts, a.part)
    if "fixed" in (a.kind, b.kind):  # a map and one number for all of it: squeeze and excitation
        walking, still = (a, b) if b.kind == "fixed" else (b, a)
        return replace(walking, whole=walking.whole or still.whole, adapted=adapted)
    if a.dim != b.dim:  # every position with every other: attention's scores
        return _join(a.settled(out_shape), b.settled(out_shape), out_shape)
    return UNKNOWN


def reshape(axes: Axes, old: Shape, new: Shape) -> Axes:
    """The axes after a view from shape `old` to shape `new`."""
    blocks = _blocks(old, new)
    return tuple(_reshape(axis, axes, blocks, old, new) for axis in axes)


def _blocks(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """The dimensions of two shapes in the smallest groups that hold as many entries; ones left out."""
    left, right = [i for i, n in enumerate(old) if n != 1], [i for i, n in enumerate(new) if n != 1]
    blocks: list[tuple[list[int], list[int]]] = []
    while left and right:
        group, other = [left.pop(0)], [right.pop(0)]
        while (a := prod(old[i] for i in group)) != (b := prod(new[i] for i in other)):
            if a < b and left:
                group.append(left.pop(0))
            elif b < a and right:
                other.append(right.pop(0))
            else:
                break
        blocks.append((group, other))
    return blocks


def _reshape(
    axis: Axis, axes: Axes, blocks: list[tuple[list[int], list[int]]], old: Shape, new: Shape
) -> Axis:
    if axis.kind in ("fixed", "unknown"):
        return axis
    place = len(old) + axis.dim
    if old[place] == 1:
        if len(new) >= -axis.dim and new[axis.dim] == 1:
            return axis
        return Axis("fixed", 0, fixed(*axis.span.at(0)), axis.whole, axis.adapted)
    group, other = next(block for block in blocks if place in block[0])
    if len(group) == len(other) == 1:
        return axis.moved(other[0] - len(new))
    alone = sum(1 for a in axes if a.kind in ("along", "merged") and len(old) + a.dim in group) == 1
    if axis.kind == "along" and len(other) == 1 and alone and group[0] == place:  # (H, r) -> H*r
        factor = prod(old[i] for i in group[1:])
        return replace(
            axis, dim=other[0] - len(new), span=axis.span.read(lambda o: (o // factor,), factor, 1)
        )
    if (
        axis.kind == "along" and len(group) == 1
    ):  # H -> (H/r, r): the inner part is followed as if it were mixed at once
        factor = prod(new[i] for i in other[1:])
        span = axis.span.read(lambda o: range(o * factor, (o + 1) * factor), 1, factor)
        return replace(axis, dim=other[0] - len(new), span=span)
    return _regroup(axis, group, other, old, new)


def _regroup(axis: Axis, group: list[int], other: list[int], old: Shape, new: Shape) -> Axis:
    """An axis merged with others, or taken apart again: along where a new dimension is the axis alone."""
    parts, part = [], 0
    for i in group:
        if i == len(old) + axis.dim:
            part = len(parts) + axis.part
            parts += axis.parts if axis.kind == "merged" else [old[i]]
        else:
            parts.append(old[i])
    if axis.kind == "merged" and not axis.parts:
        return replace(axis, dim=other[0] - len(new)) if len(other) == 1 else UNKNOWN
    start = 0
    for i in other:
        stop = start + 1
        while stop < len(parts) and prod(parts[start:stop]) < new[i]:
            stop += 1
        if prod(parts[start:stop]) != new[i]:
            return UNKNOWN
        if start <= part < stop:
            kind = "along" if stop == start + 1 else "merged"
            kept = tuple(parts[start:stop]) if kind == "merged" else ()
            return replace(axis, kind=kind, dim=i - len(new), parts=kept, part=part - start if kept else 0)
        start = stop
    return UNKNOWN
