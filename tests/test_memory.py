"""Reuse of freed memory, and the memory limits of control groups."""

import subprocess
import sys
from pathlib import Path

import pytest

from cnntrain.memory import _control_group_limits

COUNT_PAGE_FAULTS = """
import resource, sys
import torch
from cnntrain.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layers = [torch.ones(1 << 18) for _ in range(8)] + [torch.ones(1 << 24)]  # 1 MiB each, and one of 64 MiB
    del layers
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""

MEASURE_RETURNED_MEMORY = """
from pathlib import Path
import torch
from cnntrain.memory import give_back_freed_memory, keep_freed_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

keep_freed_memory()
before = resident_mib()
layers = [torch.ones(1 << 18) for _ in range(200)]
del layers
after = resident_mib()
give_back_freed_memory()
print(after - before, resident_mib() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is configured on Linux only")
def test_freed_memory_is_reused_by_the_next_step() -> None:
    default, kept = (
        int(
            subprocess.run(
                [sys.executable, "-c", COUNT_PAGE_FAULTS, allocator], capture_output=True, text=True, check=True
            ).stdout
        )
        for allocator in ("default", "kept")
    )
    assert 10 * kept < default


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is configured on Linux only")
def test_give_back_freed_memory_returns_it_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE_RETURNED_MEMORY], capture_output=True, text=True, check=True)
    kept, returned = map(int, done.stdout.split())
    assert kept > 150 and returned < 50


def write_files(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("membership", "expected"),
    [
        ("0::/slice/job\n", [900, 70, 40]),
        ("0::/slice/other\n", [900, 70]),
        ("0::/\n", [900]),
        ("0::/../elsewhere\n", [900]),  # of a container, as seen from the host
        ("5:cpu,cpuacct:/x\n4:memory:/slurm/job_7\n0::/nothing\n", [500, 0, 900]),
        ("", []),
    ],
    ids=["job", "parent", "root", "container", "version 1", "none"],
)
def test_limits_of_all_control_groups_of_a_process(tmp_path: Path, membership: str, expected: list[int]) -> None:
    tree = tmp_path / "cgroup"
    cached = "anon 7\nactive_file 5\ninactive_file 10"  # can be reclaimed
    write_files(tree, memory__max=1000, memory__current=100, memory__stat="anon 100")
    write_files(tree / "slice", memory__max=200, memory__current=145, memory__stat=cached)
    write_files(tree / "slice" / "job", memory__max=60, memory__current=35, memory__stat=cached)
    write_files(tree / "slice" / "other", memory__max="max", memory__current=20, memory__stat="anon 1")
    version_1 = "active_file 1\ntotal_active_file 40\ntotal_inactive_file 0"
    write_files(tree / "memory", memory__limit_in_bytes=600, memory__usage_in_bytes=140, memory__stat=version_1)
    write_files(
        tree / "memory" / "slurm" / "job_7",
        memory__limit_in_bytes=50,
        memory__usage_in_bytes=80,
        memory__stat="anon 1",
    )
    (tmp_path / "membership").write_text(membership)
    assert list(_control_group_limits(tmp_path / "membership", tree)) == expected
    assert list(_control_group_limits(tmp_path / "nowhere", tree)) == []
