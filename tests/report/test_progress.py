"""A bar on a terminal, plain lines elsewhere."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from cnntrain.report import progress
from cnntrain.report.progress import ProgressBar, seconds_text, wrap_values


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run(console: Console, every_s: float = 1e9, **more) -> str:
    with ProgressBar(20, 2, watch=("top1",), console=console, every_s=every_s, **more) as bar:
        for epoch in range(2):
            for step in range(1, 11):
                bar.log_step(10 * epoch + step, epoch, {"loss": 1 / step, "lr": 0.1})
            row = {"epoch": epoch, "train/loss": 0.1, "val/loss": 0.2, "val/top1": 0.9, "val/top5": 1.0}
            bar.log_epoch(epoch, row, best=epoch == 1)
        bar.log("done [not markup]")
    return text_of(console)


def test_a_log_file_gets_one_line_an_epoch():
    lines = run(plain_console()).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("epoch 1/2  train/loss 0.1  val/loss 0.2  val/top1 0.9  ")
    assert lines[1].endswith("*")
    assert lines[2] == "done [not markup]"


def test_long_epochs_get_lines_in_between_with_time_left():
    lines = run(plain_console(), every_s=0.0).splitlines()
    assert len(lines) == 23
    assert "step 10/20 (50%, " in lines[9]
    assert "left)  loss 0.1" in lines[9]


def test_a_resumed_run_does_not_count_what_others_did():
    bar = ProgressBar(100, 10, done_steps=90, console=plain_console())
    assert bar.seconds_left() != bar.seconds_left()  # NaN: nothing done yet
    bar.log_step(95, 9, {"loss": 1.0})
    bar._started -= 10.0  # five steps took ten seconds, and five are left
    assert bar.seconds_left() == pytest.approx(10, abs=0.5)


def test_a_pause_counts_neither_as_time_of_an_epoch_nor_for_the_time_left(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    console = plain_console()
    bar = ProgressBar(100, 1, console=console)
    for step in (10, 20, 30):
        now[0] += 1.0
        bar.log_step(step, 0, {"loss": 1.0})
        with bar.paused():
            now[0] += 500.0
            with bar.paused():
                now[0] += 500.0
    assert bar.seconds_left() == pytest.approx(7)
    bar.log_epoch(0, {"loss": 1.0})
    assert text_of(console).rstrip().endswith("3.0 s")


def test_a_slow_first_step_does_not_count_for_the_time_left(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    bar = ProgressBar(100, 1, console=plain_console())
    for step, seconds in ((1, 60.0), (11, 1.0), (21, 1.0)):
        now[0] += seconds
        bar.log_step(step, 0, {"loss": 1.0})
    assert bar.seconds_left() == pytest.approx(7.9)


def test_other_processes_say_nothing():
    assert run(plain_console(), every_s=0.0, enabled=False) == ""


def test_a_terminal_gets_a_bar_with_loss_and_metric():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    text = run(console)
    assert "epoch 2/2" in text
    assert "loss 0.1" in text
    assert "left" in text


def test_long_lines_are_not_broken_in_a_file():
    console = plain_console()
    ProgressBar(1, 1, console=console).log("x" * 300)
    assert text_of(console) == "x" * 300 + "\n"


def test_seconds_are_readable():
    seconds = (4.24, 185, 3600 * 2 + 600, float("nan"))
    assert [seconds_text(s) for s in seconds] == ["4.2 s", "3 min 05 s", "2 h 10 min", "?"]


@pytest.mark.parametrize("width", [80, 60, 30])
def test_an_epochs_line_is_broken_between_its_figures_on_a_terminal(width: int):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    row = {"train/loss": 0.12345, "val/loss": 0.23456, "train/top1": 0.91234, "val/top1": 0.92345}
    bar = ProgressBar(1200, 120, watch=("top1",), console=console)
    bar.log_epoch(10, row, best=True)
    lines = text_of(console).splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= width
    figures = [part for line in lines for part in line.strip().split("  ")]
    assert {f"{name} {value:.4g}" for name, value in row.items()} <= set(figures)


def test_a_line_that_fits_stays_as_it_is():
    assert wrap_values("epoch  1/120  loss 0.1", 80) == "epoch  1/120  loss 0.1"
    assert wrap_values("loss 0.1  " + "x" * 90, 80) == "loss 0.1\n    " + "x" * 90
