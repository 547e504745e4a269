"""What a sweep will do, from what was typed: which keys it varies, over which seeds, and the settings of each run."""

import dataclasses
import itertools
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cnntrain.assembly import build_pipeline, build_source, build_task
from cnntrain.cli import DEFAULT_COMMAND, Invocation
from cnntrain.config import add_swept_keys, read_settings, read_space
from cnntrain.errors import UserError
from cnntrain.expectations import NEUTRAL
from cnntrain.settings import Settings, SweepSettings
from cnntrain.space import Axis, grid

T = TypeVar("T")
DRAWN_TRIALS = 20  # where the sampler draws and `sweep.trials` says nothing
# What may change when a sweep goes on: where and how fast it runs, and how much more is asked of it.
MAY_CHANGE = NEUTRAL - {"seed"} | {f"sweep.{key}" for key in ("trials", "timeout_s", "jobs", "on_error")}


@dataclass(frozen=True)
class Run:
    """One training: a setting of the swept keys with one seed.

    Attributes:
        trial: number of the setting, from 0.
        values: swept key -> value, as on the command line.
        overrides: all that its config is composed of, but for what follows.
        threads: CPU threads; None: as configured.
        folder: its own, inside the sweep's.
        command: what repeats it alone.
    """

    trial: int
    seed: int
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
        return dataclasses.replace(
            settings, seed=self.seed, threads=threads, run_dir=str(self.folder), resume="auto"
        )


@dataclass(frozen=True)
class Plan:
    """A sweep before anything has run.

    Attributes:
        fixed: overrides with one value.
        axes: the keys that vary, without `seed`.
        seeds: with which each setting is trained.
        base: the settings of the first trial.
        monitor: the metric on validation data that trials are ranked by, with its better end (`max` or `min`);
            None where there is no one figure for all (verdicts, or data sets with different metrics).
    """

    word: str
    config_dir: Path | None
    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    base: Settings
    monitor: tuple[str, str] | None

    @property
    def sweep(self) -> SweepSettings:
        return self.base.sweep

    @property
    def asked(self) -> list[str]:
        """The command in a form that another one may be held against: whether it goes on with this sweep."""
        fixed = [o for o in self.fixed if o.split("=")[0] not in MAY_CHANGE]
        fixed = [o for o in fixed if not o.startswith(("log.", "checkpoint."))]
        return sorted([*fixed, *map(str, self.axes), f"seed={','.join(map(str, self.seeds))}"])

    def grid(self) -> list[dict[str, str]] | None:
        """The settings to try in a fixed order; None where a sampler draws them."""
        if self.sweep.sampler != "grid":
            return None
        return grid(self.axes)[: self.sweep.trials]

    @property
    def trials(self) -> int:
        settings = self.grid()
        return len(settings) if settings is not None else self.sweep.trials or DRAWN_TRIALS

    def run(self, trial: int, values: Mapping[str, str], seed: int, folder: Path) -> Run:
        """The run of a setting with a seed, in its own folder inside the sweep's."""
        overrides = (*self.fixed, *(f"{key}={value}" for key, value in values.items()))
        name = "-".join([f"{trial:03d}", *map(_in_a_path, values.values())])
        name += f"-seed{seed}" if len(self.seeds) > 1 else ""
        threads = None
        if self.sweep.jobs > 1 and self.base.threads is None:
            threads = max(1, len(cores()) // self.sweep.jobs)
        command = self.command(overrides, seed, threads)
        return Run(trial, seed, dict(values), overrides, self.config_dir, threads, folder / name, command)

    def command(self, overrides: Sequence[str], seed: int, threads: int | None) -> str:
        """The line that trains one setting alone."""
        left_out = ("seed", "resume", "run_dir")
        kept = [o for o in overrides if o.split("=")[0] not in left_out and not o.startswith("sweep.")]
        more = [f"seed={seed}", *([f"threads={threads}"] if threads is not None else [])]
        word = [] if self.word == DEFAULT_COMMAND else [self.word]
        where = [f"--config-dir={self.config_dir}"] if self.config_dir else []
        return shlex.join(["cnntrain", *word, *where, *kept, *more])


def read_plan(invocation: Invocation, ranked: bool) -> Plan:
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
    seed_axis = next((axis for axis in axes if axis.key == "seed"), None)
    if seed_axis and (sweep.seeds > 1 or not seed_axis.values):
        raise UserError("seed: repeats are listed, as seed='range(0,3)', or counted by sweep.seeds; not both")
    seeds = [int(v) for v in seed_axis.values] if seed_axis else range(base.seed, base.seed + sweep.seeds)
    axes = [axis for axis in axes if axis is not seed_axis]
    monitor = _common_monitor(each) if ranked else None
    for key, unranked in (("sampler", "grid"), ("pruner", "none")):
        if monitor is None and getattr(sweep, key) != unranked:
            raise UserError(f"sweep.{key}: these runs have no one metric to compare; use {unranked}")
    if sweep.sampler == "grid":
        grid([axis for axis in axes if not axis.values])  # says which key is no list
    elif not axes:
        raise UserError(f"sweep.sampler: nothing to draw for {sweep.sampler}; give a key several values")
    return Plan(
        invocation.command, invocation.config_dir, tuple(fixed), tuple(axes), tuple(dict.fromkeys(seeds)), base,
        monitor,
    )  # fmt: skip


def _one_at_a_time(axes: list[Axis], firsts: dict[str, str]) -> Iterator[dict[str, str]]:
    """The first values, then every other value alone: all that is wrong by itself is found among these."""
    yield firsts
    for axis in axes:
        others = axis.values[1:] if axis.values else (axis.text(axis.high or 0.0),)
        yield from ({**firsts, axis.key: value} for value in others)


def _common_monitor(settings: list[Settings]) -> tuple[str, str] | None:
    """The metric that chooses the best epoch in all of them; None where they differ."""
    tasks = {str((each.data, each.task)): each for each in settings}
    found = set()
    for each in tasks.values():
        spec = build_source(each)[0].spec()
        found.add(build_task(each, spec, build_pipeline(each, spec)).monitor)
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
