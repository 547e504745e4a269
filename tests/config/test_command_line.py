"""Command lines that are printed or stored."""

import shlex

import pytest
from hydra.core.override_parser.types import QuotedString
from hypothesis import given, settings
from hypothesis import strategies as st

from cnntrain.cli import parse_arguments
from cnntrain.config.command_line import (
    chosen_options,
    format_command,
    format_override,
    mask_passwords,
    without_passwords,
)
from cnntrain.config.compose import parse_overrides

SECRET = "s3c:r/t"
VALUES = (
    "outputs/a",
    "my run",
    "it's",
    "a=b,c",
    "007",
    "null",
    "1e5",
    "x\\",
    "\\'",
    "[a]",
    "ü",
    "$HOME",
    "",
    "-x",
    "~/x",
)


def read_back(text: str) -> str:
    (parsed,) = parse_overrides([text])
    value = parsed.value()
    return value.text if isinstance(value, QuotedString) else str(value) if isinstance(value, str) else repr(value)


@pytest.mark.parametrize("value", VALUES)
def test_values_survive_hydra_and_the_shell(value: str) -> None:
    (word,) = shlex.split(format_command([format_override("run_dir", value)]))
    assert read_back(word) == value


@settings(max_examples=50)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n$"), max_size=12))
def test_any_text_survives_quoting(value: str) -> None:
    assert read_back(format_override("run_dir", value)) == value


def test_plain_paths_have_no_quotes() -> None:
    assert format_override("run_dir", "outputs/2026-11-27/a.b") == "run_dir=outputs/2026-11-27/a.b"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("postgresql://me:secret@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("redis://:secret@host", "redis://:***@host"),
        ("mysql+pymysql://host/db?user=me&password=secret&x=1", "mysql+pymysql://host/db?user=me&password=***&x=1"),
        ("can't reach 'postgresql://me:secret@host/db'", "can't reach 'postgresql://me:***@host/db'"),
        ("sqlite:///a.db", "sqlite:///a.db"),
        ("http://host:8080/a and me@there", "http://host:8080/a and me@there"),
    ],
)
def test_passwords_in_urls_are_masked(text: str, masked: str) -> None:
    assert mask_passwords(text) == masked


@pytest.mark.parametrize("password", ["plain", SECRET, "with space", "at@sign", "quote's"])
def test_the_command_line_of_a_sweep_has_no_password(password: str) -> None:
    argv = ["-m", "model=a,b", f"sweep.storage='postgresql://me:{password}@host/db'"]
    line = parse_arguments(argv).command_line
    assert password not in line and password.split("@")[-1] not in line.partition("@")[0]
    assert shlex.split(line)[-1] == "sweep.storage='postgresql://me:***@host/db'"
    stored = without_passwords({"sweep": {"storage": f"postgresql://me:{password}@host/db", "jobs": 1}, "seed": 0})
    assert stored == {"sweep": {"storage": "postgresql://me:***@host/db", "jobs": 1}, "seed": 0}


def test_command_line_with_replaces_keys() -> None:
    asked = parse_arguments(["-m", "--config-dir=.", "model=mlp", "run_dir=old", "resume=none", "seed=1"])
    assert asked.command_line_with(run_dir="my run", resume="auto") == (
        "cnntrain -m --config-dir=. model=mlp seed=1 " + shlex.quote("run_dir='my run'") + " resume=auto"
    )


def test_chosen_options_are_found() -> None:
    command = "cnntrain --config-dir 'my nets' model=own 'trusted_packages=[a,b]' seed=1"
    assert chosen_options(command, ("--config-dir", "trusted_packages")) == [
        "--config-dir",
        "my nets",
        "trusted_packages=[a,b]",
    ]
    assert chosen_options("cnntrain --config-dir=nets", ("--config-dir",)) == ["--config-dir=nets"]
    assert chosen_options("", ("--config-dir",)) == [] and chosen_options("it's", ("x",)) == []
