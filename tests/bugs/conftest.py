"""Fixtures that build the context of checks from overrides, and run checks by name."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cnntrain import compose
from cnntrain.checks.check_run import build_context, run_checks, select_checks
from cnntrain.checks.context import CheckContext
from cnntrain.train.setup import build_components
from cnntrain.train.signals import StopFlag
from cnntrain.types import Finding

PLANTED = Path(__file__).parent / "planted"


@pytest.fixture(scope="session")
def context_of() -> Callable[..., CheckContext]:
    """`context_of("model=mlp", ...)`: the context of that run; `planted/` is its config folder."""

    def make(*overrides: str) -> CheckContext:
        settings = compose("threads=1", "log.figures=false", *overrides, config_dir=PLANTED)
        return build_context(build_components(settings), time.monotonic() + 600, StopFlag())

    return make


@pytest.fixture(scope="session")
def findings_of() -> Callable[..., dict[str, Finding]]:
    """`findings_of(context, "start", "loss-sign")`: the findings of checks and topics, by name."""

    def run(context: CheckContext, *words: str) -> dict[str, Finding]:
        return {finding.name: finding for finding in run_checks(context, select_checks(words), lambda *_: None)}

    return run
