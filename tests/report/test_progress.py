"""A bar on a terminal, lines elsewhere."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from cnntrain.report import progress
from cnntrain.report.progress import ProgressBar, wrap_values


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run(console: Console) -> str:
    with ProgressBar(20, 2, metrics=("top1",), console=console) as bar:
        for epoch in range(2):
            for step in range(1, 11):
                bar.log_step(10 * epoch + step, epoch, {"loss": 1 / step, "lr": 0.1})
            row = {"epoch": epoch, "train/loss": 0.1, "val/loss": 0.2, "val/top1": 0.9, "val/top5": 1.0}
            bar.log_epoch(epoch, row, best=epoch == 1)
    return text_of(console)


def test_a_log_file_gets_one_line_per_epoch() -> None:
    lines = run(plain_console()).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/2  train/loss 0.1  val/loss 0.2  val/top1 0.9  ")
    assert lines[1].endswith("*")


def test_long_epochs_get_further_lines_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    lines = run(plain_console()).splitlines()
    assert len(lines) == 22
    assert "step 10/20 (50%, " in lines[9]
    assert "left)  loss 0.1" in lines[9]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, set by the test."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_steps_before_a_resume_do_not_count_for_the_time_left(now: list[float]) -> None:
    bar = ProgressBar(100, 10, done_steps=90, console=plain_console())
    assert bar.seconds_left() is None
    for step in (91, 95):
        bar.log_step(step, 9, {"loss": 1.0})
        now[0] += 8.0
    assert bar.seconds_left() == 10  # four steps took 8 s, and five are left


def test_a_pause_is_excluded_from_all_times(now: list[float]) -> None:
    console = plain_console()
    bar = ProgressBar(100, 1, console=console)
    for step in (10, 20, 30):
        now[0] += 1.0
        bar.log_step(step, 0, {"loss": 1.0})
        with bar.paused():
            now[0] += 500.0
    assert bar.seconds_left() == 7
    bar.log_epoch(0, {"loss": 1.0})
    assert text_of(console).rstrip().endswith("3.0 s")


def test_a_slow_first_step_does_not_count_for_the_time_left(now: list[float]) -> None:
    bar = ProgressBar(100, 1, console=plain_console())
    for step, seconds in ((1, 60.0), (11, 1.0), (21, 1.0)):
        now[0] += seconds
        bar.log_step(step, 0, {"loss": 1.0})
    assert bar.seconds_left() == 8


def test_a_terminal_gets_a_bar_with_loss_and_metric() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    text = run(console)
    assert "epoch 2/2" in text
    assert "loss 0.1" in text
    assert "left" in text


@pytest.mark.parametrize("width", [80, 60, 30])
def test_lines_are_wrapped_between_values_on_a_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    row = {"train/loss": 0.12345, "val/loss": 0.23456, "train/top1": 0.91234, "val/top1": 0.92345}
    bar = ProgressBar(1200, 120, metrics=("top1",), console=console)
    bar.log_epoch(10, row, best=True)
    lines = text_of(console).splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= width
    values = [part for line in lines for part in line.strip().split("  ")]
    assert {f"{name} {value:.4g}" for name, value in row.items()} <= set(values)


def test_wrap_values() -> None:
    assert wrap_values("epoch  1/120  loss 0.1", 80) == "epoch  1/120  loss 0.1"
    assert wrap_values("loss 0.1  " + "x" * 90, 80) == "loss 0.1\n    " + "x" * 90
