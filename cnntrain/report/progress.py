"""What a user watches while a run goes on: a bar on a terminal, plain lines in a log file."""

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


class Bar:
    """Progress over all steps of a run, with time left, the loss and the metric that is watched.

    On a terminal: one bar, and above it a line per finished epoch. Elsewhere: the line per epoch, and inside
    long epochs one line every `every_s` seconds. Use as a context manager.

    Args:
        total_steps: of the whole run.
        epochs: of the whole run, for the text.
        done_steps: where a resumed run starts.
        watch: names of the metrics worth a place in an epoch's line besides the losses, e.g. `['top1']`.
        console: where to draw; null: standard error, as progress is not a result.
        every_s: seconds between plain lines within an epoch.
        enabled: false shows nothing at all (other processes than the first).
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
        self._first_reading: tuple[int, float] | None = None
        self._progress: Progress | None = None
        if enabled and self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None, complete_style="blue", finished_style="blue"),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(compact=True),
                TextColumn("[dim]left[/]  {task.fields[figures]}"),
                console=self.console,
                transient=True,
                speed_estimate_period=300.0,
                get_time=self._now,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task("", total=total_steps, completed=done_steps, figures="")

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def reading(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Show where the run stands; `values` were read from the device by the caller, at its own
        interval."""
        self._step = step
        self._first_reading = self._first_reading or (step, self._now())
        figures = _figures(values, ("loss", *self.watch))
        if self._progress is not None:
            text = f"epoch {epoch + 1}/{self.epochs}"
            self._progress.update(self._task, completed=step, description=text, figures=figures)
        elif self._enabled and self._now() - self._last_line >= self._every_s:
            self._last_line = self._now()
            share = f"{100 * step / max(self.total_steps, 1):.0f}%"
            if step > self._first_step:
                share += f", {seconds_text(self.seconds_left())} left"
            place = f"epoch {epoch + 1}/{self.epochs}, step {step}/{self.total_steps}"
            self._line(f"  {place} ({share})  {figures}")

    def epoch(self, epoch: int, row: Mapping[str, float], best: bool = False) -> None:
        """One line for a finished epoch: losses, the watched metrics, the time it took; a star for the best
        so far."""
        seconds, self._epoch_started = self._now() - self._epoch_started, self._now()
        self._last_line = self._now()
        names = [f"{part}/{name}" for name in ("loss", *self.watch) for part in ("train", "val")]
        width = len(str(self.epochs))
        line = f"epoch {epoch + 1:>{width}}/{self.epochs}  {_figures(row, names)}  {seconds_text(seconds)}"
        line += "  *" if best else ""
        # A terminal would break a long line within a number. A log file's lines are as long as they are.
        self._line(fold_figures(line, self.console.width) if self.console.is_terminal else line)

    def seconds_left(self) -> float:
        """From the mean speed since the first reading, validation included; before the second, since the start."""
        first, started = self._first_reading or (self._first_step, self._started)
        if first == self._step:
            first, started = self._first_step, self._started
        done, elapsed = self._step - first, self._now() - started
        return elapsed / done * (self.total_steps - self._step) if done else float("nan")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time that the block takes out of all times, as that of drawing pictures."""
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
        """Seconds on a clock that stands still while it is paused."""
        return (time.monotonic() if self._paused_at is None else self._paused_at) - self._paused_s

    def log(self, message: str) -> None:
        """A line of text, above the bar where there is one."""
        self._line(printable(message))

    def _line(self, text: str) -> None:
        if self._enabled:
            # A log file's lines are as long as they are: rich would break them at 80.
            self.console.print(Text(text), soft_wrap=True)


def fold_figures(line: str, width: int) -> str:
    """The line, broken between its figures (two spaces) where it is longer than `width`; later lines are indented."""
    lines = [""]
    for part in line.split("  "):
        joined = f"{lines[-1]}  {part}" if lines[-1] else part
        if len(joined) > width and lines[-1].strip():
            lines.append(f"    {part}")
        else:
            lines[-1] = joined
    return "\n".join(lines)


def seconds_text(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds != seconds:
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _figures(values: Mapping[str, float], names: tuple[str, ...] | list[str]) -> str:
    return "  ".join(f"{name} {values[name]:.4g}" for name in names if name in values)
