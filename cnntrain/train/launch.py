"""Start several ranks on this machine with torch's elastic launcher, and report how they ended.

Torch's launcher starts the processes, forwards signals to them, and ends all if one fails. This module adds the store
through which the ranks meet, on the loopback interface, and a file with the error of the rank that failed first.
"""

import contextlib
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
from cnntrain.errors import CnntrainError, MachineError, PeerFailedError, StoppedError
from cnntrain.io.safe_files import write_atomic
from cnntrain.io.streams import output_to
from cnntrain.memory import keep_freed_memory
from cnntrain.train.distributed import RankInfo, describe_lost

FAILURE = "failure.json"
Row = dict[str, float]
SHUTDOWN = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)


@dataclass(frozen=True)
class WorkerContext:
    """What a launched rank needs to know about its launcher.

    Attributes:
        port: port of the store, on the loopback interface.
        folder: holds the error of the rank that fails first.
        log: file for standard output and error; None for the console.
        metrics_pipe: receives each epoch's metrics and answers None or the error that ends training; None without
            `on_epoch`.
    """

    port: int
    folder: Path
    log: Path | None
    metrics_pipe: "Connection[Any, Any] | None"

    def rank_info(self) -> RankInfo:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return RankInfo(*(int(os.environ[name]) for name in names), address="127.0.0.1", port=self.port)

    def report(self, kind: type[BaseException], message: str, code: int) -> None:
        """Write this rank's error to a file for the launcher."""
        with contextlib.suppress(OSError):
            error = {"kind": kind.__name__, "message": message, "code": code}
            write_atomic(self.folder / FAILURE, json.dumps(error).encode())

    def end(self, code: int, message: str | None) -> None:
        """End this rank immediately, from any of its threads."""
        if message is not None:
            self.report(MachineError, message, code)
        os._exit(code)

    def on_epoch(self, row: Row) -> None:
        """Pass an epoch's metrics to the launcher's `on_epoch`; raise what it raises."""
        assert self.metrics_pipe is not None
        self.metrics_pipe.send(row)
        if (error := self.metrics_pipe.recv()) is not None:
            raise error


def launch(
    entry: Callable[..., Any], count: int, *arguments: Any, on_epoch: Callable[[Row], None] | None = None
) -> Any:
    """Call `entry(context, *arguments)` in `count` new processes and return rank 0's result.

    Args:
        entry: a function at the top level of a module.
        on_epoch: called in this process with each row that rank 0 gives to `context.on_epoch`.

    Raises:
        CnntrainError: that of the rank that failed first.
        MachineError: a rank was killed.
        StoppedError: a signal was received; the state has been saved.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # this module reports errors
    # Torch would open a second store, at an address that other machines can reach.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns about find_unused_parameters
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", *(["SIGUSR1"] if "SLURM_JOB_ID" in os.environ else []))
    # A signal that is ignored here (SIGHUP under nohup) stays ignored.
    handled = [name for name in names if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN]
    with (
        tempfile.TemporaryDirectory(prefix="cnntrain-") as name,
        _store(count) as port,
        _on_epoch_pipe(on_epoch) as metrics_pipe,
        _restored_handlers(names),
    ):
        folder = Path(name)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=folder.name,
            max_restarts=0,
            monitor_interval=0.1,
            rdzv_backend="c10d",
            rdzv_endpoint=str(folder / "rendezvous"),
            rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1",
            logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
            signals_to_handle=",".join(handled),
        )
        try:
            return elastic_launch(config, entry)(WorkerContext(port, folder, _log_file(), metrics_pipe), *arguments)[0]
        except SignalException as error:
            raise _reported(folder) or _stopped(error.sigval) from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise _explain_exit(rank, count, failure.exitcode, _reported(folder)) from None


def run_rank(context: WorkerContext, work: Callable[[], Any]) -> Any:
    """Return what `work` returns; if it fails, report the error to the launcher and end this process."""
    keep_freed_memory()
    with output_to(context.log) if context.log else contextlib.nullcontext():
        try:
            return work()
        except PeerFailedError as error:
            code = error.exit_code
        except CnntrainError as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                traceback.print_exc()
            context.report(type(error), str(error), code := error.exit_code)
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        except Exception as error:  # user code may raise anything
            traceback.print_exc()
            context.report(type(error), str(error), code := 1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # torch's threads may be stuck in a collective


def _reported(folder: Path) -> CnntrainError | None:
    """Return the error of the rank that failed first; None if it reported none."""
    if not (folder / FAILURE).exists():
        return None
    failure = json.loads((folder / FAILURE).read_text())
    kind = getattr(errors, failure["kind"], None)
    if kind is StoppedError:
        return StoppedError(failure["code"] - 128, failure["message"])
    if isinstance(kind, type) and issubclass(kind, CnntrainError):
        return kind(failure["message"])
    return PeerFailedError(failure["code"])  # its traceback has been printed


def _explain_exit(rank: int, count: int, code: int, reported: CnntrainError | None) -> CnntrainError:
    if code < 0 and code not in SHUTDOWN:  # the others report only that they lost a rank
        return MachineError(describe_lost(rank, count, f"killed by {signal.Signals(-code).name} (out of memory?)"))
    if reported:
        return reported
    if code in SHUTDOWN:
        return _stopped(signal.Signals(-code))
    return MachineError(describe_lost(rank, count)) if code == MachineError.exit_code else PeerFailedError(code)


def _stopped(number: signal.Signals) -> StoppedError:
    return StoppedError(number, f"stopped by {number.name} before its state could be saved")


@contextlib.contextmanager
def _store(count: int) -> Iterator[int]:
    """Hold a store on the loopback interface; yield its port."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16 * count)
        port = listener.getsockname()[1]
        options = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.detach()}
        store = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=60), **options)
        yield port
        del store


@contextlib.contextmanager
def _on_epoch_pipe(on_epoch: Callable[[Row], None] | None) -> Iterator["Connection[Any, Any] | None"]:
    """Yield one end of a pipe; a thread calls `on_epoch` with each row from it and sends the error back, or None."""
    if on_epoch is None:
        yield None
        return
    here, there = multiprocessing.get_context("spawn").Pipe()

    def answer_rows() -> None:
        with contextlib.suppress(EOFError, OSError):
            while (row := here.recv()) is not None:
                try:
                    answer: object = on_epoch(row)
                except CnntrainError as error:
                    answer = error
                except Exception as error:  # rank 0 waits for an answer
                    answer = MachineError(f"the callback `on_epoch` failed: {type(error).__name__}: {error}")
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
def _restored_handlers(names: tuple[str, ...]) -> Iterator[None]:
    """Restore this process's signal handlers, which torch's launcher replaces."""
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    try:
        yield
    finally:
        for number, handler in before.items():
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(number, handler)


def _log_file() -> Path | None:
    """Return the file to which a sweep redirected this process's output; new processes do not inherit that."""
    name = getattr(sys.stdout, "name", None)
    if sys.stdout is sys.__stdout__ or not isinstance(name, str) or not Path(name).is_file():
        return None
    return Path(name).absolute()
