"""Short words for findings. A check's name is put in by who runs it."""

from collections.abc import Sequence

from cnntrain.types import Finding


def passed(evidence: str) -> Finding:
    return Finding("", "PASS", evidence)


def skipped(reason: str) -> Finding:
    return Finding("", "SKIP", reason)


def warned(evidence: str, cause: str, remedy: str, *keys: str) -> Finding:
    return Finding("", "WARN", evidence, cause, remedy, keys)


def failed(evidence: str, cause: str, remedy: str, *keys: str) -> Finding:
    return Finding("", "FAIL", evidence, cause, remedy, keys)


def some(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
