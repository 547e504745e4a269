"""Control characters in names from untrusted files do not reach the terminal."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from cnntrain.cli import main
from cnntrain.io.streams import escape_control_characters
from cnntrain.report.console import log_to_console, markdown, print_findings, print_rows
from cnntrain.types import Finding

HOSTILE = "\x1b[2J\x1b]0;title\x07a\r\x9b2Jb\x7f\u202ec\x08"


def test_only_control_characters_are_escaped() -> None:
    assert escape_control_characters(HOSTILE) == "\\x1b[2J\\x1b]0;title\\x07a\\r\\x9b2Jb\\x7f\\u202ec\\x08"
    assert escape_control_characters("Zürich\t1\n日本語 🐈 \\x1b") == "Zürich\t1\n日本語 🐈 \\x1b"
    assert escape_control_characters("\udcff") == "\\udcff"


def test_tables_findings_logs_and_errors_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    console = Console(file=out, width=200)
    print_rows([{f"metric{HOSTILE}": HOSTILE}], console=console)
    print_findings([Finding("x", "WARN", HOSTILE, HOSTILE, HOSTILE, (HOSTILE,))], console=console)
    log_to_console().warning("%s", HOSTILE)
    assert main(["evaluate", f"checkpoint={HOSTILE}"]) == 2
    written = out.getvalue() + markdown([{HOSTILE: HOSTILE}]) + "".join(capsys.readouterr())
    assert "title" in written and not any(character in written for character in "\x1b\x07\x08\x7f\x9b\u202e\r")
    assert not Path("title").exists()
