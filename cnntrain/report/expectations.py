"""What an experiment promises, held against what came out: a lecture's table as something to execute."""

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cnntrain.errors import UserError
from cnntrain.types import Finding

# Overrides that leave an experiment what it is: where it runs and what it writes.
NEUTRAL = {
    "run_dir", "resume", "device", "threads", "seed", "trusted_packages", "deterministic", "data.root", "data.workers",
    "data.cache", "data.timeout_s",
}  # fmt: skip
_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}


def judge_expectations(
    expected: Mapping[str, Any] | None, results: Mapping[str, Any], changed: Sequence[str]
) -> list[Finding]:
    """One finding per expectation; all SKIP when other settings than the experiment's were used.

    Args:
        expected: result's name to a number (equality) or a comparison such as ">=0.935".
        results: as in results.json.
        changed: keys whose values are not the experiment's own.

    Raises:
        UserError: an expectation that is no number and no comparison.
    """
    if not expected:
        return []
    flat = {**results, **(results.get("best") or {}), **(results.get("test") or {})}
    changed = [key for key in changed if not _is_neutral(key)]
    findings = []
    for name, wanted in expected.items():
        compare, number = parse_expectation(name, wanted)
        if changed:
            findings.append(Finding(f"expect {name}", "SKIP", f"not judged: {', '.join(changed)} changed"))
            continue
        value = flat.get(name)
        held = isinstance(value, int | float) and bool(_COMPARISONS[compare](value, number))
        wording = wanted if isinstance(wanted, str) else f"{wanted:,}"
        findings.append(Finding(f"expect {name}", "PASS" if held else "FAIL", f"{value}, expected {wording}"))
    return findings


def parse_expectation(name: str, wanted: Any) -> tuple[str, float]:
    """(comparison, number) of `1677674` or of `">=0.935"`."""
    if isinstance(wanted, int | float) and not isinstance(wanted, bool):
        return "==", float(wanted)
    match = re.fullmatch(r"\s*(>=|<=|>|<|==)\s*([-+0-9.eE_]+)\s*", str(wanted))
    try:
        if match:
            return match[1], float(match[2])
    except ValueError:
        pass
    raise UserError(f"expect.{name}: {wanted!r} is neither a number nor a comparison such as '>=0.9'")


def _is_neutral(key: str) -> bool:
    return key in NEUTRAL or key.split(".")[0] in ("checkpoint", "log", "choices")
