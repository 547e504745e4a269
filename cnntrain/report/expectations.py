"""Compare the results of an experiment with the values that its config file expects (`expect`)."""

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cnntrain.errors import UserError
from cnntrain.types import Finding

# Overrides that do not change the results of an experiment: where it runs and what it writes.
NEUTRAL = {
    "run_dir", "resume", "device", "threads", "seed", "trusted_packages", "deterministic", "data.root", "data.workers",
    "data.cache", "data.timeout_s",
}  # fmt: skip
_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}


def judge_expectations(
    expected: Mapping[str, Any] | None, results: Mapping[str, Any], changed: Sequence[str]
) -> list[Finding]:
    """Return one finding per expectation; the verdict is SKIP if other settings were overridden.

    Args:
        expected: name of a result -> number (equality) or comparison such as ">=0.935".
        results: content of results.json.
        changed: keys whose values differ from the experiment's config file.

    Raises:
        UserError: an expectation is neither a number nor a comparison.
    """
    if not expected:
        return []
    flat = {**results, **(results.get("best") or {}), **(results.get("test") or {})}
    changed = [key for key in changed if not _is_neutral(key)]
    findings = []
    for name, wanted in expected.items():
        compare, number = parse_expectation(name, wanted)
        if changed:
            reason = f"not evaluated because other settings were changed: {', '.join(changed)}"
            findings.append(Finding(f"expect {name}", "SKIP", reason))
            continue
        value = flat.get(name)
        passed = isinstance(value, int | float) and bool(_COMPARISONS[compare](value, number))
        text = wanted if isinstance(wanted, str) else f"{wanted:,}"
        findings.append(Finding(f"expect {name}", "PASS" if passed else "FAIL", f"{value}, expected {text}"))
    return findings


def parse_expectation(name: str, wanted: Any) -> tuple[str, float]:
    """Parse `1677674` or `">=0.935"` into (comparison, number)."""
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
