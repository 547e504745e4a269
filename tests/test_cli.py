"""Arguments, help, completion and exit codes of the command line."""

from pathlib import Path

import pytest

from cnntrain.cli import complete, main, parse_arguments
from cnntrain.errors import UserError


def test_commands_and_options() -> None:
    assert parse_arguments(["overfit", "model=mlp"]).command == "overfit"
    assert parse_arguments(["-m", "seed=1,2"]).multirun
    with pytest.raises(UserError, match="did you mean 'overfit'"):
        parse_arguments(["overfitt"])
    with pytest.raises(UserError, match="--multirun"):
        parse_arguments(["--multirn"])


def test_a_setting_written_as_an_option_is_corrected() -> None:
    with pytest.raises(UserError, match=r"--epochs; write settings as KEY=VALUE, for example epochs=2"):
        parse_arguments(["--epochs", "2"])


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (["optimizer.lr", "0.1"], "optimizer.lr=0.1"),
        (["optimizer.lr=0.1", "epochs", "5"], "epochs=5"),
        (["model", "resnet18"], "model=resnet18"),
    ],
)
def test_a_setting_without_equals_sign_is_corrected(arguments: list[str], setting: str) -> None:
    with pytest.raises(UserError, match=rf"KEY=VALUE, for example {setting}"):
        parse_arguments(arguments)


def test_cfg_prints_the_config_and_most_commands_refuse_multirun(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "overfit", "check", "bench", "lr-find", "preview", "inspect"):
        assert main([command, "--cfg", "model=mlp"]) == 0
        assert "model: mlp" in capsys.readouterr().out
    for options in ([], ["-m"]):
        assert main(["inspect", *options, "--cfg", "model=mlp,lenet5"]) == 0
        assert "model: mlp" in capsys.readouterr().out
    assert main(["check", "--cfg", "checkpoint=x", "split=test"]) == 0
    assert "split: test" in capsys.readouterr().out
    assert main(["clean", "--cfg"]) == 2
    assert main(["predict", "--cfg", "checkpoint=x", "images=y"]) == 0
    assert "checkpoint: x" in capsys.readouterr().out and not Path("outputs").exists()
    for command in ("check", "bench", "lr-find", "preview", "evaluate", "clean"):
        assert main([command, "-m", "model=mlp,lenet5"]) == 2
        assert f"{command}: -m" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["devices=2", "timeout_s=60"])
def test_only_training_has_several_processes(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overfit", f"launch.{key}"]) == 2
    assert "launch: `overfit` uses one process" in capsys.readouterr().err


def test_completion_of_commands_options_and_keys() -> None:
    assert "overfit" in complete("cnntrain ov")
    assert {"model=resnet18", "model=resnet34"} <= set(complete("cnntrain model=resnet"))
    assert "optimizer.lr=" in complete("cnntrain overfit optimizer.l")
    assert "checkpoint=" in complete("cnntrain evaluate che")


def test_options_may_follow_overrides() -> None:
    invocation = parse_arguments(["compare", "a", "metric=loss", "b", "-m", "--config-dir", ".", "+x=1", "~y"])
    assert (invocation.command, invocation.words) == ("compare", ("a", "b"))
    assert invocation.overrides == ("metric=loss", "+x=1", "~y")
    assert invocation.multirun and invocation.config_dir == Path(".") and not invocation.help
    assert parse_arguments(["--config-dir=."]).config_dir == Path(".")


@pytest.mark.parametrize(
    "argv", [["-x"], ["--"], ["-1"], ["--help=1"], ["--config-dir"], ["--config-dir", "nowhere"], ["--cf"]]
)
def test_invalid_options_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert argv[-1].partition("=")[0] in capsys.readouterr().err


def test_version_and_completion_script_run_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--version"]) == 0 and main(["--completion"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("cnntrain ") and "complete -o" in printed
