"""Names from files of strangers can't steer the terminal."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from cnntrain.cli import main
from cnntrain.io.streams import printable
from cnntrain.report.console import log_to_console, markdown, print_findings, print_rows
from cnntrain.types import Finding

EVIL = "\x1b[2J\x1b]0;title\x07a\r\x9b2Jb\x7f\u202ec\x08"


def test_control_characters_are_escaped_and_others_are_not() -> None:
    assert printable(EVIL) == "\\x1b[2J\\x1b]0;title\\x07a\\r\\x9b2Jb\\x7f\\u202ec\\x08"
    assert printable("Zürich\t1\n日本語 🐈 \\x1b") == "Zürich\t1\n日本語 🐈 \\x1b"
    assert printable("\udcff") == "\\udcff"


def test_tables_findings_log_and_errors_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    console = Console(file=out, width=200)
    print_rows([{f"metric{EVIL}": EVIL}], console=console)
    print_findings([Finding("x", "WARN", EVIL, EVIL, EVIL, (EVIL,))], console=console)
    log_to_console().warning("%s", EVIL)
    assert main(["evaluate", f"checkpoint={EVIL}"]) == 2
    written = out.getvalue() + markdown([{EVIL: EVIL}]) + "".join(capsys.readouterr())
    assert "title" in written and not any(character in written for character in "\x1b\x07\x08\x7f\x9b\u202e\r")
    assert not Path("title").exists()
