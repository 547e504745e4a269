"""Compare runs with each other, and with the results that an experiment's config expects (`expect`).

Runs are compared by the settings that differ, and by their results, averaged over seeds and folds.
"""

import contextlib
import logging
import operator
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cnntrain.config.yaml_files import LOADER, MAX_BYTES, check_yaml_text
from cnntrain.errors import UserError
from cnntrain.io import safe_files as files
from cnntrain.report.metrics import read_metrics
from cnntrain.train.checkpoint import load_validated
from cnntrain.train.resume import flatten_settings
from cnntrain.types import Finding

log = logging.getLogger("cnntrain")

# Settings that do not change the results of an experiment: where it runs, what it writes, and other commands. A subset
# of the settings that may change at a resume (train/resume.py), except the seed.
NEUTRAL = {"run_dir", "resume", "device", "threads", "seed", "trusted_packages", "deterministic", "launch.timeout_s"}
NEUTRAL |= {"data.root", "data.workers", "data.cache", "data.scan", "data.timeout_s"}
NEUTRAL_SECTIONS = {"checkpoint", "log", "check", "bench", "lr_find", "inspect", "preview", "overfit", "sweep"}
# Paths of the data: they do not change a result.
PATH_KEYS = ("data.root", "data.file")
IGNORED_KEYS = NEUTRAL | {"expect", "data.fold", "data.split_seed", *PATH_KEYS}
FINGERPRINT = "data.fingerprint"  # not a setting: identifies the data that a run was trained on
REMEDY = "leave out this folder, or use the folder of a training run"
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}


@dataclass(frozen=True)
class RunRecord:
    """Content of a run folder.

    Attributes:
        settings: flat mapping from key to value; includes the data fingerprint if run.json has it.
        rows: rows of metrics.csv.
        results: content of results.json; empty if the run is not finished.
    """

    folder: Path
    settings: Mapping[str, Any]
    rows: list[dict[str, float]]
    results: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed and the validation split."""

    values: Mapping[str, Any]
    runs: list[RunRecord]

    @property
    def name(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or self.runs[0].folder.name


def find_runs(path: Path) -> list[Path]:
    """Return the run folder itself, or the run folders inside a sweep folder sorted by name.

    Raises:
        UserError: there is no run.
    """
    if files.exists(path / "metrics.csv"):
        return [path]
    children = sorted(each.parent for each in path.glob("*/metrics.csv"))
    found = [child for child in children if files.is_folder(child, path)]
    if len(found) < len(children):
        log.warning("%s: ignoring %d links to folders", path, len(children) - len(found))
    if not found:
        raise UserError(f"{path}: not a run folder (no metrics.csv), and not a sweep folder that contains runs")
    return found


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: a file is missing, a link, corrupt, or has unexpected content.
    """
    results = folder / "results.json"
    known = files.read_json(results, REMEDY) if files.exists(results) else {}
    for name in ("best", "test"):
        values = known.get(name) or {}
        if not isinstance(values, dict) or not all(map(_is_number, values.values())):
            raise UserError(f"{results}: {name}: must map names to numbers; {REMEDY}")
    for name in ("parameters", "wall_s"):
        if not _is_number(known.get(name)):
            raise UserError(f"{results}: {name}: must be a number; {REMEDY}")
    settings, run_json = _read_config(folder / "config.yaml"), folder / "run.json"
    data = files.read_json(run_json, REMEDY).get("data") if files.exists(run_json) else None
    if isinstance(data, str):
        settings[FINGERPRINT] = data
    return RunRecord(folder, settings, read_metrics(folder / "metrics.csv"), known)


def _read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a run's config.yaml as a flat mapping."""
    try:
        text = files.read_text(path, max_bytes=MAX_BYTES)
        check_yaml_text(path, text)
        settings = yaml.load(text, LOADER)
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; {REMEDY}") from error
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:  # YAML tag constructors raise arbitrary exceptions: `!!bool x` raises KeyError
        raise UserError(f"{path}: cannot be read ({error}); {REMEDY}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: must be a mapping of settings; {REMEDY}")
    found = flatten_settings(settings)
    for key, value in found.items():
        # Python refuses to print integers of more than 4,300 digits.
        if isinstance(value, int) and abs(value) >= 2**64:
            raise UserError(f"{path}: {key}: the number is too large; {REMEDY}")
    return found


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1023)


def read_monitor(folder: Path) -> tuple[str, str] | None:
    """Return (metric, "min" or "max") that selects the best epoch of a run; None if the run has no checkpoint."""
    path = next((p for name in ("best", "last") if files.exists(p := folder / "checkpoints" / f"{name}.pt")), None)
    if path is None:
        return None
    monitor = load_validated(path)["monitor"]
    return tuple(monitor) if monitor else None


