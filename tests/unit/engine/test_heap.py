"""Memory that is freed is there for the next step."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
import torch
from cnntrain.engine.heap import keep_freed_memory

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
    assert kept < 100 and plain > 1000  # pages of 4 KiB, or fewer larger ones
