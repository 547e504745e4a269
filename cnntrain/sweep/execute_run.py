"""One run of a sweep: what it says goes into its own log, and what becomes of it is told in one record."""

import contextlib
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cnntrain.config.schema import Settings
from cnntrain.errors import CnntrainError, DivergedError, PrunedError, StoppedError
from cnntrain.io.safe_files import make_folder
from cnntrain.io.streams import output_to
from cnntrain.sweep.plan import Run
from cnntrain.sweep.study import Outcome

LOG = "log.txt"


class Command(Protocol):
    """What a sweep runs: a function at the top of a module, for worker processes import it by its name."""

    def __call__(
        self, settings: Settings, command_line: str, watch: Callable[[dict[str, float]], None]
    ) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class SweepTarget:
    """The command that a sweep repeats.

    Attributes:
        run: does one run; returns its results.
        test: the test set's metrics by the best checkpoint of the run with these settings; None for a command whose
            runs are not ranked.
    """

    run: Command
    test: Callable[[Settings, str], dict[str, float]] | None = None


def execute_run(
    command: Command, run: Run, monitor: str | None, report: Callable[[int, float], bool]
) -> Outcome:
    """Do a run to its end, good or bad.

    Args:
        monitor: the metric on validation data that trials are ranked by.
        report: given an epoch (from 1) and the metric, tells whether to give the run up.

    Raises:
        StoppedError: a signal asked to stop; the run's state has been saved.
    """
    started, last, status, results, error = time.perf_counter(), None, "done", {}, None

    def watch(row: dict[str, float]) -> None:
        nonlocal last
        last = row.get(f"val/{monitor}", math.nan)
        if report(int(row["epoch"]), last):
            raise PrunedError(f"pruned after epoch {row['epoch']:.0f}")

    threads = torch.get_num_threads()
    with _own_log(run):
        try:
            results = command(run.settings(), run.command, watch)
        except StoppedError:
            raise
        except CnntrainError as raised:
            kinds = {PrunedError: "pruned", DivergedError: "diverged"}
            status = next((word for kind, word in kinds.items() if isinstance(raised, kind)), "failed")
            error = str(raised).splitlines()[0]
            print(f"error: {raised}")
        except (Exception, SystemExit) as raised:  # what is the user's own may raise anything
            if isinstance(raised.__context__, BrokenPipeError):
                raise
            lines = str(raised).splitlines() or [""]
            status, error = "failed", f"{type(raised).__name__}: {lines[0]}"
            traceback.print_exc()
        finally:
            torch.set_num_threads(threads)  # the next run starts from where a process of its own would
    best = results.get("best") or {}
    value = best.get(f"val/{monitor}", last if status == "pruned" else None)
    if value is not None and not math.isfinite(value):
        value = None
    return Outcome(
        status, value, figures(results), error if status != "pruned" else None,
        round(time.perf_counter() - started, 2),
    )  # fmt: skip


def test_quietly(job: SweepTarget, run: Run) -> dict[str, float]:
    """The test set's metrics for a run that is done; what is said goes into its log."""
    assert job.test is not None
    with _own_log(run):
        return job.test(run.settings(), run.command)


@contextlib.contextmanager
def _own_log(run: Run) -> Iterator[None]:
    make_folder(run.folder, run.folder.parent)
    with output_to(run.folder / LOG):
        yield


def figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures worth a column: the best epoch's metrics on validation data, or a verdict and its cause."""
    best = {k: v for k, v in (results.get("best") or {}).items() if k.startswith("val/") or k == "epoch"}
    return best or {k: results[k] for k in ("verdict", "steps", "loss", "cause") if k in results}
