"""A bench for checks from overrides as on the command line, and what chosen checks find on it."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cnntrain import compose
from cnntrain.checks.check_run import choose, run_checks
from cnntrain.checks.context import CheckContext
from cnntrain.commands.check import build_context
from cnntrain.train.setup import assemble
from cnntrain.train.signals import StopFlag
from cnntrain.types import Finding

PLANTED = Path(__file__).parent / "planted"


@pytest.fixture(scope="session")
def bench_of() -> Callable[..., CheckContext]:
    """`bench_of("model=mlp", ...)`: the parts of that run, laid out for checks; `planted/` is its config folder."""

    def make(*overrides: str) -> CheckContext:
        settings = compose("threads=1", "log.figures=false", *overrides, config_dir=PLANTED)
        return build_context(assemble(settings), time.monotonic() + 600, StopFlag())

    return make


@pytest.fixture(scope="session")
def judge() -> Callable[..., dict[str, Finding]]:
    """`judge(bench, "start", "loss-sign")`: the findings of checks and topics, by name."""

    def run(bench: CheckContext, *words: str) -> dict[str, Finding]:
        return {finding.name: finding for finding in run_checks(bench, choose(words), lambda *_: None)}

    return run
