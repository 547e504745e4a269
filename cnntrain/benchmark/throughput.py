"""Measure the speed of the training loop and of the bare step for several settings; recommend overrides."""

import dataclasses
import io
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cnntrain.benchmark.measurement import TimingWindows, interleave
from cnntrain.data.load import DataSplits
from cnntrain.errors import is_out_of_memory
from cnntrain.memory import free_host_bytes, peak_memory_mib, reset_peak_memory
from cnntrain.report.progress import ProgressBar
from cnntrain.report.run_logger import RunLogger
from cnntrain.train.device import Compute
from cnntrain.train.setup import Components
from cnntrain.train.signals import StopFlag
from cnntrain.train.state import Progress, TrainingPlan
from cnntrain.train.step_timer import StepTimer

ROUNDS = 5  # timing windows of each kind per setting
PARTS_SHARE = 0.35  # of the budget, for the time per part of a step
CPU_MEMORY_SHARE = 0.8  # of the free host memory that a larger batch may be expected to need additionally
MIN_SPEEDUP = 1.03  # smaller speedups are within the variation of the timings
DESCRIPTIONS = {
    "step": "forward, backward, optimizer step",
    "metrics": "metrics, gradient norm, check for non-finite values, average of the weights",
    "logging": "progress bar, TensorBoard",
    "augment": "normalize and augment the batch",
    "transfer": "copy the images to the device",
    "data": "load the batch: from the cache, or wait for workers",
}


@dataclass(frozen=True)
class Speed:
    """Measurements of one setting; None if not measured.

    Attributes:
        loop: images/s of the training loop.
        bare: images/s of the bare step (forward, backward, optimizer step) on a batch that is on the device.
        peak_mib: peak memory in MiB.
        clean, windows: number of pairs of timing windows without load from other processes, and of all pairs.
        note: reason for a missing value.
    """

    precision: str
    channels_last: bool
    compile: str
    batch_size: int
    loop: float | None = None
    bare: float | None = None
    peak_mib: float | None = None
    clean: int = 0
    windows: int = 0
    note: str = ""

    @property
    def overrides(self) -> dict[str, str]:
        """The overrides of this setting for the command line."""
        return {
            "precision": self.precision,
            "channels_last": str(self.channels_last).lower(),
            "compile": self.compile,
            "batch_size": str(self.batch_size),
        }


