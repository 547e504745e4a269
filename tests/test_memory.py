"""Freed memory is reused, and the free memory is the smallest limit of the machine and its control groups."""

import subprocess
import sys
from pathlib import Path

import pytest

from cnntrain.memory import _control_group_limits

CODE = """
import resource, sys
import torch
from cnntrain.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layers = [torch.ones(1 << 18) for _ in range(8)] + [torch.ones(1 << 24)]  # of 1 MiB, and one of 64
    del layers
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""

RETURNED = """
from pathlib import Path
import torch
from cnntrain.memory import give_back_freed_memory, keep_freed_memory

def held_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

keep_freed_memory()
before = held_mib()
layers = [torch.ones(1 << 18) for _ in range(200)]
del layers
after = held_mib()
give_back_freed_memory()
print(after - before, held_mib() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is told on Linux alone")
def test_a_step_reuses_the_memory_of_the_previous_one() -> None:
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True).stdout)
        for how in ("plain", "kept")
    )
    assert 10 * kept < plain


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is told on Linux alone")
def test_freed_memory_is_returned_before_a_fork() -> None:
    done = subprocess.run([sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True)
    kept, returned = map(int, done.stdout.split())
    assert kept > 150 and returned < 50


def write(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("membership", "expected"),
    [
        ("0::/slice/job\n", [900, 70, 40]),
        ("0::/slice/other\n", [900, 70]),
        ("0::/\n", [900]),
        ("0::/../elsewhere\n", [900]),  # of a container, seen from the host
        ("5:cpu,cpuacct:/x\n4:memory:/slurm/job_7\n0::/nothing\n", [500, 0, 900]),
        ("", []),
    ],
    ids=["job", "its parent's", "root", "container", "version 1", "none"],
)
def test_all_control_groups_of_this_process_limit_its_memory(
    tmp_path: Path, membership: str, expected: list[int]
) -> None:
    tree = tmp_path / "cgroup"
    cached = "anon 7\nactive_file 5\ninactive_file 10"  # makes room when it is wanted
    write(tree, memory__max=1000, memory__current=100, memory__stat="anon 100")
    write(tree / "slice", memory__max=200, memory__current=145, memory__stat=cached)
    write(tree / "slice" / "job", memory__max=60, memory__current=35, memory__stat=cached)
    write(tree / "slice" / "other", memory__max="max", memory__current=20, memory__stat="anon 1")
    old = "active_file 1\ntotal_active_file 40\ntotal_inactive_file 0"
    write(tree / "memory", memory__limit_in_bytes=600, memory__usage_in_bytes=140, memory__stat=old)
    write(
        tree / "memory" / "slurm" / "job_7", memory__limit_in_bytes=50, memory__usage_in_bytes=80, memory__stat="anon 1"
    )
    (tmp_path / "membership").write_text(membership)
    assert list(_control_group_limits(tmp_path / "membership", tree)) == expected
    assert list(_control_group_limits(tmp_path / "nowhere", tree)) == []
