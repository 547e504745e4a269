"""What the benchmarks share: Fashion-MNIST or a stand-in of its shape, and where the command is.

Speed does not depend on what the pictures show, so random pixels with random labels stand in for the files where
`--root` names none.
"""

import argparse
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

COMMAND = Path(sys.executable).with_name("cnntrain")
FILES = {"train": 60_000, "t10k": 10_000}


def add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, help="folder that has FashionMNIST/raw (default: a stand-in of its shape)")


@contextmanager
def fashion_mnist(root: Path | None) -> Iterator[Path]:
    """The folder to give as `data.root`: `root`, or one with a stand-in, gone when the block ends."""
    if root is not None:
        yield root.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        random = np.random.default_rng(0)
        for split, count in FILES.items():
            write_idx(raw / f"{split}-images-idx3-ubyte", random.integers(0, 256, (count, 28, 28), np.uint8))
            write_idx(raw / f"{split}-labels-idx1-ubyte", random.integers(0, 10, count, np.uint8))
        yield Path(folder)


def write_idx(path: Path, values: np.ndarray) -> None:
    """An array of bytes as an IDX file."""
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape)
    path.write_bytes(header + values.tobytes())
