"""How much memory a training takes as its data set grows: held in memory, kept on the disk, read by workers.

    python benchmarks/memory.py                  # 400 and 4,000 JPEGs, 57 and 574 MiB when they are decoded
    python benchmarks/memory.py --images 40000   # ten times as much

`model=mlp`, as many steps with either set: ten epochs of the smaller, one of the larger. Counted is memory that the
system can't take back (anonymous and shared pages, as in /proc/PID/smaps_rollup, what processes share once) of the
command and all processes that it starts, looked at every 50 ms; pages of a mapped file are the system's to drop. For
disk and stream the larger set should take no more than a tenth of its decoded size above what the smaller takes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from fashion import COMMAND
from PIL import Image

SIDE = 224
CACHES = ("ram", "disk", "none")


def write_jpegs(root: Path, count: int) -> None:
    random = np.random.default_rng(0)
    for label in range(2):
        (root / "train" / str(label)).mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
        coarse.resize((SIDE, SIDE)).save(root / "train" / str(number % 2) / f"{number:06}.jpg", quality=80)


def held_mib(group: int) -> float:
    """Memory that all processes of a process group hold together."""
    total = 0
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            if os.getpgid(int(entry.name)) != group:
                continue
            lines = Path(entry.path, "smaps_rollup").read_text().splitlines()
        except (OSError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total / 1024


def peak_memory_mib(root: Path, cache: str, epochs: int, folder: Path) -> float:
    """The most that a training held."""
    command = [
        str(COMMAND),
        "model=mlp",
        "model.values.width=8",
        "data=image_folder",
        f"data.root={root}",
        f"data.size={SIDE}",
        f"data.cache={cache}",
        f"epochs={epochs}",
        "batch_size=16",
        "threads=1",
        "log.figures=false",
        f"run_dir={folder}/run",
    ]
    log, peak = folder / "log", 0.0
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"},
        )
        while process.poll() is None:
            peak = max(peak, held_mib(process.pid))
            time.sleep(0.05)
    if process.returncode:
        sys.exit(f"a training failed:\n{log.read_text()}")
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=4_000, help="of the larger set; the smaller one has a tenth")
    options = parser.parse_args()
    counts = (options.images // 10, options.images)
    decoded = [count * 3 * SIDE * SIDE / 2**20 for count in counts]
    print(f"{'':<8}" + "".join(f"{size:>10,.0f} MiB" for size in decoded) + f"{'more':>14}{'of the data':>14}")
    with tempfile.TemporaryDirectory() as temporary:
        roots = [Path(temporary) / str(count) for count in counts]
        for root, count in zip(roots, counts, strict=True):
            write_jpegs(root, count)
        for cache in CACHES:
            folders = [Path(temporary) / f"{cache}-{count}" for count in counts]
            for folder in folders:
                folder.mkdir()
            small, large = (
                peak_memory_mib(root, cache, epochs, folder)
                for root, epochs, folder in zip(roots, (10, 1), folders, strict=True)
            )
            share = (large - small) / (decoded[1] - decoded[0])
            print(f"{cache:<8}{small:>14,.0f}{large:>14,.0f}{large - small:>14,.0f}{share:>14.2f}", flush=True)


if __name__ == "__main__":
    main()
