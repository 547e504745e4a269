"""How many cores other processes keep busy, from Linux's /proc: a timing made meanwhile says little.

What others do on a GPU is not seen.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BUSY_CORES = 0.1  # others that take more than this spoil a timing
TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True)
class CpuReading:
    """CPU time spent up to an instant.

    Attributes:
        at_s: the instant, on `time.perf_counter`'s clock.
        all_s: core-seconds by every process on the machine, and those that the hypervisor gave to other machines.
        own_s: core-seconds by this process and its descendants.
    """

    at_s: float
    all_s: float
    own_s: float


def read_cpu(proc: Path = Path("/proc")) -> CpuReading | None:
    """The CPU time spent so far; None where there is no /proc (it is Linux's)."""
    try:
        whole = (proc / "stat").read_text()
    except OSError:
        return None
    return CpuReading(
        time.perf_counter(),
        all_ticks(whole) / TICKS_PER_S,
        family_ticks(_process_texts(proc), os.getpid()) / TICKS_PER_S,
    )


def others_cores(before: CpuReading | None, after: CpuReading | None) -> float | None:
    """Cores that other processes kept busy on average between two readings; None where it can't be known."""
    if before is None or after is None or after.at_s <= before.at_s:
        return None
    others_s = (after.all_s - before.all_s) - (after.own_s - before.own_s)
    return max(others_s, 0.0) / (after.at_s - before.at_s)


def all_ticks(stat: str) -> int:
    """Clock ticks in which any CPU worked, from the first line of /proc/stat (proc(5)): idle and iowait left out."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split("\n", 1)[0].split()[1:9])
    return user + nice + system + irq + softirq + steal


def family_ticks(stats: Iterable[str], pid: int) -> int:
    """Clock ticks used by process `pid`, its living descendants, and those that they have waited for.

    Args:
        stats: the texts of /proc/PID/stat of all processes.
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for text in stats:
        number, _, rest = text.partition(" ")
        fields = rest.rpartition(")")[2].split()  # a program's name may hold blanks and brackets
        parents[int(number)] = int(fields[1])
        ticks[int(number)] = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    family = {pid}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(ticks.get(member, 0) for member in family)


def _process_texts(proc: Path) -> list[str]:
    texts = []
    for folder in proc.iterdir():
        if folder.name.isdigit():
            try:
                texts.append((folder / "stat").read_text(errors="replace"))
            except OSError:  # it has ended
                continue
    return texts
