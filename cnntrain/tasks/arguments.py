"""Checks of what a user set for a task: every refusal names the key."""

import math
from collections.abc import Sequence

from cnntrain.config.renamed_keys import renamed
from cnntrain.errors import UserError, suggest


def number(key: str, value: object, low: float, high: float = math.inf, open_low: bool = False) -> float:
    """`value` as a float in [low, high), or in (low, high) with `open_low`.

    Raises:
        UserError: it is no number, or outside.
    """
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if good and low <= value < high and not (open_low and value == low):  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    above = f"above {low:g}" if open_low else f"{low:g} or more"
    below = f" and below {high:g}" if math.isfinite(high) else ""
    raise UserError(f"{key}: must be a number, {above}{below}; got {value!r}")


def choice(key: str, value: object, choices: Sequence[str]) -> str:
    """`value` as one of `choices`.

    Raises:
        UserError: it is none of them; the near miss is suggested.
    """
    if value in choices:
        return str(value)
    hint = renamed(key, value) or suggest(str(value), list(choices))
    raise UserError(f"{key}: {value!r} is not one of {', '.join(choices)}{hint}")
