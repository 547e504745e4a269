"""The load that others put on the machine, from texts as /proc has them."""

import os
import time
from pathlib import Path

from cnntrain.train.measurement import (
    TICKS_PER_S,
    CpuTimes,
    busy_ticks,
    other_cores,
    process_tree_ticks,
    read_cpu_times,
)

# user nice system idle iowait irq softirq steal guest guest_nice
STAT = "cpu  100 20 30 4000 500 6 7 8 0 0\ncpu0 50 10 15 2000 250 3 4 4 0 0\n"


def process(pid: int, parent: int, *ticks: int, name: str = "python") -> str:
    """A /proc/PID/stat with utime, stime, cutime, cstime."""
    before = "0 0 0 -1 4194304 99 0 0 0"
    return f"{pid} ({name}) S {parent} {before} {' '.join(map(str, ticks))} 20 0 1 0 1568552"


def test_all_that_is_not_idle_counts_and_what_other_machines_took() -> None:
    assert busy_ticks(STAT) == 100 + 20 + 30 + 6 + 7 + 8


def test_a_family_is_the_process_its_descendants_and_those_it_has_waited_for() -> None:
    stats = [
        process(10, 1, 5, 3, 20, 2),
        process(12, 11, 100, 0, 0, 0),  # a grandchild, listed before its parent
        process(11, 10, 1, 1, 0, 0, name="a (strange) name"),
        process(99, 1, 7000, 0, 0, 0),
    ]
    assert process_tree_ticks(stats, 10) == 30 + 2 + 100
    assert process_tree_ticks(stats, 11) == 102
    assert process_tree_ticks(stats, 5) == 0


def test_others_are_all_less_the_family_over_time() -> None:
    before, after = CpuTimes(10.0, 500.0, 40.0), CpuTimes(12.0, 503.5, 40.5)
    assert other_cores(before, after) == 1.5
    assert other_cores(before, CpuTimes(12.0, 500.5, 41.0)) == 0  # ticks are coarse: never below 0
    assert other_cores(None, after) is None and other_cores(after, after) is None


def test_a_folder_like_proc_is_read(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(STAT)
    for pid, parent in ((os.getpid(), 1), (77_777_777, os.getpid()), (88_888_888, 1)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(process(pid, parent, 4, 1, 0, 0))
    (tmp_path / "99999999").mkdir()  # has ended between the listing and the reading
    reading = read_cpu_times(tmp_path)
    assert reading and reading.all_s == 171 / TICKS_PER_S and reading.own_s == 10 / TICKS_PER_S
    assert read_cpu_times(tmp_path / "nowhere") is None


def test_own_work_is_seen_as_own() -> None:
    before = read_cpu_times()
    if before is None:
        return
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    after = read_cpu_times()
    assert after and after.own_s - before.own_s >= 0.15
