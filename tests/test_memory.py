"""Memory that is freed is there for the next step."""

import subprocess
import sys

import pytest

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
def test_a_step_finds_the_memory_of_the_one_before() -> None:
    plain, kept = (
        int(
            subprocess.run(
                [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("plain", "kept")
    )
    assert 10 * kept < plain


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is told on Linux alone")
def test_it_is_given_back_where_it_is_in_the_way() -> None:
    done = subprocess.run([sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True)
    kept, returned = map(int, done.stdout.split())
    assert kept > 150 and returned < 50
