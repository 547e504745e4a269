"""Training progress: a progress bar on a terminal, text lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cnntrain.io.streams import lenient
from cnntrain.report.console import format_seconds, print_line

LINE_INTERVAL_S = 30.0  # between text lines within an epoch
SPEED_PERIOD_S = 3600.0  # the remaining time is estimated from the mean speed in this period, validation included


class ProgressBar:
    """Show the progress of a run with the remaining time, the loss and selected metrics. Use as a context manager.

    On a terminal: a bar, and a line per finished epoch above it. Elsewhere: a line per epoch, and further lines within
    long epochs.

    Args:
        total_steps, epochs: of the whole run.
        done_steps: steps finished before a resume.
        metrics: metrics to show besides the losses, for example `("top1",)`.
        console: default: standard error, because progress is not a result.
    """

    def __init__(
        self,
        total_steps: int,
        epochs: int,
        done_steps: int = 0,
        metrics: tuple[str, ...] = (),
        console: Console | None = None,
    ) -> None:
        self.console = console or Console(file=lenient(sys.stderr))
        self.total_steps, self.epochs, self.metrics = total_steps, epochs, metrics
        self._paused_s = 0.0
        self._paused_at: float | None = None
        self._last_line = self._epoch_started = self._now()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, complete_style="blue", finished_style="blue"),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]left[/]  {task.fields[values]}"),
            console=self.console,
            transient=True,
            speed_estimate_period=SPEED_PERIOD_S,
            get_time=self._now,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=done_steps, values="")

    def __enter__(self) -> ProgressBar:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._progress.stop()

    def log_step(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Show the current step and its values."""
        text, position = _format_values(values, ("loss", *self.metrics)), f"epoch {epoch + 1}/{self.epochs}"
        self._progress.update(self._task, completed=step, description=position, values=text)
        if not self.console.is_terminal and self._now() - self._last_line >= LINE_INTERVAL_S:
            self._last_line = self._now()
            share = f"{100 * step / max(self.total_steps, 1):.0f}%"
            if (seconds := self.seconds_left()) is not None:
                share += f", {format_seconds(seconds)} left"
            print_line(f"  {position}, step {step}/{self.total_steps} ({share})  {text}", self.console)

    def log_epoch(self, epoch: int, row: Mapping[str, float], best: bool = False) -> None:
        """Print a line for a finished epoch: losses, metrics and duration; a star marks the best so far."""
        seconds, self._epoch_started = self._now() - self._epoch_started, self._now()
        self._last_line = self._now()
        names = [f"{part}/{name}" for name in ("loss", *self.metrics) for part in ("train", "val")]
        width = len(str(self.epochs))
        line = f"epoch {epoch + 1:>{width}}/{self.epochs}  {_format_values(row, names)}  {format_seconds(seconds)}"
        line += "  *" if best else ""
        # On a terminal, long lines are wrapped between values. In a log file they are not wrapped.
        print_line(wrap_values(line, self.console.width) if self.console.is_terminal else line, self.console)

    def seconds_left(self) -> float | None:
        """Estimate the remaining time from the speed since the first logged step; None before the second one."""
        return self._progress.tasks[0].time_remaining

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the duration of the block from all times, for example for drawing figures."""
        started = self._paused_at = time.monotonic()
        try:
            yield
        finally:
            self._paused_at = None
            self._paused_s += time.monotonic() - started

    def _now(self) -> float:
        """Return the seconds on a clock that stops while paused."""
        return (time.monotonic() if self._paused_at is None else self._paused_at) - self._paused_s


def wrap_values(line: str, width: int) -> str:
    """Wrap a line between values (separated by two spaces) to `width` characters; continuation lines are indented."""
    lines = [""]
    for part in line.split("  "):
        joined = f"{lines[-1]}  {part}" if lines[-1] else part
        if len(joined) > width and lines[-1].strip():
            lines.append(f"    {part}")
        else:
            lines[-1] = joined
    return "\n".join(lines)


def _format_values(values: Mapping[str, float], names: Sequence[str]) -> str:
    return "  ".join(f"{name} {values[name]:.4g}" for name in names if name in values)
