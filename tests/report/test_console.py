"""Tables, run summaries, findings and formatted values on the console."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from cnntrain.report.console import format_seconds, format_value, print_findings, print_rows, print_run_summary
from cnntrain.types import Finding


def captured(call: Callable[[Console], None]) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    call(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rows_keep_their_order_and_missing_values_are_dashes() -> None:
    rows = [{"model": "lenet5", "val/top1": 0.98765}, {"model": "mlp[1]", "status": "failed"}]
    text = captured(lambda console: print_rows(rows, "Sweep", console=console))
    assert text.index("model") < text.index("val/top1") < text.index("status")
    assert "0.9877" in text
    assert "mlp[1]" in text
    assert "–" in text


def test_tables_in_files_are_not_wrapped() -> None:
    rows = [{f"column_{i}": "v" * 30 for i in range(10)}]
    text = captured(lambda console: print_rows(rows, console=console))
    assert max(len(line) for line in text.splitlines()) > 300


def test_the_run_summary_has_metrics_folder_and_next_commands(tmp_path: Path) -> None:
    best = {"epoch": 8, "val/loss": 0.1, "val/top1": 0.99}
    test = {"test/loss": 0.2, "test/top1": 0.98}
    results = {"parameters": 1256080, "wall_s": 65.0, "best": best, "test": test}
    text = captured(lambda console: print_run_summary(results, tmp_path, "top1", console))
    assert text.index("top1") < text.index("loss")
    assert all(part in text for part in ("0.99", "0.98", "best epoch 8 by top1", "1,256,080", "1 min 05 s"))
    assert f"tensorboard --logdir {tmp_path}" in text
    without = captured(lambda c: print_run_summary({"best": best, "test": None}, tmp_path, "top1", c))
    assert "test" not in without.split("run folder")[0]
    captured(lambda c: print_run_summary({"best": None, "test": None}, tmp_path, "top1", c))


def test_findings_end_with_the_worst_and_its_remedy() -> None:
    findings = [
        Finding("first", "FAIL", "loss 2.303", "frozen [layer]", "unfreeze it", ("model.freeze",)),
        Finding("second", "PASS", "fine"),
        Finding("third", "SKIP"),
    ]
    text = captured(lambda console: print_findings(findings, console))
    assert text.index("third") < text.index("second") < text.index("first")
    assert "FAIL  first: loss 2.303" in text
    assert "likely cause: frozen [layer]" in text
    assert "remedy: unfreeze it" in text
    assert "keys: model.freeze" in text


def test_seconds_text() -> None:
    assert [format_seconds(s) for s in (4.24, 185, 3600 * 2 + 600)] == ["4.2 s", "3 min 05 s", "2 h 10 min"]


def test_value_text() -> None:
    values = (None, True, 3, 3.0, 0.123456, "x", float("nan"), float("-inf"))
    assert [format_value(value) for value in values] == ["–", "yes", "3", "3", "0.1235", "x", "nan", "-inf"]


@pytest.mark.parametrize("width", [80, 60])
def test_a_table_wider_than_the_terminal_is_split_between_columns(width: int) -> None:
    rows = [{"place": i, **{f"metric_{j}": 0.12345 + j + i / 100 for j in range(12)}} for i in range(3)]
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_rows(rows, title="sweep", console=console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    words = [word for line in lines for word in line.split()]
    assert max(map(len, lines)) <= width
    for row in rows:
        assert {format_value(value) for value in row.values()} <= set(words)
    assert words.count("place") > 1 and all(words.count(f"metric_{j}") == 1 for j in range(12))
