"""Progress of a sweep on the console: a live table on a terminal, otherwise one line per finished run."""

import statistics
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from cnntrain.io.streams import lenient
from cnntrain.report.console import format_seconds, format_value, list_columns, print_line, rows_table
from cnntrain.sweep.plan import PlannedRun, SweepPlan, rounded, trial_name
from cnntrain.sweep.run_workers import LOG_FILE
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
        self.counts: Counter[str] = Counter()  # finished runs by status
        self.best: tuple[float, str] | None = None  # mean over the runs of the best finished trial
        self._values: dict[int, list[float]] = {}  # metrics of completed runs by trial
        self._running: dict[Path, dict[str, object]] = {}  # rows of the table by run folder
        self._finished: list[dict[str, object]] = []
        self._durations_s: list[float] = []  # in this session
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

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def start_run(self, run: PlannedRun) -> None:
        self._running[run.folder] = {**self._row(run), "status": "running"}

    def update_run(self, run: PlannedRun, epoch: int, value: float) -> None:
        """Show the metric of a running run after an epoch."""
        self._running[run.folder] |= {"epoch": epoch, self.plan.metric or "metric": value}

    def finish_run(self, run: PlannedRun, outcome: Outcome) -> None:
        """Show the outcome of a run; an error is printed immediately."""
        metric = self.plan.metric
        del self._running[run.folder]
        row = {**self._row(run), "status": outcome.status, "epoch": outcome.metrics.get("epoch")}
        row |= {metric: outcome.value} if metric else outcome.metrics
        self._finished.append({**row, "time": format_seconds(outcome.time_s)})
        if outcome.time_s:  # unknown for a run whose process died
            self._durations_s.append(outcome.time_s)
        self.count(outcome, run.trial, run.values)
        name = trial_name(run.values, self.plan.varying(run.repeat))
        if outcome.error:
            error = f"error: {name}: {outcome.status}: {outcome.error}\n       {run.folder / LOG_FILE}"
            print_line(error, self.console)
        if not self.console.is_terminal:
            result = str(outcome.metrics.get("verdict", ""))
            if outcome.value is not None:
                result = f"{metric} {format_value(outcome.value)}"
            parts = [f"{outcome.status} {result}".rstrip(), format_seconds(outcome.time_s), self._time_left()]
            text = ", ".join(part for part in parts if part)
            print_line(f"[{self.counts.total()}/{self.total}] {name}: {text}", self.console)

    def count(self, outcome: Outcome, trial: int, values: Mapping[str, str]) -> None:
        """Count a finished run, from this session or an earlier one, and update the best trial."""
        self.counts[outcome.status] += 1
        if outcome.status != "done" or outcome.value is None or not self.plan.monitor:
            return
        completed = self._values.setdefault(trial, [])
        completed.append(outcome.value)
        if len(completed) == len(self.plan.repeats):
            mean = statistics.fmean(completed)
            if self.best is None or (mean > self.best[0]) == (self.plan.monitor[1] == "max"):
                self.best = (mean, trial_name(values))

    def _row(self, run: PlannedRun) -> dict[str, object]:
        return {"run": run.trial, **rounded(run.values), **self.plan.varying(run.repeat)}

    @property
    def total(self) -> int:
        return self.counts.total() + len(self._running) + self.pending

    def _time_left(self) -> str:
        """Estimate the time left from the mean duration of the runs in this session."""
        unfinished = len(self._running) + self.pending
        if not self._durations_s or unfinished <= 0:
            return ""
        seconds = statistics.fmean(self._durations_s) * unfinished / min(self.plan.sweep.jobs, unfinished)
        return f"about {format_seconds(seconds)} left"

    def _draw(self) -> Group:
        running = list(self._running.values())
        max_finished = max(self.console.size.height - len(running) - 9, 3)
        rows = [*self._finished[-max_finished:], *running]
        table = rows_table(rows, list_columns(rows))
        for column in table.columns:
            column.overflow, column.no_wrap = "ellipsis", True
        head = Text(f"sweep of {self.total} runs: ", style="bold")
        counts = {"running": len(running), **self.counts, "pending": self.pending}
        text = ", ".join(f"{count} {status}" for status, count in counts.items())
        head.append(f"{text}   {self._time_left()}", style="not bold")
        best = f"best so far: {self.plan.metric} {format_value(self.best[0])} ({self.best[1]})" if self.best else ""
        return Group(head, table, Text(best, style="green"))
