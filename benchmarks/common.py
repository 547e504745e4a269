"""Helpers shared by the benchmarks: input data, timed processes and the speed that a run recorded.

By default random pixels and labels replace a dataset, because the speed does not depend on the content of images.
"""

import argparse
import csv
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cnntrain.benchmark.measurement import BUSY_CORES, other_cores, read_cpu_times

COMMAND = str(Path(sys.executable).with_name("cnntrain"))
FASHION_MNIST_SPLITS = {"train": 60_000, "t10k": 10_000}


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return an argument parser that prints a module's docstring unchanged."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)


def add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, help="folder that contains FashionMNIST/raw (default: random images)")


@contextmanager
def fashion_mnist(root: Path | None) -> Iterator[Path]:
    """Yield a value for `data.root`: `root`, or a temporary folder with random images and labels."""
    if root is not None:
        yield root.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        random = np.random.default_rng(0)
        for split, count in FASHION_MNIST_SPLITS.items():
            write_idx(raw / f"{split}-images-idx3-ubyte", random.integers(0, 256, (count, 28, 28), np.uint8))
            write_idx(raw / f"{split}-labels-idx1-ubyte", random.integers(0, 10, count, np.uint8))
        yield Path(folder)


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write a uint8 array as an IDX file."""
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape)
    path.write_bytes(header + values.tobytes())


def write_jpegs(root: Path, count: int, side_px: int = 32, num_classes: int = 10, quality: int = 90) -> None:
    """Write random square images as `root/train/CLASS/IMAGE`, the layout of `data=image_folder`."""
    for label in range(num_classes):
        (root / "train" / str(label)).mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
        path = root / "train" / str(number % num_classes) / f"{number:06}.jpg"
        coarse.resize((side_px, side_px), Image.Resampling.BICUBIC).save(path, quality=quality)


class TimedRun(NamedTuple):
    """A process that has ended.

    Attributes:
        seconds: wall time of the whole process.
        other_cores: mean number of cores that other processes used meanwhile; 0 if unknown.
    """

    seconds: float
    other_cores: float
    output: str

    @property
    def is_clean(self) -> bool:
        return self.other_cores <= BUSY_CORES


def run_timed(command: list[str], cache_home: Path) -> TimedRun:
    """Run a command with its own cache folder; exit if it fails."""
    before, started = read_cpu_times(), time.perf_counter()
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache_home)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return TimedRun(seconds, other_cores(before, read_cpu_times()) or 0.0, done.stdout)


def steady_speeds(run_dir: Path) -> list[float]:
    """Return the images/s of every epoch of a run except the first, which warms up."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [float(row["images_per_s"]) for row in csv.DictReader(file)][1:]
