"""A folder of 50,000 JPEGs: the first epoch, the next launch and later epochs, beside a DataLoader with Pillow and v2.

    python benchmarks/folder.py                       # a stand-in of 32x32 px
    python benchmarks/folder.py --folder DATA/train   # a folder CLASS/IMAGE of one's own, as CIFAR-10's 50,000
    python benchmarks/folder.py --images 4000 --rounds 1      # a smoke run

The network is the smallest (`model=mlp`), for it is the feeding that is timed: crop with padding and flip, batches of
128, two worker processes for the DataLoader. Programs take turns, each in a process of its own; whole launches count,
start-up, decoding and validation included; medians.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from fashion import COMMAND
from PIL import Image

from cnntrain.benchmark.measurement import BUSY_CORES, other_cores, read_cpu_times

PEER = Path(__file__).parent / "peers" / "folder_dataloader.py"
CLASSES = 10


@contextmanager
def folder_of_jpegs(given: Path | None, count: int) -> Iterator[Path]:
    """The folder CLASS/IMAGE to use: `given`, or a stand-in that is gone when the block ends."""
    if given:
        yield given.resolve()
        return
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        for label in range(CLASSES):
            (Path(temporary) / "train" / str(label)).mkdir(parents=True)
        for number in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
            target = Path(temporary) / "train" / str(number % CLASSES) / f"{number:05}.jpg"
            coarse.resize((32, 32), Image.Resampling.BICUBIC).save(target, quality=90)
        yield Path(temporary) / "train"


def timed(command: list[str], cache: Path) -> tuple[float, str, float]:
    """Seconds of the whole process, what it printed, and the cores that others kept busy meanwhile."""
    before, started = read_cpu_times(), time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "XDG_CACHE_HOME": str(cache)}
    )
    taken = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return taken, done.stdout, other_cores(before, read_cpu_times()) or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder that holds CLASS/IMAGE")
    parser.add_argument("--images", type=int, default=50_000, help="of the stand-in")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4, help="of the runs whose later epochs are compared")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    speeds: dict[str, list[float]] = {"kept on disk": [], "held in memory": []}
    busy = []
    with (
        folder_of_jpegs(options.folder, options.images) as folder,
        tempfile.TemporaryDirectory() as temporary,
    ):
        root = Path(temporary) / "data"
        root.mkdir()
        (root / "train").symlink_to(folder)
        ours = [
            str(COMMAND),
            "model=mlp",
            "data=image_folder",
            f"data.root={root}",
            "data.size=32",
            "augment=cifar",
            "batch_size=128",
            "data.val_fraction=0.01",
            "log.figures=false",
        ]
        for number in range(options.rounds):
            cache, run = Path(temporary) / f"cache{number}", Path(temporary) / f"run{number}"

            def note(name: str, command: list[str], cache: Path = cache) -> str:
                taken, said, others = timed(command, cache)
                seconds.setdefault(name, []).append(taken)
                busy.append(others)
                return said

            peer = [sys.executable, str(PEER), "--folder", str(folder)]
            note("cnntrain, first launch", [*ours, "epochs=1", f"run_dir={run}-first"])
            note("cnntrain, next launch", [*ours, "epochs=1", f"run_dir={run}-next"])
            note("DataLoader, Pillow, v2", [*peer, "--epochs", "1"])
            for name, cache in zip(speeds, ("disk", "ram"), strict=True):
                timed(
                    [*ours, f"epochs={options.epochs}", f"data.cache={cache}", f"run_dir={run}-{cache}"],
                    cache,
                )
                with Path(f"{run}-{cache}", "metrics.csv").open(newline="") as file:
                    speeds[name] += [float(row["images_per_s"]) for row in csv.DictReader(file)][1:]
            print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
        peers = json.loads(timed([*peer, "--epochs", "2"], cache)[1])
    first = statistics.median(seconds["DataLoader, Pillow, v2"])
    print(
        f"{peers['images']:,} JPEGs, one epoch, the whole process; medians of {options.rounds} rounds, "
        f"{sum(each <= BUSY_CORES for each in busy)} of {len(busy)} launches on a quiet machine"
    )
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"  {name:<26}{median:>8.1f} s{first / median:>8.2f} x as fast as the DataLoader")
    disk, memory = (statistics.median(values) for values in speeds.values())
    print(
        f"later epochs: {disk:,.0f} images/s kept on disk, {memory:,.0f} held in memory, ratio {disk / memory:.3f}; "
        f"the DataLoader's second epoch {peers['images'] / peers['seconds'][1]:,.0f}"
    )


if __name__ == "__main__":
    main()
