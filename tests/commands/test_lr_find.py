"""`cnntrain lr-find`, and trainings with optimizer.lr=auto."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cnntrain import compose, overfit, train
from cnntrain.cli import commands, main
from cnntrain.errors import StoppedError, UserError
from cnntrain.train import checkpoint, loop, prepare

SMALL = (
    "data.limit=300",
    "epochs=2",
    "batch_size=32",
    "log.figures=false",
    "log.tensorboard=false",
    "threads=1",
    "model=mlp",
    "lr_find.steps=40",
    "lr_find.lowest=1e-5",
)


def test_the_command_prints_and_writes_both_suggestions(capsys: pytest.CaptureFixture[str]) -> None:
    assert "lr-find" in commands()
    assert main(["lr-find", *SMALL[:3], *SMALL[5:], "run_dir=found"]) == 0
    found = json.loads(Path("found/lr_find.json").read_text())
    printed = capsys.readouterr().out
    assert f"optimizer.lr={found['suggestion']:.2g}" in printed and f"optimizer.lr={found['steepest']:.2g}" in printed
    assert found["suggestion"] == found["diverged_at"] / 10
    assert len(found["rates"]) == len(found["losses"]) == len(found["smoothed"]) <= 40
    assert found["configured"] == 1e-3
    assert Path("found/figures/lr_find.png").stat().st_size > 5000


def test_no_suggestion_if_nothing_is_learned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lr-find", *SMALL, "run_dir=none", "lr_find.highest=2e-5"]) == 1
    assert "no suggestion" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0.1"], "is not an override"),
        (["-m", "seed=1,2"], "-m is not supported"),
        (["lr_find.highest=1e-9"], "lr_find.highest"),
    ],
)
def test_invalid_arguments_exit_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lr-find", *arguments]) == 2
    assert message in capsys.readouterr().err


def weights(run_dir: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(Path(run_dir) / "checkpoints" / "last.pt")["state"]["model"]


def test_auto_equals_the_found_rate_and_resumes_bit_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    train(compose(*SMALL, "optimizer.lr=auto", "run_dir=whole"))
    rate = yaml.safe_load(Path("whole/config.yaml").read_text())["optimizer"]["lr"]
    assert rate == checkpoint.load(Path("whole/checkpoints/last.pt"))["config"]["optimizer"]["lr"]
    assert isinstance(rate, float) and 1e-4 < rate < 1

    original = loop.set_learning_rate

    def stopping(optimizer: Any, schedule: Any, step: int) -> float:
        if step == 12 and optimizer.param_groups[0]["peak_lr"] == rate:  # the training's, not the range test's
            monkeypatch.setattr(loop, "set_learning_rate", original)
            raise StoppedError(15, "stopped")
        return original(optimizer, schedule, step)

    monkeypatch.setattr(loop, "set_learning_rate", stopping)
    with pytest.raises(StoppedError):
        train(compose(*SMALL, "optimizer.lr=auto", "run_dir=broken"))
    monkeypatch.setattr(prepare, "run_range_test", None)  # a resumed run has no need of it
    train(compose(*SMALL, "optimizer.lr=auto", "run_dir=broken", "resume=auto"))
    train(compose(*SMALL, f"optimizer.lr={rate}", "run_dir=typed"))
    for other in ("broken", "typed"):
        assert all(torch.equal(value, weights(other)[name]) for name, value in weights("whole").items()), other
    assert yaml.safe_load(Path("broken/config.yaml").read_text())["optimizer"]["lr"] == rate


def test_auto_in_overfit_and_without_learning() -> None:
    assert overfit(compose(*SMALL, "optimizer.lr=auto"))["verdict"] == "PASS"
    with pytest.raises(UserError, match="does not decrease at any learning rate"):
        train(compose(*SMALL, "optimizer.lr=auto", "lr_find.highest=2e-5", "run_dir=refused"))
    assert not Path("refused").exists()


def test_other_words_are_rejected_as_learning_rate() -> None:
    with pytest.raises(UserError, match=r"optimizer.lr: must be a number >= 0 or auto, got 'high'"):
        train(compose(*SMALL, "optimizer.lr=high"))
