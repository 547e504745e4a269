"""How checks run: the precision of their numbers, and the state that they restore."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cnntrain import compose
from cnntrain.checks import check_run as run
from cnntrain.checks.check_run import build_context, check
from cnntrain.checks.context import CheckContext, passed
from cnntrain.train.setup import build_components
from cnntrain.train.signals import StopFlag
from cnntrain.types import Finding


@pytest.fixture
def context() -> CheckContext:
    settings = compose("threads=1", "model=mlp", "data.limit=60")
    return build_context(build_components(settings), time.monotonic() + 60, StopFlag())


@pytest.fixture
def tensor_float32() -> Iterator[None]:
    """Allow TensorFloat-32, as training on a GPU does."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(("name", "exact"), [("batch order", True), ("loop", True), ("learning rate", False)])
def test_only_trainings_use_tensor_float_32(
    name: str, exact: bool, context: CheckContext, tensor_float32: None
) -> None:
    seen: list[tuple[str, bool]] = []

    def record_and_fail(context: CheckContext) -> Finding:
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        raise ValueError("the settings are restored after an exception")

    (finding,) = run.run_checks(context, {name: record_and_fail}, lambda *_: None)
    assert finding.verdict == "FAIL"
    assert seen == [("highest", False) if exact else ("high", True)]
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32


def test_random_states_are_restored(context: CheckContext) -> None:
    state = torch.get_rng_state()
    run.run_checks(context, {"loss": lambda _: passed(str(torch.rand(3)))}, lambda *_: None)
    assert torch.equal(state, torch.get_rng_state())


def test_check_json_has_the_printed_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = compose("threads=1", "model=mlp", "data.limit=60", "log.figures=false", f"run_dir={tmp_path / 'run'}")
    report = check(settings, ["blank-images", "classes"])
    content = json.loads((tmp_path / "run" / "check.json").read_text())
    assert content["line"] == report["line"] and content["line"].startswith("2 PASS")
    assert f"PASS: {content['line']}\n" in capsys.readouterr().out
