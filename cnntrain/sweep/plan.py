"""What a sweep will do, from what was typed: which keys it varies, over which seeds, and the settings of each run."""

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cnntrain.config.command_text import command_text
from cnntrain.config.compose import parse_overrides, read_settings
from cnntrain.config.invocation import DEFAULT_COMMAND, Invocation
from cnntrain.config.schema import Settings, SweepSettings
from cnntrain.data.fingerprint import read_fingerprint
from cnntrain.errors import UserError
from cnntrain.report.expectations import NEUTRAL
from cnntrain.sweep.search_space import SearchDimension, add_swept_keys, grid, read_space
from cnntrain.train.parts import build_pipeline, build_source, build_task
from cnntrain.train.resume import flatten_settings

T = TypeVar("T")
DRAWN_TRIALS = 20  # where the sampler draws and `sweep.trials` says nothing
# Keys that change the validation examples.
OTHER_EXAMPLES = ("data", "data.root", "data.file", "data.limit", "data.val_fraction", "data.folds")
# What may change when a sweep goes on: where and how fast it runs, and how much more is asked of it.
# Keys that may change when a sweep is resumed. Data paths may change too, because fingerprints identify the data.
MAY_CHANGE = (NEUTRAL - {"seed"}) | {"data.file", "data.scan"}
MAY_CHANGE |= {f"sweep.{key}" for key in ("trials", "timeout_s", "jobs", "on_error")}


@dataclass(frozen=True, order=True)
class Repeat:
    """Seed and, in cross-validation, the validation split of one run of a setting.

    Attributes:
        seed: training seed.
        fold, split_seed: as in `data`; None if the sweep does not vary them.
    """

    seed: int
    fold: int | None = None
    split_seed: int | None = None

    @property
    def split(self) -> tuple[int | None, int | None]:
        """Return the key of the validation split; runs with equal keys use the same validation examples."""
        return self.split_seed, self.fold

    @property
    def values(self) -> dict[str, int]:
        """Return the values by config key."""
        values = {"seed": self.seed, "data.fold": self.fold, "data.split_seed": self.split_seed}
        return {key: value for key, value in values.items() if value is not None}

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items())

    @classmethod
    def parse(cls, text: str) -> "Repeat":
        """Parse the output of `str`."""
        return cls(
            **{key.removeprefix("data."): int(value) for key, value in (w.split("=") for w in text.split())}
        )


REPEAT_KEYS = ("seed", "data.fold", "data.split_seed")


def repeats_text(repeats: Collection[Repeat]) -> str:
    """Format the number of repeats: `3 seeds`, `5 folds x 2 seeds`."""
    counts = {
        name: len({getattr(repeat, attribute) for repeat in repeats})
        for name, attribute in (("split", "split_seed"), ("fold", "fold"), ("seed", "seed"))
    }
    parts = [f"{count} {name}s" for name, count in counts.items() if count > 1]
    return " x ".join(parts) or "1 run"


@dataclass(frozen=True)
class Run:
    """One training run: one repeat of a setting of the swept keys.

    Attributes:
        trial: number of the setting, from 0.
        values: swept key -> value, as on the command line.
        overrides: all overrides of its config, including those of the repeat.
        threads: CPU threads; None: as configured.
        folder: its own, inside the sweep's.
        command: what repeats it alone.
    """

    trial: int
    repeat: Repeat
    values: dict[str, str]
    overrides: tuple[str, ...]
    config_dir: Path | None
    threads: int | None
    folder: Path
    command: str

    def settings(self) -> Settings:
        """Everything that the run needs to know.

        Raises:
            UserError: these values don't go together.
        """
        settings = read_settings(self.overrides, self.config_dir)
        threads = self.threads if self.threads is not None else settings.threads
        # A run needs neither the sweep's storage nor the password in it.
        sweep = dataclasses.replace(settings.sweep, storage=None)
        return dataclasses.replace(
            settings, threads=threads, run_dir=str(self.folder), resume="auto", sweep=sweep
        )


