"""The plan of a sweep, read from the command line: search dimensions, repeats, and the settings of each run."""

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnntrain.config.command_line import DEFAULT_COMMAND, Invocation, format_command
from cnntrain.config.compose import parse_overrides, read_settings
from cnntrain.config.schema import Settings, SweepSettings
from cnntrain.data.load import read_fingerprint
from cnntrain.data.parallel import usable_cores
from cnntrain.errors import UserError
from cnntrain.report.compare import NEUTRAL, NEUTRAL_SECTIONS
from cnntrain.sweep.search_space import SearchDimension, add_swept_keys, grid, read_space, typed_values
from cnntrain.train.resume import flatten_settings
from cnntrain.train.setup import build_pipeline, build_source, build_task

DEFAULT_TRIALS = 20  # of a random or TPE search without sweep.trials
REPEAT_KEYS = ("seed", "data.fold", "data.split_seed")
# Keys that change the validation examples.
VALIDATION_KEYS = ("data", "data.root", "data.file", "data.limit", "data.val_fraction", "data.folds")
# Keys that may change when a sweep is resumed. Data paths may change too, because fingerprints identify the data.
MAY_CHANGE = (NEUTRAL - {"seed"}) | {"data.file"}
MAY_CHANGE |= {f"sweep.{key}" for key in ("trials", "timeout_s", "jobs", "on_error", "storage")}
# The others matter to the sweep itself, to `overfit -m`, and to optimizer.lr=auto.
SECTIONS_THAT_MAY_CHANGE = NEUTRAL_SECTIONS - {"sweep", "overfit", "lr_find"}
UNLIMITED = (-math.inf, math.inf)


@dataclass(frozen=True, order=True)
class Repeat:
    """Seed and, in cross-validation, the validation split of one run of a trial.

    Attributes:
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
        values = zip(REPEAT_KEYS, (self.seed, self.fold, self.split_seed), strict=True)
        return {key: value for key, value in values if value is not None}

    def __str__(self) -> str:
        return " ".join(typed_values(self.values))

    @classmethod
    def parse(cls, text: str) -> "Repeat":
        """Parse the output of `str`."""
        pairs = (word.removeprefix("data.").split("=") for word in text.split())
        return cls(**{key: int(value) for key, value in pairs})


@dataclass(frozen=True)
class PlannedRun:
    """One training run: one repeat of a trial.

    Attributes:
        trial: number of the trial, from 0.
        values: swept key -> value, as on the command line.
        overrides: all overrides of its config, including those of the repeat.
        threads: CPU threads; None: as configured.
        folder: its run folder, inside the sweep's folder.
        command: command line that trains this run alone.
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
        """Compose the settings of the run.

        Raises:
            UserError: the values are invalid in this combination.
        """
        settings = read_settings(self.overrides, self.config_dir)
        return dataclasses.replace(
            settings,
            threads=settings.threads if self.threads is None else self.threads,
            run_dir=str(self.folder),
            resume="auto",
            # A run does not need the sweep's storage, whose URL may contain a password.
            sweep=dataclasses.replace(settings.sweep, storage=None),
        )


