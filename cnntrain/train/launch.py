"""Starting several processes on this machine that train together, and telling how they ended.

Torch's elastic launcher starts them, passes signals on, and ends all when one ends badly. What they have in common is
here: the store through which they meet (on the loopback, which nobody outside reaches), and a folder in which the one
that fails first leaves word.
"""

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

from cnntrain import errors
from cnntrain.errors import CnntrainError, ElsewhereError, MachineError, StoppedError
from cnntrain.io.safe_files import write_atomic
from cnntrain.io.streams import output_to
from cnntrain.memory import keep_freed_memory
from cnntrain.train.distributed import RankInfo
from cnntrain.train.watch import lost

FAILURE = "failure.json"
Row = dict[str, float]
Watcher = Callable[[Row], None]


@dataclass(frozen=True)
class WorkerContext:
    """What a process needs to know of the one that started it.

    Attributes:
        port: of the store, on the loopback.
        folder: where a failure is left.
        log: the file that what is printed goes to; None for the console.
        rows: takes each epoch's row, and gives None or the error that ends the training; None where nobody watches.
    """

    port: int
    folder: Path
    log: Path | None
    rows: "Connection[Any, Any] | None"

    def place(self) -> RankInfo:
        """Of this process, which the launcher has numbered."""
        numbers = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
        return RankInfo(*numbers, address="127.0.0.1", port=self.port)

    def end(self, code: int, message: str | None) -> None:
        """End this process at once, from any of its threads; the message is left for the one that started it."""
        if message is not None:
            leave_failure(self.folder, MachineError.__name__, message, code)
        os._exit(code)

    def watch(self, row: Row) -> None:
        """Show a row to whoever watches, in the process that started this one."""
        if self.rows is not None:
            self.rows.send(row)
            if (error := self.rows.recv()) is not None:
                raise error


def launch(entry: Callable[..., Any], count: int, *arguments: Any, watch: Watcher | None = None) -> Any:
    """Call `entry(home, *arguments)` in `count` new processes; what the first of them returns.

    Args:
        entry: a function at the top of a module, which the processes import.
        watch: called here with each row that the first process gives to `home.watch`; what it raises is raised there.

    Raises:
        CnntrainError: that of the process that failed first.
        MachineError: one was killed.
        StoppedError: a signal came; the state has been saved.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # we tell what happened ourselves
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    # Torch would keep a second store, for the processes to share, at an address that others reach too.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", *(["SIGUSR1"] if "SLURM_JOB_ID" in os.environ else []))
    # A signal that is ignored here (SIGHUP under nohup) stays ignored.
    caught = ",".join(n for n in names if signal.getsignal(getattr(signal, n)) is not signal.SIG_IGN)
    options: dict[str, Any] = {"signals_to_handle": caught} if "signals_to_handle" in known else {}
    with (
        tempfile.TemporaryDirectory(prefix="cnntrain-") as name,
        _store(count) as port,
        _watched(watch) as rows,
        _handlers_kept(),
    ):
        folder = Path(name)
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=folder.name, max_restarts=0, monitor_interval=0.1,
            rdzv_backend="c10d", rdzv_endpoint=str(folder / "rendezvous"), rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1", logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
            **options,
        )  # fmt: skip
        home = WorkerContext(port, folder, _redirected(), rows)
        try:
            return elastic_launch(config, entry)(home, *arguments)[0]
        except SignalException as error:
            raise _failure(folder) or StoppedError(
                error.sigval, f"stopped by {error.sigval.name} before its state could be saved"
            ) from None
        except ChildFailedError as error:
            rank, first = error.get_first_failure()
            raise _failure(folder) or _killed(rank, count, first.exitcode) from None


def in_rank(home: WorkerContext, work: Callable[[], Any]) -> Any:
    """What `work` returns; or the end of this process, with its exit code, once the failure has been left."""
    keep_freed_memory()
    os.setpgrp()  # Ctrl-C goes to the process that started this one, which passes it on: once, not twice
    with _console(home.log):
        try:
            return work()
        except ElsewhereError as error:
            code = error.exit_code
        except CnntrainError as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                traceback.print_exc()
            leave_failure(home.folder, type(error).__name__, str(error), code := error.exit_code)
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        except Exception as error:  # a network of the user's own may raise anything: it is shown, and all end
            traceback.print_exc()
            leave_failure(home.folder, type(error).__name__, str(error), code := 1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # torch's threads may be stuck in a transfer


def leave_failure(folder: Path, kind: str, message: str, code: int) -> None:
    with contextlib.suppress(OSError):
        write_atomic(folder / FAILURE, json.dumps({"kind": kind, "message": message, "code": code}).encode())


def _failure(folder: Path) -> CnntrainError | None:
    """What the process that failed first left; None when it had no time to."""
    if not (folder / FAILURE).exists():
        return None
    said = json.loads((folder / FAILURE).read_text())
    kind = getattr(errors, said["kind"], None)
    if kind is StoppedError:
        return StoppedError(said["code"] - 128, said["message"])
    if isinstance(kind, type) and issubclass(kind, CnntrainError):
        return kind(said["message"])
    return ElsewhereError(said["code"])  # its traceback has been shown


def _killed(rank: int, count: int, code: int) -> CnntrainError:
    if code in (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP):
        return StoppedError(-code, f"stopped by {signal.Signals(-code).name} before its state could be saved")
    if code < 0:
        return MachineError(lost(rank, count).replace("killed", f"killed by {signal.Signals(-code).name}"))
    return MachineError(lost(rank, count)) if code == MachineError.exit_code else ElsewhereError(code)


@contextlib.contextmanager
def _store(count: int) -> Iterator[int]:
    """The port of a store on the loopback, kept by this process."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16 * count)
        port = listener.getsockname()[1]
        store = TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60),
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        yield port
        del store


@contextlib.contextmanager
def _watched(watch: Watcher | None) -> Iterator["Connection[Any, Any] | None"]:
    """One end of a pipe, on the other end of which a thread answers rows by `watch`."""
    if watch is None:
        yield None
        return
    here, there = multiprocessing.get_context("spawn").Pipe()

    def answer_rows() -> None:
        with contextlib.suppress(EOFError, OSError):
            while (row := here.recv()) is not None:
                try:
                    answer: object = watch(row)
                except CnntrainError as error:
                    answer = error
                except Exception as error:  # whoever waits for the answer must get one
                    answer = MachineError(
                        f"what watches the training failed: {type(error).__name__}: {error}"
                    )
                here.send(answer)

    thread = Thread(target=answer_rows, daemon=True)
    thread.start()
    try:
        yield there
    finally:
        there.send(None)
        thread.join(timeout=5)
        here.close()
        there.close()


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """The signal handlers that were there before are there after; torch's launcher leaves its own behind."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    try:
        yield
    finally:
        for number, handler in before.items():
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, handler)


def _redirected() -> Path | None:
    """The file that standard output was sent to by a sweep, which the new processes know nothing of."""
    name = getattr(sys.stdout, "name", None)
    if sys.stdout is sys.__stdout__ or not isinstance(name, str) or not Path(name).is_file():
        return None
    return Path(name).absolute()


@contextlib.contextmanager
def _console(log: Path | None) -> Iterator[None]:
    if log is None:
        yield
        return
    with output_to(log):
        yield
