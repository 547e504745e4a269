"""Measure the speed of the training loop and of the bare step for several settings, within a time budget."""

import dataclasses
import io
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from cnntrain.benchmark.measurement import TimingWindows, interleave
from cnntrain.benchmark.tables import Speed
from cnntrain.data.load import Data
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


class ThroughputBenchmark:
    """Time one setting after the other, the configured one first, until the budget is used up.

    Args:
        plan: how the training would run.
        logger: logger of a real run, so that its cost is included.
    """

    def __init__(
        self, components: Components, data: Data, plan: TrainingPlan, logger: RunLogger, stop: StopFlag
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
        for channels_last in (True, False):
            for precision in precisions:
                compute = dataclasses.replace(
                    configured, precision=precision, channels_last=channels_last, compile="off"
                )
                if compute != configured:
                    speeds.append(self._time(compute, batch_size, self._budget_share(6 - len(speeds))))
        best = max(speeds, key=lambda speed: speed.loop or 0)
        compute = dataclasses.replace(
            configured, precision=best.precision, channels_last=best.channels_last, compile=best.compile
        )
        for size in self._batch_sizes():
            if self._may_exceed_memory(size, speeds[0].peak_mib):
                note = "not tried: it may not fit in memory"
                speeds.append(Speed(best.precision, best.channels_last, best.compile, size, note=note))
            else:
                speeds.append(self._time(compute, size, self._budget_share(2)))
        return speeds, parts

    def load(self) -> tuple[int, int, float]:
        """Return the number of clean windows, of all windows, and the largest load from other processes in cores."""
        return (
            sum(len(windows.clean) for windows in self.all_windows),
            sum(len(windows.other_cores) for windows in self.all_windows),
            max((windows.max_other_cores for windows in self.all_windows), default=0.0),
        )

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
        self,
        compute: Compute,
        batch_size: int,
        budget_s: float,
        parts: dict[str, TimingWindows] | None = None,
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
        logger.bar = ProgressBar(1, 1, watch=(components.task.monitor[0],), console=Console(file=io.StringIO()))
        with logger:
            yield logger
