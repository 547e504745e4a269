"""Running every combination of listed values, one after the other, and the table at the end."""

import csv
import dataclasses
import datetime
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cnntrain.cli import Invocation
from cnntrain.config import expand_grid, parse_overrides, read_settings
from cnntrain.engine.run_folder import unused_folder
from cnntrain.errors import CnntrainError, DivergedError, StoppedError
from cnntrain.report.console import console, log_to_console
from cnntrain.report.table import print_rows
from cnntrain.settings import Settings

log = logging.getLogger("cnntrain")


def run_sweep(invocation: Invocation, job: Callable[[Settings, str], Mapping[str, Any]]) -> int:
    """Run `job` once per combination; 0 when all came to their end, 1 when any failed.

    Every combination is composed and checked before the first one runs. A run that fails is told of at once, and the
    sweep goes on.

    Args:
        job: given settings and the command line; returns its figures by name (nested ones are flattened).
    """
    log_to_console()
    swept = {o.get_key_element() for o in parse_overrides(invocation.overrides) if o.is_sweep_override()}
    combinations = expand_grid(invocation.overrides)
    plans = [(each, read_settings(each, invocation.config_dir)) for each in combinations]
    folder = _sweep_folder(plans[0][1])
    rows: list[dict[str, Any]] = []
    for number, (overrides, settings) in enumerate(plans):
        shown = {o.partition("=")[0]: o.partition("=")[2] for o in overrides if o.partition("=")[0] in swept}
        log.info("[%d/%d] %s", number + 1, len(plans), " ".join(f"{k}={v}" for k, v in shown.items()))
        name = "-".join([f"{number:03d}", *(v.replace("/", "_")[:24] for v in shown.values())])
        settings = dataclasses.replace(settings, run_dir=str(folder / name))
        started = time.perf_counter()
        row: dict[str, Any] = dict(shown)
        try:
            row |= _figures(job(settings, f"cnntrain {' '.join(overrides)}"))
            row["status"] = "done"
        except StoppedError:
            _write(folder, [*rows, {**row, "status": "stopped"}])
            raise
        except CnntrainError as error:
            row["status"] = "diverged" if isinstance(error, DivergedError) else "failed"
            row["error"] = str(error).splitlines()[0]
            print(f"error: {error}", file=sys.stderr)
        row["time_s"] = round(time.perf_counter() - started, 1)
        rows.append(row)
        _write(folder, rows)
    shown = [{k: str(v)[:60] if k in ("error", "cause") and v else v for k, v in row.items()} for row in rows]
    print_rows(shown, title="sweep", console=console)
    print(f"sweep folder: {folder}")
    return 0 if all(row["status"] == "done" for row in rows) else 1


def _sweep_folder(settings: Settings) -> Path:
    if settings.run_dir:
        folder = Path(settings.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    return unused_folder(Path("outputs") / f"{datetime.date.today()}", "sweep")


def _figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures worth a column: verdict and cause, the best epoch's metrics, the test's."""
    best = {k: v for k, v in (results.get("best") or {}).items() if k.startswith("val/") or k == "epoch"}
    kept = {k: results[k] for k in ("verdict", "cause", "steps", "loss") if k in results and not best}
    return {**kept, **best, **(results.get("test") or {})}


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
