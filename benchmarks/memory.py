"""Measure how the memory of a training grows with its dataset: cached in RAM, cached on disk, or read by workers.

    python benchmarks/memory.py                  # 400 and 4,000 JPEGs, 57 and 574 MiB after decoding
    python benchmarks/memory.py --images 40000   # ten times as many

`model=mlp` takes the same number of steps on both datasets: ten epochs of the smaller, one of the larger. The figure is
the peak memory of the command and all its child processes that the system cannot reclaim: anonymous and shared pages of
/proc/PID/smaps_rollup, sampled every 50 ms, shared pages counted once. Pages of mapped files can be reclaimed. With
disk and none the larger dataset should add at most a tenth of its decoded size.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import COMMAND, parser_of, write_jpegs

SIDE_PX = 224
CACHES = ("ram", "disk", "none")


def memory_mib(process_group: int) -> float:
    """Return the memory of all processes of a process group that the system cannot reclaim."""
    total_kib = 0
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            if os.getpgid(int(entry.name)) != process_group:
                continue
            lines = Path(entry.path, "smaps_rollup").read_text().splitlines()
        except (OSError, ProcessLookupError):  # the process has ended
            continue
        total_kib += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total_kib / 1024


def peak_memory_mib(root: Path, cache: str, epochs: int, folder: Path) -> float:
    """Return the peak memory of a training that writes to `folder`."""
    folder.mkdir()
    command = [
        COMMAND,
        "model=mlp",
        "model.values.width=8",
        "data=image_folder",
        f"data.root={root}",
        f"data.size={SIDE_PX}",
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
            peak = max(peak, memory_mib(process.pid))
            time.sleep(0.05)
    if process.returncode:
        sys.exit(f"a training failed:\n{log.read_text()}")
    return peak


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, default=4_000, help="of the larger dataset; the smaller one has a tenth")
    options = parser.parse_args()
    counts = (options.images // 10, options.images)
    decoded = [count * 3 * SIDE_PX * SIDE_PX / 2**20 for count in counts]
    print(f"{'':<8}" + "".join(f"{size:>10,.0f} MiB" for size in decoded) + f"{'more':>14}{'of the data':>14}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for count in counts:
            write_jpegs(folder / str(count), count, SIDE_PX, num_classes=2, quality=80)
        for cache in CACHES:
            small, large = (
                peak_memory_mib(folder / str(count), cache, epochs, folder / f"{cache}-{count}")
                for count, epochs in zip(counts, (10, 1), strict=True)
            )
            share = (large - small) / (decoded[1] - decoded[0])
            print(f"{cache:<8}{small:>14,.0f}{large:>14,.0f}{large - small:>14,.0f}{share:>14.2f}", flush=True)


if __name__ == "__main__":
    main()
