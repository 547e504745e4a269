"""`--help` and `cnntrain help`."""

import pytest

from cnntrain.cli import commands, main


@pytest.mark.parametrize("command", sorted(commands()))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert main(["help", command]) == 0
    assert capsys.readouterr().out == text and len(text) > 100


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--help"], ["--config-dir DIR", "lr-find", "fashion_mnist", "batch_size: 64"]),
        (["help"], ["--config-dir DIR"]),
        (["--help", "data=image_folder"], ["data.root: null", "data.cache: auto"]),
        (["help", "data=image_folder"], ["data.root: null", "data.cache: auto"]),
        (["help", "optimizer.lr"], ["optimizer=adam, adamw, torch", "1.0e-3", "0.05"]),
        (["evaluate", "--help"], ["split: test"]),
    ],
)
def test_help_texts(argv: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in parts), printed


def test_help_for_an_unknown_key_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "lr"]) == 2 and "'optimizer.lr'" in capsys.readouterr().err
    assert main(["help", "data.store"]) == 2 and "data.cache" in capsys.readouterr().err
    assert main(["--help", "model=resnet81"]) == 2 and "'resnet18'" in capsys.readouterr().err
