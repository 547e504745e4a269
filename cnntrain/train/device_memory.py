"""The most memory that a piece of work takes: of a GPU what torch allocates, of a CPU what the process holds (RSS)."""

import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from cnntrain.memory import give_back_freed_memory

PROC = Path("/proc/self")


def forget_peak(device: torch.device) -> None:
    """Let `peak_mib` count from here; what is no longer used is given back first."""
    gc.collect()
    give_back_freed_memory()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # where it can't be written, the peak is that since the process began
        (PROC / "clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def peak_mib(device: torch.device) -> float:
    """The peak since `forget_peak`, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError):
        for line in (PROC / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
