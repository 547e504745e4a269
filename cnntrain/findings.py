"""What everything that judges returns: pre-flight, lint, data scan, overfit and check."""

from dataclasses import asdict, dataclass
from typing import Literal

Verdict = Literal["PASS", "WARN", "FAIL", "SKIP"]


@dataclass(frozen=True)
class Finding:
    """One judgement.

    `name` is the check's, `evidence` the numbers it rests on, `cause` the likely reason, `remedy` what to do,
    and `keys` the config keys concerned.
    """

    name: str
    verdict: Verdict
    evidence: str = ""
    cause: str = ""
    remedy: str = ""
    keys: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return asdict(self)
