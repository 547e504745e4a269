"""Progress of a sweep on the console: a live table on a terminal, otherwise one line per finished run."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from cnntrain.io.streams import lenient, printable
from cnntrain.report.console import columns_of, rows_table, seconds_text, value_text
from cnntrain.sweep.plan import PlannedRun, Repeat, SweepPlan, round_text, setting_name
from cnntrain.sweep.study import Outcome


class SweepProgress:
    """Show the state of a sweep. A context manager.

    Attributes:
        pending: number of runs that have not started; updated by the sweep.

    Args:
        console: where to print; None: standard error.
    """

    def __init__(self, plan: SweepPlan, console: Console | None = None) -> None:
        # Bind the current stream: runs in this process replace sys.stderr by their own log.
        self.console = console or Console(file=lenient(sys.stderr))
        self.plan, self.pending = plan, 0
        self.metric = f"val/{plan.monitor[0]}" if plan.monitor else ""
        self.counts: dict[str, int] = {}  # finished runs by status
        self.best: tuple[float, str] | None = None  # mean over the runs of the best finished setting
        self._values: dict[int, list[float]] = {}  # metrics of completed runs by trial
        self._running: dict[tuple[int, Repeat], dict[str, object]] = {}
        self._finished: list[dict[str, object]] = []
        self._start_s: dict[tuple[int, Repeat], float] = {}
        self._durations_s: list[float] = []
        self._live = Live(
            get_renderable=self._draw,
            console=self.console,
            refresh_per_second=2,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> "SweepProgress":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def start_run(self, run: PlannedRun) -> None:
        key = (run.trial, run.repeat)
        self._start_s[key] = time.monotonic()
        self._running[key] = {**self._row(run), "status": "running"}

    def update_run(self, run: PlannedRun, epoch: int, value: float) -> None:
        """Show the metric of a running run after an epoch."""
        self._running[run.trial, run.repeat] |= {"epoch": epoch, self.metric or "metric": value}

    def finish_run(self, run: PlannedRun, outcome: Outcome) -> None:
        """Show the outcome of a run; an error is printed immediately."""
        key = (run.trial, run.repeat)
        self._running.pop(key, None)
        self._durations_s.append(time.monotonic() - self._start_s.pop(key, time.monotonic()))
        row = {**self._row(run), "status": outcome.status, "epoch": outcome.metrics.get("epoch")}
        row |= {self.metric: outcome.value} if self.metric else outcome.metrics
        self._finished.append({**row, "time": seconds_text(outcome.time_s)})
        name = setting_name(run.values, self.plan.varying(run.repeat)) or str(run.repeat)
        self.count(outcome, run.trial, run.values)
        if outcome.error:
            self._print(f"error: {name}: {outcome.status}: {outcome.error}\n       {run.folder / 'log.txt'}")
        if not self.console.is_terminal:
            result = str(outcome.metrics.get("verdict", ""))
            if outcome.value is not None:
                result = f"{self.metric} {value_text(outcome.value)}"
            parts = [f"{outcome.status} {result}".rstrip(), seconds_text(outcome.time_s), self._time_left()]
            number = sum(self.counts.values())
            self._print(f"[{number}/{self.total}] {name}: {', '.join(part for part in parts if part)}")

    def count(self, outcome: Outcome, trial: int, values: Mapping[str, str]) -> None:
        """Count a finished run, from this session or an earlier one, and update the best setting."""
        self.counts[outcome.status] = self.counts.get(outcome.status, 0) + 1
        if outcome.status != "done" or outcome.value is None or not self.plan.monitor:
            return
        completed = self._values.setdefault(trial, [])
        completed.append(outcome.value)
        if len(completed) == len(self.plan.repeats):
            mean = sum(completed) / len(completed)
            if self.best is None or (mean > self.best[0]) == (self.plan.monitor[1] == "max"):
                self.best = (mean, setting_name(values) or "the only setting")

    @property
    def total(self) -> int:
        return sum(self.counts.values()) + len(self._running) + self.pending

    def _print(self, text: str) -> None:
        self.console.print(Text(printable(text)), soft_wrap=True)

    def _row(self, run: PlannedRun) -> dict[str, object]:
        values = {key: round_text(value) for key, value in run.values.items()}
        return {"run": run.trial, **values, **self.plan.varying(run.repeat)}

    def _time_left(self) -> str:
        """Estimate the time left from the mean duration of the runs in this session."""
        unfinished = len(self._running) + self.pending
        if not self._durations_s or unfinished <= 0:
            return ""
        mean_s = sum(self._durations_s) / len(self._durations_s)
        return f"about {seconds_text(mean_s * unfinished / min(self.plan.sweep.jobs, unfinished))} left"

    def _draw(self) -> Group:
        running = list(self._running.values())
        max_finished = max(self.console.size.height - len(running) - 9, 3)
        rows = [*self._finished[-max_finished:], *running]
        table = rows_table(rows, columns_of(rows))
        for column in table.columns:
            column.overflow, column.no_wrap = "ellipsis", True
        head = Text(f"sweep of {self.total} runs: ", style="bold")
        counts = {"running": len(running), **self.counts, "pending": self.pending}
        text = ", ".join(f"{count} {status}" for status, count in counts.items())
        head.append(f"{text}   {self._time_left()}", style="not bold")
        best = f"best so far: {self.metric} {value_text(self.best[0])} ({self.best[1]})" if self.best else ""
        return Group(head, table, Text(best, style="green"))
