"""Execute the runs of a sweep: in this process one after the other, or in several worker processes.

A worker starts once and executes many runs, so that torch is imported once. It gets a share of the CPU cores and GPUs.
When the sweep's process dies, its workers are killed immediately, so that `resume=auto` can lock their run folders.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch

from cnntrain.config.schema import Settings
from cnntrain.errors import CnntrainError, DivergedError, PrunedError, StoppedError
from cnntrain.io.safe_files import make_folder
from cnntrain.io.streams import output_to
from cnntrain.memory import keep_freed_memory
from cnntrain.report.console import log_to_console
from cnntrain.sweep.plan import PlannedRun
from cnntrain.sweep.study import Outcome

LOG_FILE = "log.txt"
PruneCheck = Callable[[PlannedRun, int, float], bool]  # run, epoch from 1, metric -> whether to prune the run
# A function at module level, because worker processes import it by name. Its arguments are the settings, the command
# line and a function to call with the row of metrics.csv after each epoch; it returns the results of the run.
Command = Callable[[Settings, str, Callable[[dict[str, float]], None]], Mapping[str, Any]]


@dataclass(frozen=True)
class SweepTarget:
    """What a sweep executes.

    Attributes:
        run: executes one run and returns its results.
        test: evaluates the best checkpoint of the run with these settings on the test set; None for a command whose
            runs are not ranked.
    """

    run: Command
    test: Callable[[Settings, str], dict[str, float]] | None = None


def execute_run(
    command: Command, run: PlannedRun, monitor: str | None, should_prune: Callable[[int, float], bool]
) -> Outcome:
    """Execute a run and return its outcome; errors of the run become part of the outcome.

    Args:
        monitor: the validation metric that trials are ranked by.
        should_prune: called after each epoch with its number (from 1) and the metric.

    Raises:
        StoppedError: a signal requested a stop; the state of the run is saved.
    """
    started, last_value = time.perf_counter(), None
    status, results, error = "done", {}, None

    def on_epoch(row: dict[str, float]) -> None:
        nonlocal last_value
        last_value = row.get(f"val/{monitor}", math.nan)
        if should_prune(int(row["epoch"]), last_value):
            raise PrunedError(f"pruned after epoch {row['epoch']:.0f}")

    threads = torch.get_num_threads()
    with run_log(run):
        try:
            results = command(run.settings(), run.command, on_epoch)
        except StoppedError:
            raise
        except CnntrainError as raised:
            status = "diverged" if isinstance(raised, DivergedError) else "failed"
            error = str(raised).splitlines()[0]
            if isinstance(raised, PrunedError):
                status, error = "pruned", None
            print(f"error: {raised}")
        except (Exception, SystemExit) as raised:  # user code may raise anything
            if isinstance(raised.__context__, BrokenPipeError):
                raise
            lines = str(raised).splitlines() or [""]
            status, error = "failed", f"{type(raised).__name__}: {lines[0]}"
            traceback.print_exc()
        finally:
            torch.set_num_threads(threads)  # the next run starts with the same state as in a new process
    best = results.get("best") or {}
    value = best.get(f"val/{monitor}", last_value if status == "pruned" else None)
    if value is not None and not math.isfinite(value):
        value = None
    return Outcome(status, value, _table_metrics(results), error, round(time.perf_counter() - started, 2))


@contextlib.contextmanager
def run_log(run: PlannedRun) -> Iterator[None]:
    """Redirect printed output to the log file of a run."""
    make_folder(run.folder, run.folder.parent)
    with output_to(run.folder / LOG_FILE):
        yield


def _table_metrics(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results shown in tables: validation metrics of the best epoch, or a verdict and its cause."""
    best = {k: v for k, v in (results.get("best") or {}).items() if k.startswith("val/") or k == "epoch"}
    return best or {k: results[k] for k in ("verdict", "steps", "loss", "cause") if k in results}


