"""Tables say what the rows say."""

import io

import pytest
from rich.console import Console

from cnntrain.report.table import print_findings, print_rows, print_run_summary, value_text
from cnntrain.types import Finding


def captured(call) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    call(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rows_keep_their_order_and_show_gaps():
    rows = [{"model": "lenet5", "val/top1": 0.98765}, {"model": "mlp[1]", "status": "failed"}]
    text = captured(lambda console: print_rows(rows, "Sweep", console=console))
    assert text.index("model") < text.index("val/top1") < text.index("status")
    assert "0.9877" in text
    assert "mlp[1]" in text
    assert "–" in text


def test_a_file_gets_whole_rows():
    rows = [{f"column_{i}": "v" * 30 for i in range(10)}]
    text = captured(lambda console: print_rows(rows, console=console))
    assert max(len(line) for line in text.splitlines()) > 300


def test_the_summary_names_figures_folder_and_what_next(tmp_path):
    best = {"epoch": 8, "val/loss": 0.1, "val/top1": 0.99}
    results = {
        "parameters": 1256080,
        "wall_s": 65.0,
        "best": best,
        "test": {"test/loss": 0.2, "test/top1": 0.98},
    }
    text = captured(lambda console: print_run_summary(results, tmp_path, "top1", console))
    assert text.index("top1") < text.index("loss")
    assert all(part in text for part in ("0.99", "0.98", "best epoch 8 by top1", "1,256,080", "1 min 05 s"))
    assert f"tensorboard --logdir {tmp_path}" in text
    without = captured(lambda c: print_run_summary({"best": best, "test": None}, tmp_path, "top1", c))
    assert "test" not in without.split("run folder")[0]
    captured(lambda c: print_run_summary({"best": None, "test": None}, tmp_path, "top1", c))


def test_findings_end_with_the_worst_and_its_remedy():
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


def test_values_are_readable():
    assert [value_text(v) for v in (None, True, 3, 3.0, 0.123456, "x")] == [
        "–",
        "yes",
        "3",
        "3",
        "0.1235",
        "x",
    ]


@pytest.mark.parametrize("width", [80, 60])
def test_no_number_of_a_wide_table_is_broken(width: int) -> None:
    rows = [{"place": i, **{f"metric_{j}": 0.12345 + j + i / 100 for j in range(12)}} for i in range(3)]
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_rows(rows, title="sweep", console=console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    words = [word for line in lines for word in line.split()]
    assert max(map(len, lines)) <= width
    for row in rows:
        assert {value_text(value) for value in row.values()} <= set(words)
    assert words.count("place") > 1 and all(words.count(f"metric_{j}") == 1 for j in range(12))
