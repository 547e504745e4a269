"""Training progress: a progress bar on a terminal, text lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from cnntrain.io.streams import lenient, printable


class ProgressBar:
    """Show the progress of a run with the remaining time, the loss and selected metrics. Use as a context manager.

    On a terminal: a bar, and a line per finished epoch above it. Elsewhere: a line per epoch, and within long epochs
    a line every `every_s` seconds.

    Args:
        total_steps: steps of the whole run.
        epochs: epochs of the whole run.
        done_steps: steps finished before a resume.
        watch: metrics to show besides the losses, for example `("top1",)`.
        console: default: standard error, because progress is not a result.
        every_s: seconds between text lines within an epoch.
        enabled: False shows nothing (ranks other than 0).
    """

    def __init__(
        self,
        total_steps: int,
        epochs: int,
        done_steps: int = 0,
        watch: tuple[str, ...] = (),
        console: Console | None = None,
        every_s: float = 30.0,
        enabled: bool = True,
    ) -> None:
        self.console = console or Console(file=lenient(sys.stderr))
        self.total_steps, self.epochs, self.watch = total_steps, epochs, watch
        self._step, self._first_step = done_steps, done_steps
        self._every_s, self._enabled = every_s, enabled
        self._paused_s = 0.0
        self._paused_at: float | None = None
        self._started = self._last_line = self._epoch_started = self._now()
        self._first_logged: tuple[int, float] | None = None
        self._progress: Progress | None = None
        if enabled and self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None, complete_style="blue", finished_style="blue"),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(compact=True),
                TextColumn("[dim]left[/]  {task.fields[values]}"),
                console=self.console,
                transient=True,
                speed_estimate_period=300.0,
                get_time=self._now,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task("", total=total_steps, completed=done_steps, values="")

    def __enter__(self) -> ProgressBar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def log_step(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Show the current step and its values."""
        self._step = step
        self._first_logged = self._first_logged or (step, self._now())
        text_values = _format_values(values, ("loss", *self.watch))
        if self._progress is not None:
            text = f"epoch {epoch + 1}/{self.epochs}"
            self._progress.update(self._task, completed=step, description=text, values=text_values)
        elif self._enabled and self._now() - self._last_line >= self._every_s:
            self._last_line = self._now()
            share = f"{100 * step / max(self.total_steps, 1):.0f}%"
            if step > self._first_step:
                share += f", {seconds_text(self.seconds_left())} left"
            position = f"epoch {epoch + 1}/{self.epochs}, step {step}/{self.total_steps}"
            self._line(f"  {position} ({share})  {text_values}")

    def log_epoch(self, epoch: int, row: Mapping[str, float], best: bool = False) -> None:
        """Print a line for a finished epoch: losses, watched metrics and duration; a star marks the best so far."""
        seconds, self._epoch_started = self._now() - self._epoch_started, self._now()
        self._last_line = self._now()
        names = [f"{part}/{name}" for name in ("loss", *self.watch) for part in ("train", "val")]
        width = len(str(self.epochs))
        line = f"epoch {epoch + 1:>{width}}/{self.epochs}  {_format_values(row, names)}  {seconds_text(seconds)}"
        line += "  *" if best else ""
        # On a terminal, long lines are wrapped between values. In a log file they are not wrapped.
        self._line(wrap_values(line, self.console.width) if self.console.is_terminal else line)

    def seconds_left(self) -> float:
        """Estimate the remaining time from the mean speed since the first logged step, validation included."""
        first, started = self._first_logged or (self._first_step, self._started)
        if first == self._step:
            first, started = self._first_step, self._started
        done, elapsed = self._step - first, self._now() - started
        return elapsed / done * (self.total_steps - self._step) if done else float("nan")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the duration of the block from all times, for example for drawing figures."""
        if self._paused_at is not None:
            yield
            return
        started = self._paused_at = time.monotonic()
        try:
            yield
        finally:
            self._paused_at = None
            self._paused_s += time.monotonic() - started

    def _now(self) -> float:
        """Return the seconds on a clock that stops while paused."""
        return (time.monotonic() if self._paused_at is None else self._paused_at) - self._paused_s

    def log(self, message: str) -> None:
        """Print a line of text above the bar."""
        self._line(printable(message))

    def _line(self, text: str) -> None:
        if self._enabled:
            # Without soft_wrap, rich would wrap lines in a log file at 80 characters.
            self.console.print(Text(text), soft_wrap=True)


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


def seconds_text(seconds: float) -> str:
    """Format a duration: `4.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds != seconds:
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _format_values(values: Mapping[str, float], names: tuple[str, ...] | list[str]) -> str:
    return "  ".join(f"{name} {values[name]:.4g}" for name in names if name in values)