class InProcessRunner:
    """Execute runs in this process, one at a time, when their outcome is collected."""

    def __init__(self, command: Command, monitor: str | None, should_prune: PruneCheck) -> None:
        self.command, self.monitor, self.should_prune = command, monitor, should_prune
        self.running: list[PlannedRun] = []

    def start(self, run: PlannedRun) -> None:
        self.running.append(run)

    def collect_finished(self) -> list[tuple[PlannedRun, Outcome]]:
        """Execute the run that was started.

        Raises:
            StoppedError: a signal arrived during the run.
        """
        run = self.running.pop()
        return [(run, execute_run(self.command, run, self.monitor, lambda *report: self.should_prune(run, *report)))]

    def stop(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Worker:
    process: BaseProcess
    connection: "Connection[Any, Any]"
    run: PlannedRun | None = None


class ProcessPoolRunner:
    """Execute runs in `jobs` worker processes. A worker that died is replaced when the next run starts."""

    def __init__(self, command: Command, monitor: str | None, should_prune: PruneCheck, jobs: int) -> None:
        self.command, self.monitor, self.should_prune, self.jobs = command, monitor, should_prune, jobs
        # Workers are forked from a server process that only imports modules: forking a process in which torch has
        # already computed may hang.
        methods = multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        self.context.set_forkserver_preload([command.__module__])  # pyright: ignore[reportFunctionMemberAccess]
        self._stopping = False
        self._workers: list[_Worker] = []

    @property
    def running(self) -> list[PlannedRun]:
        return [worker.run for worker in self._workers if worker.run is not None]

    def start(self, run: PlannedRun) -> None:
        """Send a run to an idle worker, or to a new one."""
        idle = (i for i, worker in enumerate(self._workers) if worker.run is None)
        index = next(idle, len(self._workers))
        if index == len(self._workers):
            self._workers.append(self._start_worker(index))
        try:
            self._workers[index].connection.send(run)
        except OSError:  # the worker died after its last run
            self._workers[index].connection.close()
            self._workers[index] = self._start_worker(index)
            self._workers[index].connection.send(run)
        self._workers[index].run = run

    def _start_worker(self, index: int) -> _Worker:
        parent_end, worker_end = self.context.Pipe()
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        shares = (worker_share(index, self.jobs, each) for each in (cores, visible_gpus()))
        process = self.context.Process(target=_run_worker, args=(worker_end, self.command, self.monitor, *shares))
        process.start()
        worker_end.close()  # the pipe then closes when the worker dies
        return _Worker(process, parent_end)

    def collect_finished(self) -> list[tuple[PlannedRun, Outcome]]:
        """Wait briefly for messages of workers, answer them, and return the runs that have finished."""
        busy = [worker for worker in self._workers if worker.run is not None]
        ready = wait([each for w in busy for each in (w.connection, w.process.sentinel)], timeout=0.25)
        finished = []
        for worker in busy:
            if worker.connection not in ready and worker.process.sentinel not in ready:
                continue
            if outcome := self._receive(worker):
                finished.append((worker.run, outcome))
                worker.run = None
        return finished

    def _receive(self, worker: _Worker) -> Outcome | None:
        """Read a message: the outcome of the run, or the metric of an epoch, which is answered."""
        assert worker.run is not None
        message = None
        with contextlib.suppress(EOFError, OSError):
            if worker.connection.poll():
                message = worker.connection.recv()
            elif worker.process.is_alive():
                return None
        if isinstance(message, Outcome):
            return message
        if message is not None:
            prune = self.should_prune(worker.run, *message)
            with contextlib.suppress(OSError):  # the next call notices that the worker died
                worker.connection.send(prune)
            return None
        worker.process.join()
        if self._stopping:
            return Outcome("stopped")
        code = worker.process.exitcode or 0
        hint = " (often out of memory)" if code == -signal.SIGKILL else ""
        error = f"killed by signal {-code}{hint}" if code < 0 else f"its process ended with exit code {code}"
        return Outcome("killed", error=error)

    def stop(self) -> None:
        """Request all runs to save their state and end."""
        if self._stopping:
            return
        self._stopping = True
        for worker in self._workers:
            if worker.run is not None:
                worker.process.terminate()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(timeout=5)
            worker.process.kill()


def _run_worker(
    connection: "Connection[Any, Any]", command: Command, monitor: str | None, cores: list[int], gpus: list[str]
) -> None:
    """Execute runs until the sweep closes the connection: the main function of a worker process."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    keep_freed_memory()
    # A terminal sends these signals to all processes, but the sweep decides when workers stop.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    log_to_console()

    def should_prune(epoch: int, value: float) -> bool:
        connection.send((epoch, value))
        return connection.recv()

    while True:
        try:
            run = connection.recv()
        except EOFError:
            return
        try:
            outcome = execute_run(command, run, monitor, should_prune)
        except StoppedError:
            outcome = Outcome("stopped")
        connection.send(outcome)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def worker_share(worker: int, jobs: int, available: Sequence[Any]) -> list[Any]:
    """Return the cores or GPUs of a worker: a part of them if there are more than workers, else a single one."""
    count = len(available)
    if count <= jobs:
        return [available[worker % count]] if count else []
    return np.array_split(available, jobs)[worker].tolist()


def visible_gpus() -> list[str]:
    """Return the visible CUDA devices, named as in `CUDA_VISIBLE_DEVICES`."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is not None:
        return [name for name in names.split(",") if name.strip()]
    return list(map(str, range(torch.cuda.device_count())))