@dataclass(frozen=True)
class SweepPlan:
    """A sweep before anything has run.

    Attributes:
        fixed: overrides with one value.
        axes: the keys that vary between settings.
        repeats: the seeds, folds and split seeds that each setting is trained with.
        base: the settings of the first trial.
        variants: one settings object for each data configuration that the axes produce.
        monitor: the metric on validation data that trials are ranked by, with its better end (`max` or `min`);
            None where there is no one figure for all (verdicts, or data sets with different metrics).
        monitor_range: the lowest and highest value of that metric.
    """

    word: str
    config_dir: Path | None
    fixed: tuple[str, ...]
    axes: tuple[SearchDimension, ...]
    repeats: tuple[Repeat, ...]
    base: Settings
    variants: tuple[Settings, ...]
    monitor: tuple[str, str] | None
    monitor_range: tuple[float, float] = (-math.inf, math.inf)

    @property
    def sweep(self) -> SweepSettings:
        return self.base.sweep

    @property
    def asked(self) -> list[str]:
        """The command in a form that another one may be held against: whether it goes on with this sweep."""
        fixed = [o for o in self.fixed if o.split("=")[0] not in MAY_CHANGE]
        fixed = [o for o in fixed if not o.startswith(("log.", "checkpoint.", "sweep.storage="))]
        columns = {key: dict.fromkeys(r.values.get(key) for r in self.repeats) for key in REPEAT_KEYS}
        repeats = [f"{key}={','.join(map(str, each))}" for key, each in columns.items() if None not in each]
        return sorted([*fixed, *map(str, self.axes), *repeats])

    @property
    def settings(self) -> dict[str, Any]:
        """Return the first trial's settings by key, without keys that may change when the sweep is resumed."""
        found = flatten_settings(dataclasses.asdict(self.base))
        left_out = {*MAY_CHANGE, "sweep.storage"}
        return {
            key: value
            for key, value in found.items()
            if key not in left_out and not key.startswith(("log.", "checkpoint."))
        }

    def fingerprints(self) -> list[str]:
        """Return the fingerprints of the data sets that the sweep trains on.

        Raises:
            UserError: a data set cannot be read.
        """
        return sorted({read_fingerprint(build_source(settings)[0]) for settings in self.variants})

    @property
    def overlap(self) -> float:
        """Return the ratio of validation to training examples if repeats use different splits; else 0."""
        if len({repeat.split for repeat in self.repeats}) == 1:
            return 0.0
        folds = self.base.data.get("folds")
        share = 1 / folds if folds else float(self.base.data.get("val_fraction") or 0.0)
        return share / (1 - share)

    @property
    def other_examples(self) -> list[str]:
        """Return the swept keys that change the validation examples, so that metrics are not comparable."""
        return [axis.key for axis in self.axes if axis.key in OTHER_EXAMPLES]

    def grid(self) -> list[dict[str, str]] | None:
        """The settings to try in a fixed order; None where a sampler draws them."""
        if self.sweep.sampler != "grid":
            return None
        return grid(self.axes)[: self.sweep.trials]

    @property
    def trials(self) -> int:
        settings = self.grid()
        return len(settings) if settings is not None else self.sweep.trials or DRAWN_TRIALS

    def run(self, trial: int, values: Mapping[str, str], repeat: Repeat, folder: Path) -> Run:
        """Build the run for one repeat of a setting, in its own subfolder of the sweep."""
        fixed = [o for o in self.fixed if o.split("=")[0] not in repeat.values]
        both = {**values, **repeat.values}
        overrides = (*fixed, *(f"{key}={value}" for key, value in both.items()))
        name = "-".join([f"{trial:03d}", *map(_in_a_path, values.values())])
        name += "".join(f"-{key.removeprefix('data.')}{value}" for key, value in self.varying(repeat).items())
        threads = None
        if self.sweep.jobs > 1 and self.base.threads is None:
            threads = max(1, len(cores()) // self.sweep.jobs)
        command = self.command(overrides, threads)
        return Run(trial, repeat, dict(values), overrides, self.config_dir, threads, folder / name, command)

    def varying(self, repeat: Repeat) -> dict[str, int]:
        """Return a repeat's values for the keys that vary between repeats."""
        values = repeat.values.items()
        return {k: v for k, v in values if len({other.values.get(k) for other in self.repeats}) > 1}

    def command(self, overrides: Sequence[str], threads: int | None) -> str:
        """The line that trains one setting alone."""
        left_out = ("resume", "run_dir")
        kept = [o for o in overrides if o.split("=")[0] not in left_out and not o.startswith("sweep.")]
        more = [f"threads={threads}"] if threads is not None else []
        word = [] if self.word == DEFAULT_COMMAND else [self.word]
        where = [f"--config-dir={self.config_dir}"] if self.config_dir else []
        return command_text(["cnntrain", *word, *where, *kept, *more])


def read_plan(invocation: Invocation, ranked: bool) -> SweepPlan:
    """Read the command line, and compose each value of each key once, with the others at their first.

    Args:
        ranked: whether the runs have a validation metric to be ranked by.

    Raises:
        UserError: a value that can't be, or a sampler that the runs don't suit; nothing has been made yet.
    """
    typed = add_swept_keys(invocation.overrides, invocation.config_dir)
    fixed, axes = read_space(typed, invocation.config_dir)
    firsts = {axis.key: axis.first for axis in axes}
    each = [
        read_settings([*fixed, *(f"{k}={v}" for k, v in values.items())], invocation.config_dir)
        for values in _one_at_a_time(axes, firsts)
    ]
    base, sweep = each[0], each[0].sweep
    if any(settings.sweep != sweep for settings in each):
        raise UserError("sweep: the values differ in what to sweep over; run them one after the other")
    repeated = {axis.key: axis for axis in axes if axis.key in REPEAT_KEYS}
    for key, axis in repeated.items():
        if not axis.values or (key == "seed" and sweep.seeds > 1):
            counted = ", or set sweep.seeds, but not both" if key == "seed" else ""
            raise UserError(f"{key}: give the repeats as a list, for example {key}='range(0,3)'{counted}")
    axes = [axis for axis in axes if axis.key not in repeated]
    monitor, monitor_range = (_common_monitor(each) if ranked else None) or (None, (-math.inf, math.inf))
    repeats = _repeats(repeated, base, cross_validate=ranked and _all_folds(typed, each))
    for key, unranked in (("sampler", "grid"), ("pruner", "none")):
        if monitor is None and getattr(sweep, key) != unranked:
            raise UserError(f"sweep.{key}: these runs have no one metric to compare; use {unranked}")
    if sweep.sampler == "grid":
        grid([axis for axis in axes if not axis.values])  # says which key is no list
    elif not axes:
        raise UserError(f"sweep.sampler: nothing to draw for {sweep.sampler}; give a key several values")
    return SweepPlan(
        invocation.command, invocation.config_dir, tuple(fixed), tuple(axes), repeats, base,
        tuple({str(settings.data): settings for settings in each}.values()), monitor, monitor_range,
    )  # fmt: skip


def _repeats(
    listed: Mapping[str, SearchDimension], base: Settings, cross_validate: bool
) -> tuple[Repeat, ...]:
    """Return every combination of seeds, folds and split seeds; the fold varies fastest."""
    values: dict[str, list[Any]] = {
        key: list(dict.fromkeys(int(value) for value in axis.values)) for key, axis in listed.items()
    }
    values.setdefault("seed", list(range(base.seed, base.seed + base.sweep.seeds)))
    if cross_validate:
        values.setdefault("data.fold", list(range(base.data["folds"])))
    splits, folds = values.get("data.split_seed", [None]), values.get("data.fold", [None])
    return tuple(Repeat(seed, fold, split) for split in splits for seed in values["seed"] for fold in folds)


def _all_folds(typed: Sequence[str], settings: Sequence[Settings]) -> bool:
    """Return True if the sweep cross-validates: no fold was given, and all settings have the same `data.folds`."""
    if any(override.key_or_group == "data.fold" for override in parse_overrides(typed)):
        return False
    found = {(each.data.get("folds"), each.data.get("fold")) for each in settings}
    return len(found) == 1 and isinstance((pair := found.pop())[0], int) and pair[1] == 0


def _one_at_a_time(axes: list[SearchDimension], firsts: dict[str, str]) -> Iterator[dict[str, str]]:
    """The first values, then every other value alone: all that is wrong by itself is found among these."""
    yield firsts
    for axis in axes:
        others = axis.values[1:] if axis.values else (axis.text(axis.high or 0.0),)
        yield from ({**firsts, axis.key: value} for value in others)


def _common_monitor(settings: list[Settings]) -> tuple[tuple[str, str], tuple[float, float]] | None:
    """Return the monitored metric shared by all settings and its range; None if they differ."""
    tasks = {str((each.data, each.task)): each for each in settings}
    found = set()
    for each in tasks.values():
        spec = build_source(each)[0].spec()
        task = build_task(each, spec, build_pipeline(each, spec))
        found.add((task.monitor, task.monitor_range))
    return found.pop() if len(found) == 1 else None


def cores() -> list[int]:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def share_of(worker: int, jobs: int, available: Sequence[T]) -> list[T]:
    """What worker number `worker` of `jobs` gets of cores or GPUs: its own where there are enough, else one of them."""
    count = len(available)
    if count <= jobs:
        return [available[worker % count]] if count else []
    ends = list(itertools.accumulate(count // jobs + (i < count % jobs) for i in range(jobs)))
    return list(available[ends[worker - 1] if worker else 0 : ends[worker]])


def _in_a_path(value: str) -> str:
    """A value as part of a folder's name that no shell, and no `key=value`, makes anything of."""
    return re.sub(r"[^\w.,+-]+", "_", short(value)).strip("_")[:24]


def short(value: str) -> str:
    """A value for people: four digits of a long number."""
    try:
        number = float(value)
    except ValueError:
        return value
    return value if len(value) <= 8 else f"{number:.4g}"
