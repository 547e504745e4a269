"""Operations that move numbers without computing: what views, slices, concatenations do to the axes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from cnntrain.summary.axes import UNKNOWN, Axes, Axis, broadcast, join, reshape
from cnntrain.summary.receptive_field import ReceptiveInterval, fixed, window

Lookup = Callable[[Tensor], Axes | None]
Rule = Callable[[Sequence[Any], Mapping[str, Any], Tensor, Lookup], Axes | None]


def names(text: str) -> frozenset[str]:
    """The words of a text: operations of torch, by name."""
    return frozenset(text.split())


def tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors among an operation's arguments, lists included."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, Tensor)]
    return found


def all_tensors(output: Any) -> list[Tensor]:
    """The tensors of what a network or an operation answers, however they are packed."""
    if isinstance(output, Tensor):
        return [output]
    values = (
        output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    )
    return [tensor for value in values for tensor in all_tensors(value)]


def seen(tensor: Tensor, lookup: Lookup) -> Axes:
    return lookup(tensor) or ()


def each(
    axes: Axes,
    shape: Sequence[int],
    first: int,
    changes: Sequence[Callable[[ReceptiveInterval], ReceptiveInterval]],
) -> Axes:
    """`changes[i]` for the axis that walks along dimension first + i (negative); the others stay."""

    def change(axis: Axis) -> Axis:
        if axis.kind not in ("along", "merged") or axis.dim < first:
            return axis
        if axis.kind == "merged":
            return axis.settled(shape)
        return replace(axis, span=changes[axis.dim - first](axis.span))

    return tuple(change(axis) for axis in axes)


def _view(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    return reshape(seen(args[0], lookup), tuple(args[0].shape), tuple(out.shape))


def _permute(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    n = out.dim()
    if len(args) == 1:
        order = [1, 0]
    elif len(args) == 3:
        order = list(range(n))
        order[args[1]], order[args[2]] = order[args[2]], order[args[1]]
    else:
        order = [d % n for d in args[1]]
    return tuple(a.moved(order.index(a.dim % n) - n) if a.dim else a for a in seen(args[0], lookup))


def _unsqueeze(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    place = args[1] % out.dim() - out.dim()
    return tuple(a.moved(a.dim - 1) if a.dim and a.dim <= place else a for a in seen(args[0], lookup))


def _squeeze(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    shape = args[0].shape
    given = args[1] if len(args) > 1 else list(range(len(shape)))
    dims = [given] if isinstance(given, int) else given
    gone = {d % len(shape) - len(shape) for d in dims if shape[d] == 1}
    axes = broadcast(
        seen(args[0], lookup), shape, [2 if d - len(shape) in gone else 1 for d in range(len(shape))]
    )
    return tuple(a.moved(a.dim + sum(1 for d in gone if d > a.dim)) if a.dim else a for a in axes)


def _expand(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    return broadcast(seen(args[0], lookup), args[0].shape, tuple(out.shape)[-args[0].dim() :])


def _slice(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    given = [*args[1:], None, None, None, None]
    dim, start, step = (given[0] or 0) % out.dim() - out.dim(), given[1] or 0, given[3] or 1
    start = min(start + args[0].shape[dim] if start < 0 else start, args[0].shape[dim])
    axes = seen(args[0], lookup)

    def change(axis: Axis) -> Axis:
        if axis.dim != dim or args[0].shape == out.shape:
            return axis
        if axis.kind == "merged":
            return replace(axis, parts=())
        return replace(axis, span=window(1, step, -start)(axis.span))

    return tuple(change(axis) for axis in axes)


def _select(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    shape, n = args[0].shape, args[0].dim()
    dim, place = args[1] % n - n, args[2] % shape[args[1]]

    def change(axis: Axis) -> Axis:
        if axis.kind == "along" and axis.dim == dim:
            return Axis("fixed", 0, fixed(*axis.span.at(place)), axis.whole, axis.adapted)
        if axis.kind == "merged" and axis.dim == dim:
            return axis.settled(shape) if axis.whole else UNKNOWN
        return axis.moved(axis.dim + 1) if axis.dim and axis.dim < dim else axis

    return tuple(change(axis) for axis in seen(args[0], lookup))


def pieces(name: str, args: Sequence[Any], outs: list[Tensor], lookup: Lookup) -> list[Axes | None]:
    source, results, start = args[0], [], 0
    dim = args[1 if name == "unbind" else 2] if len(args) > (1 if name == "unbind" else 2) else 0
    for i, out in enumerate(outs):
        if name == "unbind":
            results.append(_select((source, dim, i), {}, out, lookup))
        else:
            results.append(_slice((source, dim, start), {}, out, lookup))
            start += out.shape[dim]
    return results


def _cat(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    dim = (args[1] if len(args) > 1 else 0) % out.dim() - out.dim()
    parts, start, walking = [], 0, 0
    for tensor in args[0]:
        if (axes := lookup(tensor)) is not None:
            along = [a for a in axes if a.kind == "along" and a.dim == dim]
            walking += bool(along)
            shift = window(1, 1, start)
            loose = [
                a for a in axes if a.kind == "merged" and a.dim == dim
            ]  # a class token before the others
            parts.append(
                tuple(
                    replace(a, span=shift(a.span))
                    if a in along
                    else replace(a, parts=())
                    if a in loose
                    else a
                    for a in axes
                )
            )
        start += tensor.shape[dim]
    joined = join(parts, out.shape)
    if joined is not None and walking > 1:  # pieces of one axis side by side, in an order of their own
        joined = tuple(UNKNOWN if a.kind == "along" and a.dim == dim else a for a in joined)
    return joined


def _roll(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    """Positions moved round; the part that comes in at the other side is taken as lying beyond the border."""
    n, shifts = out.dim(), [0] * out.dim()
    for shift, dim in zip(args[1], args[2] if len(args) > 2 else (), strict=False):
        shifts[dim % n] = shift
    return each(seen(args[0], lookup), args[0].shape, -n, [window(1, 1, shift) for shift in shifts])


def _flip(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    turned = {d % out.dim() - out.dim() for d in args[1]}
    return tuple(UNKNOWN if axis.dim in turned else axis for axis in seen(args[0], lookup))


def _stack(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor, lookup: Lookup) -> Axes | None:
    dim = (args[1] if len(args) > 1 else 0) % out.dim()
    joined = join([axes for t in args[0] if (axes := lookup(t)) is not None], out.shape)
    return None if joined is None else _unsqueeze((args[0][0], dim), {}, out, lambda _: joined)


MOVES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _view),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "cat": _cat,
    "roll": _roll,
    "flip": _flip,
    "stack": _stack,
}
