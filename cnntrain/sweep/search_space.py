"""What a sweep varies: one axis per key, in plain values."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cnntrain.errors import UserError


@dataclass(frozen=True)
class SearchDimension:
    """The values of one key.

    Attributes:
        key: as on the command line: `optimizer.lr`, `model`.
        values: listed ones, as on the command line; empty for a continuous range.
        low, high: ends of a range of numbers, both included; None where values are names or a list.
        step: between the numbers of a range; None for a continuous one.
        log: spread evenly over magnitudes.
        whole: numbers are whole.
    """

    key: str
    values: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    whole: bool = False

    @property
    def first(self) -> str:
        """One value that may stand for all, to compose a config with."""
        return self.values[0] if self.values else self.text(self.low or 0.0)

    @property
    def size(self) -> float:
        """How many values there are; infinite for a continuous range."""
        if self.values:
            return len(self.values)
        step = 1 if self.whole else self.step
        return math.inf if step is None else ((self.high or 0) - (self.low or 0)) // step + 1

    def __str__(self) -> str:
        """As on the command line."""
        if self.values:
            return f"{self.key}={','.join(self.values)}"
        ends = f"{self.low:g},{(self.high or 0) + self.whole:g}"
        inner = f"int(interval({ends}))" if self.whole else f"interval({ends})"
        return f"{self.key}={f'tag(log, {inner})' if self.log else inner}"

    def text(self, number: float) -> str:
        """A number of the range as on the command line, with all its digits."""
        return str(round(number)) if self.whole else repr(float(number))


def grid(axes: Sequence[SearchDimension]) -> list[dict[str, str]]:
    """Every combination of listed values, the last key turning fastest.

    Raises:
        UserError: a continuous range, which a grid can't enumerate.
    """
    for axis in axes:
        if not axis.values:
            key = axis.key
            raise UserError(
                f"{key}: a grid needs listed values, as {key}=0.1,0.01 or {key}='range(0,3)'; "
                "sweep.sampler=random or tpe draws from an interval"
            )
    keys = [axis.key for axis in axes]
    return [
        dict(zip(keys, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))
    ]
