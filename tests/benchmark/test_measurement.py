"""Timing windows and the CPU load of other processes, from texts in the format of /proc."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from cnntrain.benchmark.measurement import (
    TICKS_PER_S,
    CpuTimes,
    TimingWindows,
    busy_ticks,
    interleave,
    other_cores,
    process_tree_ticks,
    read_cpu_times,
)
from cnntrain.train.signals import StopFlag

# user nice system idle iowait irq softirq steal guest guest_nice
STAT = "cpu  100 20 30 4000 500 6 7 8 0 0\ncpu0 50 10 15 2000 250 3 4 4 0 0\n"


def process(pid: int, parent: int, *ticks: int, name: str = "python") -> str:
    """A /proc/PID/stat with utime, stime, cutime, cstime."""
    before = "0 0 0 -1 4194304 99 0 0 0"
    return f"{pid} ({name}) S {parent} {before} {' '.join(map(str, ticks))} 20 0 1 0 1568552"


def test_busy_ticks_exclude_idle_and_iowait_and_include_steal() -> None:
    assert busy_ticks(STAT) == 100 + 20 + 30 + 6 + 7 + 8


def test_process_tree_includes_descendants_and_waited_children() -> None:
    stats = [
        process(10, 1, 5, 3, 20, 2),
        process(12, 11, 100, 0, 0, 0),  # a grandchild, listed before its parent
        process(11, 10, 1, 1, 0, 0, name="a (strange) name"),
        process(99, 1, 7000, 0, 0, 0),
    ]
    assert process_tree_ticks(stats, 10) == 30 + 2 + 100
    assert process_tree_ticks(stats, 11) == 102
    assert process_tree_ticks(stats, 5) == 0


def test_other_cores_is_the_difference_over_time() -> None:
    before, after = CpuTimes(10.0, 500.0, 40.0), CpuTimes(12.0, 503.5, 40.5)
    assert other_cores(before, after) == 1.5
    assert other_cores(before, CpuTimes(12.0, 500.5, 41.0)) == 0  # ticks are coarse: never below 0
    assert other_cores(None, after) is None and other_cores(after, after) is None


def test_read_cpu_times_reads_a_folder_in_the_format_of_proc(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(STAT)
    for pid, parent in ((os.getpid(), 1), (77_777_777, os.getpid()), (88_888_888, 1)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(process(pid, parent, 4, 1, 0, 0))
    (tmp_path / "99999999").mkdir()  # a process that ended after the folder was listed
    reading = read_cpu_times(tmp_path)
    assert reading and reading.all_s == 171 / TICKS_PER_S and reading.own_s == 10 / TICKS_PER_S
    assert read_cpu_times(tmp_path / "nowhere") is None


def test_own_cpu_time_is_counted() -> None:
    before = read_cpu_times()
    if before is None:
        return
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    after = read_cpu_times()
    assert after and after.own_s - before.own_s >= 0.15


def test_median_uses_clean_windows_if_there_are_any() -> None:
    windows = TimingWindows()
    for seconds, others in ((1.0, 0.0), (2.0, 0.05), (9.0, 0.5), (3.0, None)):
        windows.add(10, seconds, others)
    assert windows.clean == [0.1, 0.2, 0.3] and windows.median == 0.2 and windows.images_per_s == 5
    assert windows.max_other_cores == 0.5
    busy = TimingWindows([0.4, 0.6], [1.0, 2.0])
    assert busy.clean == [] and busy.median == 0.5


def test_interleave_takes_turns_until_the_deadline_and_at_least_once() -> None:
    taken: list[str] = []

    def window(name: str) -> Callable[[], tuple[int, float]]:
        return lambda: (taken.append(name), (2, 1.0))[1]

    runs = {name: window(name) for name in "ab"}
    found = interleave(runs, 3, time.monotonic() + 60, StopFlag())
    assert taken == list("ababab") and found["a"].seconds_per_image == [0.5] * 3
    taken.clear()
    interleave(runs, 3, time.monotonic() - 1, StopFlag())
    assert taken == list("ab")
