"""What a user watches while a sweep runs: a table on a terminal, a line per run that has ended elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cnntrain.io.streams import lenient, printable
from cnntrain.report.progress import seconds_text
from cnntrain.report.table import rows_table, value_text
from cnntrain.sweep.plan import Repeat, Run, SweepPlan, short
from cnntrain.sweep.study import Outcome

STYLES = {"done": "green", "running": "blue", "pruned": "dim", "diverged": "yellow", "failed": "bold red",
          "killed": "bold red", "stopped": "yellow"}  # fmt: skip


class SweepProgress:
    """The state of a sweep, redrawn as it changes. A context manager.

    Attributes:
        to_come: runs that have not begun; kept up to date by the sweep.

    Args:
        console: where to draw; null: standard error.
    """

    def __init__(self, plan: SweepPlan, console: Console | None = None) -> None:
        import sys

        # The stream of now: a run in this process has its own log put in its place.
        self.console = console or Console(file=lenient(sys.stderr))
        self.plan, self.to_come = plan, 0
        self.metric = f"val/{plan.monitor[0]}" if plan.monitor else ""
        self.counts: dict[str, int] = {}
        self.best: tuple[float, str] | None = None  # mean over the runs of the best finished setting
        self._values: dict[int, list[float]] = {}
        self._running: dict[tuple[int, Repeat], dict[str, object]] = {}
        self._ended: list[dict[str, object]] = []
        self._begun: dict[tuple[int, Repeat], float] = {}
        self._seconds: list[float] = []
        self._live = Live(
            get_renderable=self._draw, console=self.console, refresh_per_second=2, transient=True,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip

    def __enter__(self) -> "SweepProgress":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def started(self, run: Run) -> None:
        key = (run.trial, run.repeat)
        self._begun[key] = time.monotonic()
        self._running[key] = {**self._row(run), "status": "running"}

    def epoch(self, run: Run, epoch: int, value: float) -> None:
        self._running[run.trial, run.repeat] |= {"epoch": epoch, self.metric or "metric": value}

    def ended(self, run: Run, outcome: Outcome) -> None:
        """A run's end: at once, with its error's first line where it has one."""
        key = (run.trial, run.repeat)
        self._running.pop(key, None)
        self._seconds.append(time.monotonic() - self._begun.pop(key, time.monotonic()))
        row = {**self._row(run), "status": outcome.status, "epoch": outcome.figures.get("epoch")}
        row |= {self.metric: outcome.value} if self.metric else outcome.figures
        self._ended.append({**row, "time": seconds_text(outcome.time_s)})
        name = self.name(run)
        self.note(outcome, run.trial, run.values)
        if outcome.error:
            self.say(f"error: {name}: {outcome.status}: {outcome.error}\n       {run.folder / 'log.txt'}")
        if not self.console.is_terminal:
            figure = str(outcome.figures.get("verdict", ""))
            if outcome.value is not None:
                figure = f"{self.metric} {value_text(outcome.value)}"
            parts = [f"{outcome.status} {figure}".rstrip(), seconds_text(outcome.time_s), self._left()]
            count = sum(self.counts.values())
            self.say(f"[{count}/{self.total}] {name}: {', '.join(part for part in parts if part)}")

    def note(self, outcome: Outcome, trial: int, values: Mapping[str, str]) -> None:
        """Count a run that has ended, in this sitting or before."""
        self.counts[outcome.status] = self.counts.get(outcome.status, 0) + 1
        if outcome.status != "done" or outcome.value is None or not self.plan.monitor:
            return
        known = self._values.setdefault(trial, [])
        known.append(outcome.value)
        if len(known) == len(self.plan.repeats):
            mean = sum(known) / len(known)
            if self.best is None or (mean > self.best[0]) == (self.plan.monitor[1] == "max"):
                self.best = (mean, setting_name(values) or "the only setting")

    @property
    def total(self) -> int:
        return sum(self.counts.values()) + len(self._running) + self.to_come

    def say(self, text: str) -> None:
        self.console.print(Text(printable(text)), soft_wrap=True)

    def name(self, run: Run) -> str:
        """`model=lenet5 optimizer.lr=0.01 seed=1`."""
        return setting_name(run.values, self.plan.varying(run.repeat)) or str(run.repeat)

    def _row(self, run: Run) -> dict[str, object]:
        settings = {key: short(value) for key, value in run.values.items()}
        return {"run": run.trial, **settings, **self.plan.varying(run.repeat)}

    def _left(self) -> str:
        """Time left, from the mean of the runs of this sitting."""
        open_runs = len(self._running) + self.to_come
        if not self._seconds or open_runs <= 0:
            return ""
        seconds = sum(self._seconds) / len(self._seconds) * open_runs / min(self.plan.sweep.jobs, open_runs)
        return f"about {seconds_text(seconds)} left"

    def _draw(self) -> Group:
        running, ended = list(self._running.values()), self._ended
        room = max(self.console.size.height - len(running) - 9, 3)
        table: Table = rows_table([*ended[-room:], *running])
        for column in table.columns:
            column.overflow, column.no_wrap = "ellipsis", True
        head = Text(f"sweep of {self.total} runs: ", style="bold")
        parts = [("running", len(running)), *self.counts.items()]
        head.append(", ".join(f"{count} {status}" for status, count in parts), style="not bold")
        head.append(f", {self.to_come} to come   {self._left()}", style="not bold")
        best = f"best so far: {self.metric} {value_text(self.best[0])} ({self.best[1]})" if self.best else ""
        return Group(head, table, Text(best, style="green"))


def setting_name(values: Mapping[str, str], repeat: Mapping[str, int] | None = None) -> str:
    """Format a setting and its repeat for display, with rounded numbers."""
    named = {key: short(value) for key, value in values.items()}
    return " ".join(f"{key}={value}" for key, value in {**named, **(repeat or {})}.items())
