"""Measure the time of a piece of work, and the CPU load of other processes meanwhile.

GPU load of other processes is not measured.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cnntrain.train.signals import StopFlag

BUSY_CORES = 0.1  # a window in which other processes used more CPU time than this is disturbed
TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass
class TimingWindows:
    """Repeated timings of one piece of work.

    Attributes:
        seconds_per_image: one value per window.
        other_cores: CPU cores used by other processes in each window; None if unknown.
    """

    seconds_per_image: list[float] = field(default_factory=list)
    other_cores: list[float | None] = field(default_factory=list)

    def add(self, images: int, seconds: float, other_cores: float | None) -> None:
        self.seconds_per_image.append(seconds / images)
        self.other_cores.append(other_cores)

    @property
    def clean(self) -> list[float]:
        """Seconds per image in the windows that other processes did not disturb."""
        pairs = zip(self.seconds_per_image, self.other_cores, strict=True)
        return [seconds for seconds, cores in pairs if cores is None or cores <= BUSY_CORES]

    @property
    def median(self) -> float:
        """Median seconds per image of the clean windows, or of all windows if none is clean."""
        return statistics.median(self.clean or self.seconds_per_image)

    @property
    def images_per_s(self) -> float:
        return 1 / self.median

    @property
    def max_other_cores(self) -> float:
        """Largest number of cores used by other processes in a window; 0 if unknown."""
        return max((cores or 0.0 for cores in self.other_cores), default=0.0)


def interleave(
    runs: Mapping[str, Callable[[], tuple[int, float]]], rounds: int, ends_at: float, stop: StopFlag
) -> dict[str, TimingWindows]:
    """Time several pieces of work in turn, so that a disturbance affects all of them alike.

    Args:
        runs: functions by name. A call is one window and returns its number of images and seconds.
        rounds: maximum number of windows for each; at least one is always taken.
        ends_at: `time.monotonic()` after which no further round starts.
    """
    windows = {name: TimingWindows() for name in runs}
    for number in range(rounds):
        if number and time.monotonic() > ends_at:
            break
        for name, run in runs.items():
            stop.check()
            before = read_cpu_times()
            images, seconds = run()
            windows[name].add(images, seconds, other_cores(before, read_cpu_times()))
    return windows


@dataclass(frozen=True)
class CpuTimes:
    """CPU time used up to an instant.

    Attributes:
        at_s: the instant, in `time.perf_counter` seconds.
        all_s: core-seconds of all processes, including time that the hypervisor gave to other machines (steal).
        own_s: core-seconds of this process and its descendants.
    """

    at_s: float
    all_s: float
    own_s: float


def read_cpu_times(proc: Path = Path("/proc")) -> CpuTimes | None:
    """Return the CPU times up to now; None without /proc (Linux only)."""
    try:
        stat = (proc / "stat").read_text()
    except OSError:
        return None
    own_ticks = process_tree_ticks(_process_stats(proc), os.getpid())
    return CpuTimes(time.perf_counter(), busy_ticks(stat) / TICKS_PER_S, own_ticks / TICKS_PER_S)


def other_cores(before: CpuTimes | None, after: CpuTimes | None) -> float | None:
    """Return the mean number of cores that other processes used between two readings; None if unknown."""
    if before is None or after is None or after.at_s <= before.at_s:
        return None
    others_s = (after.all_s - before.all_s) - (after.own_s - before.own_s)
    return max(others_s, 0.0) / (after.at_s - before.at_s)


def busy_ticks(stat: str) -> int:
    """Return the busy clock ticks of all CPUs from the first line of /proc/stat (proc(5)); excludes idle and iowait."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split("\n", 1)[0].split()[1:9])
    return user + nice + system + irq + softirq + steal


def process_tree_ticks(stats: Iterable[str], pid: int) -> int:
    """Return the clock ticks of process `pid`, its living descendants, and children they have waited for.

    Args:
        stats: contents of /proc/PID/stat of all processes.
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for text in stats:
        number, _, rest = text.partition(" ")
        fields = rest.rpartition(")")[2].split()  # the program name may contain spaces and parentheses
        parents[int(number)] = int(fields[1])
        ticks[int(number)] = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    tree = {pid}
    while added := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= added
    return sum(ticks.get(member, 0) for member in tree)


def _process_stats(proc: Path) -> list[str]:
    texts = []
    for folder in proc.iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # the process has ended
                texts.append((folder / "stat").read_text(errors="replace"))
    return texts
