"""Where runs happen: in this process, one after the other, or in several worker processes side by side.

A worker starts once and does many runs, so that importing torch is paid for once. It gets its share of the cores, or
a GPU, to itself. When the sweep's process dies, its workers die with it, at once: the folders that they were at work
in are free for `resume=auto`.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from cnntrain.errors import StoppedError
from cnntrain.memory import keep_freed_memory
from cnntrain.report.console import log_to_console
from cnntrain.sweep.execute_run import Command, execute_run
from cnntrain.sweep.plan import Run, cores, share_of
from cnntrain.sweep.study import Outcome

Report = Callable[[Run, int, float], bool]  # run, epoch from 1, metric: whether to give the run up


class InProcessRunner:
    """Runs in this process. `start` returns when the run has ended.

    Raises:
        StoppedError: from `start`; a signal came during the run.
    """

    def __init__(self, command: Command, monitor: str | None, report: Report) -> None:
        self.command, self.monitor, self.report = command, monitor, report
        self._ended: list[tuple[Run, Outcome]] = []

    def start(self, run: Run) -> None:
        outcome = execute_run(
            self.command, run, self.monitor, lambda epoch, value: self.report(run, epoch, value)
        )
        self._ended.append((run, outcome))

    @property
    def free(self) -> bool:
        return not self._ended

    @property
    def busy(self) -> bool:
        return bool(self._ended)

    def ended(self) -> list[tuple[Run, Outcome]]:
        ended, self._ended = self._ended, []
        return ended

    def stop(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Worker:
    process: BaseProcess
    link: "Connection[Any, Any]"
    run: Run | None = None


class ProcessPoolRunner:
    """Runs in `jobs` worker processes; one that dies is replaced when the next run is due."""

    def __init__(self, command: Command, monitor: str | None, report: Report, jobs: int) -> None:
        self.command, self.monitor, self.report, self.jobs = command, monitor, report, jobs
        # Workers fork from a server that has imported everything and run nothing: forking a process in which
        # torch has already computed may hang.
        methods = multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        self.context.set_forkserver_preload([command.__module__])  # pyright: ignore[reportFunctionMemberAccess]
        self._cores, self._gpus = cores(), visible_gpus()
        self._stopping = False
        self._workers: list[_Worker] = []

    def _hire(self, number: int) -> _Worker:
        here, there = self.context.Pipe()
        shares = share_of(number, self.jobs, self._cores), share_of(number, self.jobs, self._gpus)
        process = self.context.Process(target=_work, args=(there, self.command, self.monitor, *shares))
        process.start()
        there.close()  # so that its death closes the pipe
        return _Worker(process, here)

    @property
    def free(self) -> bool:
        return len(self._workers) < self.jobs or any(worker.run is None for worker in self._workers)

    @property
    def busy(self) -> bool:
        return any(worker.run is not None for worker in self._workers)

    def start(self, run: Run) -> None:
        place = next((i for i, worker in enumerate(self._workers) if worker.run is None), len(self._workers))
        if place == len(self._workers):
            self._workers.append(self._hire(place))
        try:
            self._workers[place].link.send(run)
        except OSError:  # it died since its last run
            self._workers[place].link.close()
            self._workers[place] = self._hire(place)
            self._workers[place].link.send(run)
        self._workers[place].run = run

    def ended(self) -> list[tuple[Run, Outcome]]:
        """Runs that have ended since; waits a short while for one, and answers workers meanwhile."""
        busy = [worker for worker in self._workers if worker.run is not None]
        ready = wait([each for w in busy for each in (w.link, w.process.sentinel)], timeout=0.25)
        found = []
        for worker in busy:
            if (worker.link in ready or worker.process.sentinel in ready) and (outcome := self._hear(worker)):
                assert worker.run is not None
                found.append((worker.run, outcome))
                worker.run = None
        return found

    def _hear(self, worker: _Worker) -> Outcome | None:
        """What a worker says: an epoch's metric (it gets its answer), or how its run ended."""
        assert worker.run is not None
        try:
            if worker.link.poll():
                message = worker.link.recv()
                if isinstance(message, Outcome):
                    return message
                worker.link.send(self.report(worker.run, *message))
                return None
            if worker.process.is_alive():
                return None
        except (EOFError, OSError):
            pass
        worker.process.join()
        if self._stopping:
            return Outcome("stopped")
        code = worker.process.exitcode or 0
        hint = ", often for want of memory" if code == -signal.SIGKILL else ""
        how = f"killed by signal {-code}{hint}" if code < 0 else f"its process ended with exit code {code}"
        return Outcome("killed", error=how)

    def stop(self) -> None:
        """Ask every run under way to save its state and end."""
        if self._stopping:
            return
        self._stopping = True
        for worker in self._workers:
            if worker.run is not None and worker.process.pid:
                os.kill(worker.process.pid, signal.SIGTERM)

    def close(self) -> None:
        """Let the workers go."""
        for worker in self._workers:
            worker.link.close()
        for worker in self._workers:
            worker.process.join(timeout=5)
            worker.process.kill()


def _work(
    link: "Connection[Any, Any]",
    command: Command,
    monitor: str | None,
    my_cores: list[int],
    my_gpus: list[str],
) -> None:
    """A worker's life: runs as they come, until the sweep closes the pipe."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    keep_freed_memory()
    for number in (
        signal.SIGINT,
        signal.SIGHUP,
    ):  # a terminal sends them to all processes; the sweep decides when workers stop
        signal.signal(number, signal.SIG_IGN)
    if my_cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, my_cores)
    if my_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(my_gpus)
    log_to_console()

    def report(epoch: int, value: float) -> bool:
        link.send((epoch, value))
        return link.recv()

    while True:
        try:
            run = link.recv()
        except EOFError:
            return
        try:
            outcome = execute_run(command, run, monitor, report)
        except StoppedError:
            outcome = Outcome("stopped")
        link.send(outcome)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def visible_gpus() -> list[str]:
    """CUDA devices as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]