def differing_keys(runs: Sequence[RunRecord]) -> list[str]:
    """Return the keys whose values differ between runs.

    If the runs use different options of a config group, the group is listed and keys that follow from it are not.
    """

    def varies(key: str) -> bool:
        return len({str(run.settings.get(key)) for run in runs}) > 1

    keys = dict.fromkeys(key for run in runs for key in run.settings)
    keys = [key for key in keys if key not in IGNORED_KEYS and key.split(".")[0] not in NEUTRAL_SECTIONS]
    found = [key for key in keys if varies(key)]
    # Paths differ if the dataset was moved; only a different fingerprint makes a different setting.
    if FINGERPRINT in found or any(FINGERPRINT not in run.settings for run in runs):
        found += [key for key in PATH_KEYS if varies(key)]
    if any((key.startswith("data.") and key != FINGERPRINT) or key == "choices.data" for key in found):
        found = [key for key in found if key != FINGERPRINT]  # another data key shows the difference already
    chosen = {key.removeprefix("choices.") for key in found if key.startswith("choices.")}

    def follows_from_choice(key: str) -> bool:
        """Return True if a key has one value among the runs that use the same option of its config group."""
        group = key.split(".")[0]
        pairs = {(str(run.settings.get(f"choices.{group}")), str(run.settings.get(key))) for run in runs}
        return group in chosen and len(pairs) == len({choice for choice, _ in pairs})

    kept = [key for key in found if not follows_from_choice(key)]
    return sorted(kept, key=lambda key: not key.startswith("choices."))


def group_runs(runs: Sequence[RunRecord], keys: Sequence[str]) -> list[Group]:
    """Group the runs that have the same values of `keys`, in the order of the first run of each group."""
    groups: dict[str, Group] = {}
    for run in runs:
        values = {key.removeprefix("choices."): run.settings.get(key) for key in keys}
        groups.setdefault(str(values), Group(values, [])).runs.append(run)
    return list(groups.values())


def comparison_rows(groups: Sequence[Group], metric: str, monitor: tuple[str, str]) -> list[dict[str, Any]]:
    """Return one row per group with the differing settings, the best validation epoch, test results and cost.

    Values are means over the runs of the group; the metric also has its standard deviation.

    Args:
        metric: the metric to show.
        monitor: (metric, "min" or "max") that selects the best epoch of an unfinished run.
    """
    rows = []
    for group in groups:
        best = [b for run in group.runs if (b := _best(run, *monitor))]
        tests = [run.results["test"] for run in group.runs if run.results.get("test")]
        row: dict[str, Any] = {**group.values} or {"run": group.runs[0].folder.name}
        row["runs"] = len(group.runs)
        row |= _mean(best, f"val/{metric}", with_std=True) | _mean(best, "val/loss") | _mean(best, "epoch")
        row |= _mean(tests, f"test/{metric}", with_std=True)
        for key in ("parameters", "wall_s"):
            row |= _mean([run.results for run in group.runs], key)
        rows.append(row)
    return rows


def _best(run: RunRecord, metric: str, better: str) -> Mapping[str, float] | None:
    if run.results.get("best"):
        return run.results["best"]
    rows = [row for row in run.rows if f"val/{metric}" in row]
    pick = max if better == "max" else min
    return pick(rows, key=lambda row: row[f"val/{metric}"]) if rows else None


def _mean(rows: Sequence[Mapping[str, Any]], key: str, with_std: bool = False) -> dict[str, float]:
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    if not values:
        return {}
    if not all(abs(value) < 2.0**500 for value in values):  # values of a diverged run: squares would overflow
        return {key: float("nan")}
    spread = {f"{key} std": statistics.stdev(values)} if with_std and len(values) > 1 else {}
    return {key: statistics.fmean(values), **spread}


def judge_expectations(
    expected: Mapping[str, Any], results: Mapping[str, Any], changed: Sequence[str]
) -> list[Finding]:
    """Return one finding per expectation; the verdict is SKIP if other settings were overridden.

    Args:
        expected: name of a result -> number (equality) or comparison such as ">=0.935".
        results: content of results.json.
        changed: keys whose values differ from the experiment's config file.

    Raises:
        UserError: an expectation is neither a number nor a comparison.
    """
    flat = {**results, **(results.get("best") or {}), **(results.get("test") or {})}
    # A different option of a config group also changes the keys of the group.
    neutral_sections = NEUTRAL_SECTIONS | {"choices"}
    changed = [key for key in changed if key not in NEUTRAL and key.split(".")[0] not in neutral_sections]
    findings = []
    for name, wanted in expected.items():
        compare, number = parse_expectation(name, wanted)
        if changed:
            reason = f"not evaluated because other settings were changed: {', '.join(changed)}"
            findings.append(Finding(f"expect {name}", "SKIP", reason))
            continue
        value = flat.get(name)
        passed = isinstance(value, int | float) and bool(COMPARISONS[compare](value, number))
        text = wanted if isinstance(wanted, str) else f"{wanted:,}"
        findings.append(Finding(f"expect {name}", "PASS" if passed else "FAIL", f"{value}, expected {text}"))
    return findings


def parse_expectation(name: str, wanted: Any) -> tuple[str, float]:
    """Parse `1677674` or `">=0.935"` into (comparison, number)."""
    if isinstance(wanted, int | float) and not isinstance(wanted, bool):
        return "==", float(wanted)
    match = re.fullmatch(r"\s*(>=|<=|>|<|==)\s*([-+0-9.eE_]+)\s*", str(wanted))
    with contextlib.suppress(ValueError):
        if match:
            return match[1], float(match[2])
    raise UserError(f"expect.{name}: {wanted!r} is neither a number nor a comparison such as '>=0.9'")