@dataclass(frozen=True)
class SweepPlan:
    """Everything about a sweep that is known before its first run.

    Attributes:
        command: name of the command that each run executes (`train`, `overfit`).
        fixed: overrides with one value.
        dimensions: the keys that vary between trials.
        repeats: the seeds, folds and split seeds that each trial is trained with.
        base: the settings of the first trial.
        variants: one settings object for each data configuration in the search space.
        monitor: the validation metric that trials are ranked by, and its mode (`max` or `min`); None if there is no
            common metric (verdicts, or datasets with different metrics).
        monitor_range: the lowest and highest value of that metric.
    """

    command: str
    config_dir: Path | None
    fixed: tuple[str, ...]
    dimensions: tuple[SearchDimension, ...]
    repeats: tuple[Repeat, ...]
    base: Settings
    variants: tuple[Settings, ...]
    monitor: tuple[str, str] | None
    monitor_range: tuple[float, float] = UNLIMITED

    @property
    def sweep(self) -> SweepSettings:
        return self.base.sweep

    @property
    def metric(self) -> str:
        """Return the name of the monitored metric in metrics.csv; empty if there is none."""
        return f"val/{self.monitor[0]}" if self.monitor else ""

    def identity(self) -> dict[str, Any]:
        """Return what must be the same when the sweep is resumed: overrides, data fingerprints, and settings.

        Raises:
            UserError: a dataset cannot be read.
        """
        fixed = [override for override in self.fixed if not _may_change(override.split("=")[0])]
        columns = {key: dict.fromkeys(r.values.get(key) for r in self.repeats) for key in REPEAT_KEYS}
        repeats = [f"{key}={','.join(map(str, each))}" for key, each in columns.items() if None not in each]
        settings = flatten_settings(dataclasses.asdict(self.base))
        return {
            "overrides": sorted([*fixed, *map(str, self.dimensions), *repeats]),
            "data": sorted({read_fingerprint(build_source(settings)) for settings in self.variants}),
            "settings": {key: value for key, value in settings.items() if not _may_change(key)},
        }

    @property
    def overlap(self) -> float:
        """Return the ratio of validation to training examples if repeats use different splits; else 0."""
        if len({repeat.split for repeat in self.repeats}) == 1:
            return 0.0
        folds = self.base.data.get("folds")
        share = 1 / folds if folds else float(self.base.data.get("val_fraction") or 0.0)
        return share / (1 - share)

    @property
    def swept_validation_keys(self) -> list[str]:
        """Return the swept keys that change the validation examples, so that metrics are not comparable."""
        return [dimension.key for dimension in self.dimensions if dimension.key in VALIDATION_KEYS]

    def grid(self) -> list[dict[str, str]] | None:
        """Return the trials' values of a grid search in order; None if a sampler draws them."""
        return grid(self.dimensions)[: self.sweep.trials] if self.sweep.sampler == "grid" else None

    @property
    def num_trials(self) -> int:
        trials = self.grid()
        return len(trials) if trials is not None else self.sweep.trials or DEFAULT_TRIALS

    def make_run(self, trial: int, values: Mapping[str, str], repeat: Repeat, folder: Path) -> PlannedRun:
        """Build the run for one repeat of a trial, in its own subfolder of the sweep."""
        fixed = [override for override in self.fixed if override.split("=")[0] not in repeat.values]
        overrides = (*fixed, *typed_values({**values, **repeat.values}))
        varying = [f"{key.removeprefix('data.')}{value}" for key, value in self.varying(repeat).items()]
        name = "-".join([f"{trial:03d}", *map(_path_part, values.values()), *varying])
        words = ["cnntrain"] if self.command == DEFAULT_COMMAND else ["cnntrain", self.command]
        words += [f"--config-dir={self.config_dir}"] if self.config_dir else []
        words += [o for o in overrides if o.split("=")[0] not in ("resume", "run_dir") and not o.startswith("sweep.")]
        threads = None
        if self.sweep.jobs > 1 and self.base.threads is None:
            threads = max(1, usable_cores() // self.sweep.jobs)
            words.append(f"threads={threads}")
        return PlannedRun(
            trial, repeat, dict(values), overrides, self.config_dir, threads, folder / name, format_command(words)
        )

    def varying(self, repeat: Repeat) -> dict[str, int]:
        """Return a repeat's values for the keys that vary between repeats."""
        values = repeat.values.items()
        return {k: v for k, v in values if len({other.values.get(k) for other in self.repeats}) > 1}


def read_plan(invocation: Invocation, ranked: bool) -> SweepPlan:
    """Read the command line, and compose a config for each value of each key with the first values of the others.

    Nothing is written.

    Args:
        ranked: whether the runs have a validation metric to be ranked by.

    Raises:
        UserError: a value is invalid, or the sampler or pruner does not fit the search space or the runs.
    """
    overrides = add_swept_keys(invocation.overrides, invocation.config_dir)
    fixed, dimensions = read_space(overrides, invocation.config_dir)
    variants = [
        read_settings([*fixed, *typed_values(values)], invocation.config_dir) for values in _one_at_a_time(dimensions)
    ]
    base, sweep = variants[0], variants[0].sweep
    if any(settings.sweep != sweep for settings in variants):
        raise UserError("sweep: the values have different sweep settings; start one sweep for each")
    repeated = {each.key: each for each in dimensions if each.key in REPEAT_KEYS}
    dimensions = [each for each in dimensions if each.key not in repeated]
    for key, dimension in repeated.items():
        if not dimension.values or (key == "seed" and sweep.seeds > 1):
            alternative = ", or set sweep.seeds, but not both" if key == "seed" else ""
            raise UserError(f"{key}: give the repeats as a list, for example {key}='range(0,3)'{alternative}")
    repeats = _repeats(repeated, base, cross_validate=ranked and _uses_all_folds(overrides, variants))
    monitor, monitor_range = (_common_monitor(variants) if ranked else None) or (None, UNLIMITED)
    for key, unranked in (("sampler", "grid"), ("pruner", "none")):
        if monitor is None and getattr(sweep, key) != unranked:
            raise UserError(f"sweep.{key}: the runs have no common metric to compare; use {unranked}")
    if sweep.sampler == "grid":
        grid(dimensions)  # raises if a key has a continuous range
    elif not dimensions:
        raise UserError(f"sweep.sampler: nothing to draw for {sweep.sampler}; give a key several values")
    return SweepPlan(
        command=invocation.command,
        config_dir=invocation.config_dir,
        fixed=tuple(fixed),
        dimensions=tuple(dimensions),
        repeats=repeats,
        base=base,
        variants=tuple({str(settings.data): settings for settings in variants}.values()),
        monitor=monitor,
        monitor_range=monitor_range,
    )


def _repeats(listed: Mapping[str, SearchDimension], base: Settings, cross_validate: bool) -> tuple[Repeat, ...]:
    """Return every combination of seeds, folds and split seeds; the fold varies fastest."""
    values: dict[str, list[Any]] = {
        key: list(dict.fromkeys(map(int, dimension.values))) for key, dimension in listed.items()
    }
    values.setdefault("seed", list(range(base.seed, base.seed + base.sweep.seeds)))
    if cross_validate:
        values.setdefault("data.fold", list(range(base.data["folds"])))
    columns = (values.get(key, [None]) for key in ("data.split_seed", "seed", "data.fold"))
    return tuple(Repeat(seed, fold, split_seed) for split_seed, seed, fold in itertools.product(*columns))


def _uses_all_folds(overrides: Sequence[str], variants: Sequence[Settings]) -> bool:
    """Return True if the sweep cross-validates: no fold was given, and all trials have the same `data.folds`."""
    if any(override.key_or_group == "data.fold" for override in parse_overrides(overrides)):
        return False
    pairs = {(each.data.get("folds"), each.data.get("fold")) for each in variants}
    folds, fold = pairs.pop()
    return not pairs and isinstance(folds, int) and fold == 0


def _one_at_a_time(dimensions: Sequence[SearchDimension]) -> Iterator[dict[str, str]]:
    """Yield the first value of each key, then every other value of each key alone.

    Composing these finds every value that is invalid regardless of the other keys.
    """
    first = {dimension.key: dimension.first for dimension in dimensions}
    yield first
    for dimension in dimensions:
        others = dimension.values[1:] if dimension.values else (dimension.text(dimension.high or 0.0),)
        yield from ({**first, dimension.key: value} for value in others)


def _common_monitor(variants: Sequence[Settings]) -> tuple[tuple[str, str], tuple[float, float]] | None:
    """Return the monitored metric shared by all trials and its range; None if they differ."""
    monitors = set()
    for settings in {str((each.data, each.task)): each for each in variants}.values():
        spec = build_source(settings).spec()
        task = build_task(settings, spec, build_pipeline(settings, spec))
        monitors.add((task.monitor, task.monitor_range))
    return monitors.pop() if len(monitors) == 1 else None


def _may_change(key: str) -> bool:
    return key in MAY_CHANGE or key.split(".")[0] in SECTIONS_THAT_MAY_CHANGE


def repeats_text(repeats: Collection[Repeat]) -> str:
    """Format the number of repeats: `3 seeds`, `5 folds x 2 seeds`."""
    names = {"split": "split_seed", "fold": "fold", "seed": "seed"}
    counts = {name: len({getattr(repeat, field) for repeat in repeats}) for name, field in names.items()}
    return " x ".join(f"{count} {name}s" for name, count in counts.items() if count > 1) or "1 run"


def trial_name(values: Mapping[str, str], repeat: Mapping[str, int] | None = None) -> str:
    """Format the values of a trial and its repeat for display, with rounded numbers."""
    return " ".join(typed_values({**rounded(values), **(repeat or {})})) or "the only trial"


def rounded(values: Mapping[str, str]) -> dict[str, str]:
    """Round values for display."""
    return {key: round_number(value) for key, value in values.items()}


def round_number(value: str) -> str:
    """Round a value to four significant digits if it is a number of more than eight characters."""
    try:
        number = float(value)
    except ValueError:
        return value
    return value if len(value) <= 8 else f"{number:.4g}"


def _path_part(value: str) -> str:
    """Format a value as part of a folder name, without characters that a shell or `key=value` would interpret."""
    return re.sub(r"[^\w.,+-]+", "_", round_number(value)).strip("_")[:24]
