"""The search space of a sweep: the keys with several values, parsed from overrides in Hydra's grammar."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnntrain.config.compose import parse_overrides, read_settings
from cnntrain.config.reference import group_options
from cnntrain.config.schema import Settings
from cnntrain.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


@dataclass(frozen=True)
class SearchDimension:
    """A key and the values that it can take.

    Attributes:
        key: as on the command line: `optimizer.lr`, `model`.
        values: listed values, as on the command line; empty for an interval.
        low, high: limits of a range or interval, both included; None for names and lists.
        step: difference between the numbers of a range; None for an interval.
        log: whether numbers are drawn on a log scale.
        integer: whether the numbers are integers.
    """

    key: str
    values: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    integer: bool = False

    @property
    def first(self) -> str:
        """Return the first listed value or the lower limit."""
        return self.values[0] if self.values else self.text(self.low or 0.0)

    @property
    def size(self) -> float:
        """Return the number of values; infinite for an interval of real numbers."""
        if self.values:
            return len(self.values)
        step = 1 if self.integer else self.step
        return math.inf if step is None else ((self.high or 0) - (self.low or 0)) // step + 1

    def __str__(self) -> str:
        """Format as on the command line."""
        if self.values:
            return f"{self.key}={','.join(self.values)}"
        ends = f"{self.low:g},{(self.high or 0) + self.integer:g}"
        inner = f"int(interval({ends}))" if self.integer else f"interval({ends})"
        return f"{self.key}={f'tag(log, {inner})' if self.log else inner}"

    def text(self, number: float) -> str:
        """Format a number of the range as on the command line, with all digits."""
        return str(round(number)) if self.integer else repr(float(number))


def grid(dimensions: Sequence[SearchDimension]) -> list[dict[str, str]]:
    """Return every combination of listed values; the last key varies fastest.

    Raises:
        UserError: a key has an interval, which a grid cannot enumerate.
    """
    keys = [dimension.key for dimension in dimensions]
    if key := next((dimension.key for dimension in dimensions if not dimension.values), None):
        raise UserError(
            f"{key}: a grid needs listed values, as {key}=0.1,0.01 or {key}='range(0,3)'; "
            "sweep.sampler=random or tpe draws from an interval"
        )
    combinations = itertools.product(*(dimension.values for dimension in dimensions))
    return [dict(zip(keys, values, strict=True)) for values in combinations]


def read_space(overrides: Sequence[str], config_dir: Path | None = None) -> tuple[list[str], list[SearchDimension]]:
    """Split overrides into those with one value and the search dimensions of those with several.

    `a,b`, `choice(a,b)` and `glob(*)` list values; `range(0,3)` is 0, 1, 2; `interval(0.1,0.5)` is continuous, and
    `int(interval(1,9))` contains the integers from 1 to 8; `tag(log, interval(...))` is sampled on a log scale.

    Raises:
        UserError: a range is empty, or a tag or function of the grammar is not supported.
    """
    fixed, dimensions = [], []
    for override in parse_overrides(overrides):
        if override.is_sweep_override():
            dimensions.append(_dimension(override, config_dir))
        else:
            fixed.append(override.input_line or override.get_key_element())
    return fixed, dimensions


def _dimension(override: "Override", config_dir: Path | None) -> SearchDimension:
    key = override.get_key_element()
    value: Any = override.value()
    tags = getattr(value, "tags", set())
    if unknown := tags - {"log"}:
        raise UserError(f"{key}: unknown tag {min(unknown)!r}; use log, as in {key}='tag(log, interval(1e-4,1e-1))'")
    if getattr(value, "shuffle", False):
        raise UserError(f"{key}: shuffle is not supported; sweep.sampler=random draws values in random order")
    if override.is_interval_sweep():
        low, high, integer, log = value.start or 0, value.end or 0, isinstance(value.start, int), bool(tags)
        high -= integer
        if low >= high or (log and low <= 0):
            condition = "above 0 and " if log else ""
            raise UserError(f"{key}: interval({low},{high}) needs a lower end {condition}below the upper end")
        return SearchDimension(key, (), low, high, None, log, integer)
    if hasattr(value, "filter"):  # glob
        values = value.filter(group_options(config_dir).get(key, []))
    else:
        values = list(override.sweep_string_iterator())
    if not values:
        raise UserError(f"{key}: {override.get_value_string()} contains no value")
    # `tag(log, range(...))` becomes a list, because its steps are not equal on a log scale.
    if override.is_range_sweep() and len(values) > 1 and not tags:
        numbers = sorted(float(each) for each in values)
        integer = isinstance(value.start, int) and isinstance(value.step, int)
        step = numbers[1] - numbers[0]
        return SearchDimension(key, tuple(values), numbers[0], numbers[-1], step, False, integer)
    return SearchDimension(key, tuple(values))


def expand_grid(overrides: Sequence[str], config_dir: Path | None = None) -> list[list[str]]:
    """Return every combination of the listed values: `a=1,2 b=range(0,3)` gives six lists of overrides.

    Raises:
        UserError: a key has an interval, which a grid cannot enumerate.
    """
    fixed, dimensions = read_space(overrides, config_dir)
    return [[*fixed, *typed_values(values)] for values in grid(dimensions)]


def add_swept_keys(overrides: Sequence[str], config_dir: Path | None = None) -> list[str]:
    """Return the overrides plus those of `sweep.over` in the config."""
    fixed, dimensions = read_space(overrides, config_dir)
    settings = read_settings([*fixed, *typed_values({each.key: each.first for each in dimensions})], config_dir)
    return [*overrides, *typed_values(swept_by_config(settings, overrides))]


def typed_values(values: Mapping[str, object]) -> list[str]:
    """Return overrides of values that are formatted as on the command line."""
    return [f"{key}={value}" for key, value in values.items()]


def swept_by_config(settings: Settings, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the keys of `sweep.over` that the overrides do not set."""
    given = {override.get_key_element() for override in parse_overrides(overrides)}
    return {key: values for key, values in settings.sweep.over.items() if key not in given}