class ThroughputBenchmark:
    """Time one setting after the other, the configured one first, until the budget is used up.

    Args:
        plan: how the training would run.
        logger: logger of a real run, so that its cost is included.
    """

    def __init__(
        self, components: Components, data: DataSplits, plan: TrainingPlan, logger: RunLogger, stop: StopFlag
    ) -> None:
        self.components, self.plan, self.logger, self.stop = components, plan, logger, stop
        self.loader = components.loader(data.train, augmented=True)
        self.budget_s = components.settings.bench.budget_s
        self.ends_at = time.monotonic() + self.budget_s
        self.all_windows: list[TimingWindows] = []

    def measure(self) -> tuple[list[Speed], dict[str, TimingWindows]]:
        """Return the speed of every setting, and the timing windows per part of the configured step."""
        configured, batch_size = self.components.compute, self.plan.batch_size
        parts: dict[str, TimingWindows] = {}
        speeds = [self._time(configured, batch_size, self.budget_s * (1 - PARTS_SHARE) / 6, parts)]
        precisions = ["bf16", "fp32", *["fp16"] * (configured.device.type == "cuda")]
        for channels_last, precision in itertools.product((True, False), precisions):
            compute = dataclasses.replace(configured, precision=precision, channels_last=channels_last, compile="off")
            if compute != configured:
                speeds.append(self._time(compute, batch_size, self._budget_share(6 - len(speeds))))
        best = max(speeds, key=lambda speed: speed.loop or 0)
        setting = {"precision": best.precision, "channels_last": best.channels_last, "compile": best.compile}
        compute = dataclasses.replace(configured, **setting)
        for size in self._batch_sizes():
            if self._may_exceed_memory(size, speeds[0].peak_mib):
                note = "not tried: it may not fit in memory"
                speeds.append(Speed(**setting, batch_size=size, note=note))
            else:
                speeds.append(self._time(compute, size, self._budget_share(2)))
        return speeds, parts

    def load_line(self) -> str:
        """Describe the load from other processes during the measurement."""
        clean = sum(len(each.clean) for each in self.all_windows)
        windows = sum(len(each.other_cores) for each in self.all_windows)
        return load_line(clean, windows, max((each.max_other_cores for each in self.all_windows), default=0.0))

    def _batch_sizes(self) -> list[int]:
        size = self.plan.batch_size
        sizes = [size // 2, size * 2, *[size * 4] * (self.components.compute.device.type == "cuda")]
        return [each for each in sizes if 1 < each <= len(self.loader)]

    def _budget_share(self, settings_left: int) -> float:
        return (self.ends_at - time.monotonic()) / max(settings_left, 1)

    def _may_exceed_memory(self, size: int, peak_mib: float | None) -> bool:
        """Return True if a larger batch may need more than the free host memory (CPU only)."""
        if self.components.compute.device.type != "cpu" or size <= self.plan.batch_size or not peak_mib:
            return False
        additional_mib = peak_mib * size / self.plan.batch_size - peak_mib
        return additional_mib * 2**20 > CPU_MEMORY_SHARE * free_host_bytes()

    def _time(
        self, compute: Compute, batch_size: int, budget_s: float, parts: dict[str, TimingWindows] | None = None
    ) -> Speed:
        """Time one setting in about `budget_s` seconds; fill `parts` if given."""
        speed = Speed(compute.precision, compute.channels_last, compute.compile, batch_size)
        if budget_s <= 0:
            return dataclasses.replace(speed, note="not timed: bench.budget_s is used up")
        reset_peak_memory(compute.device)
        started = time.monotonic()
        try:
            timer = self._step_timer(compute, batch_size)
            timer.warm_up()
            if compute.compile != "off":  # the budget does not include compilation
                compiling_s = time.monotonic() - started
                started, self.ends_at = started + compiling_s, self.ends_at + compiling_s
            runs = {"bare": timer.bare, "loop": timer.loop}
            windows = interleave(runs, ROUNDS, started + budget_s, self.stop)
            peak_mib = peak_memory_mib(compute.device)
            if parts is not None:
                ends_at = time.monotonic() + PARTS_SHARE * self.budget_s
                parts.update(interleave(timer.parts(), ROUNDS, ends_at, self.stop))
        except (RuntimeError, MemoryError) as error:
            if parts is not None or not is_out_of_memory(error):
                raise
            return dataclasses.replace(speed, note="out of memory")
        self.all_windows += [*windows.values(), *(parts or {}).values()]
        return dataclasses.replace(
            speed,
            loop=windows["loop"].images_per_s,
            bare=windows["bare"].images_per_s,
            peak_mib=peak_mib,
            clean=min(len(each.clean) for each in windows.values()),
            windows=len(windows["loop"].other_cores),
        )

    def _step_timer(self, compute: Compute, batch_size: int) -> StepTimer:
        plan = dataclasses.replace(self.plan, batch_size=batch_size)
        return StepTimer(self.components, plan, self.loader, compute, self.logger)


@contextmanager
def temporary_logger(components: Components, plan: TrainingPlan) -> Iterator[RunLogger]:
    """Yield a logger with the cost of a real one: its files are deleted, and its progress bar is not shown."""
    with tempfile.TemporaryDirectory() as folder:
        logger = RunLogger(Path(folder), components, plan, Progress())
        logger.bar = ProgressBar(1, 1, metrics=(components.task.monitor[0],), console=Console(file=io.StringIO()))
        with logger:
            yield logger


def speed_rows(speeds: Sequence[Speed]) -> list[dict[str, object]]:
    """Return one row per setting; the configured one is first."""
    fastest = max((s.loop or 0 for s in speeds), default=0)
    rows = []
    for number, speed in enumerate(speeds):
        remarks = [*["configured"] * (number == 0), *["fastest"] * (speed.loop == fastest), speed.note]
        rows.append(
            {
                **speed.overrides,
                "images/s": speed.loop and round(speed.loop),
                "bare step": speed.bare and round(speed.bare),
                "share": round(speed.loop / speed.bare, 3) if speed.loop and speed.bare else None,
                "peak MiB": speed.peak_mib and round(speed.peak_mib),
                "clean windows": f"{speed.clean} of {speed.windows}" if speed.windows else None,
                "remark": ", ".join(filter(None, remarks)),
            }
        )
    return rows


def part_rows(seconds_per_image: Mapping[str, float], images: int) -> list[dict[str, object]]:
    """Return the time per part of a step, and the total in the last row.

    Args:
        seconds_per_image: cumulative times, each with one part more than the one before; see `StepTimer.parts`. The
            difference may be slightly negative because of noise.
        images: number of images per step.
    """
    total = list(seconds_per_image.values())[-1]
    rows, before = [], 0.0
    for name, seconds in seconds_per_image.items():
        added = seconds - before
        rows.append(
            {
                "part": name,
                "ms per step": added * images * 1000,
                "share": added / total,
                "description": DESCRIPTIONS[name],
            }
        )
        before = seconds
    return [*rows, {"part": "total", "ms per step": total * images * 1000, "share": 1.0, "description": ""}]


def recommend(speeds: Sequence[Speed]) -> str:
    """Return the recommended overrides; the first of `speeds` is the configured setting."""
    configured = speeds[0]
    if configured.loop is None:
        return "no recommendation: the configured setting could not be timed"
    measured = [speed for speed in speeds if speed.loop is not None]
    if len(measured) == 1:
        return "no recommendation: only the configured setting could be timed"
    same = max((s for s in measured if s.batch_size == configured.batch_size), key=lambda s: s.loop or 0)
    speedup = (same.loop or 0) / configured.loop
    if speedup < MIN_SPEEDUP:
        same = configured
        text = "keep precision, channels_last and compile: no other setting is noticeably faster"
    else:
        text = f"use {_changes(configured, same)}: {speedup:.2f} times the images/s"
    best = max(measured, key=lambda s: s.loop or 0)
    further = (best.loop or 0) / (same.loop or 1)
    if best.batch_size != configured.batch_size and further >= MIN_SPEEDUP:
        text += (
            f"\n{_changes(same, best)} gives another factor of {further:.2f}, but changes the training: "
            "find optimizer.lr again"
        )
    return text


def _changes(before: Speed, after: Speed) -> str:
    return " ".join(f"{k}={v}" for k, v in after.overrides.items() if v != before.overrides[k])


def load_line(clean: int, windows: int, max_other_cores: float) -> str:
    if clean == windows:
        return f"no load from other processes in {windows} timing windows"
    return (
        f"other processes used CPU time in {windows - clean} of {windows} timing windows (up to {max_other_cores:.1f} "
        "cores); these windows are ignored where possible, and the speeds may be too low"
    )
