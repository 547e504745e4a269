"""Data, plain torch networks, options and output shared by the scripts of the peers.

This module does not import cnntrain.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

BATCH_SIZE = 128
MEAN, STD = 0.2860, 0.3530
DROPOUT, DENSE_DROPOUT = 0.25, 0.5


@dataclass(frozen=True)
class Options:
    """Options of a peer; see `parse`."""

    model: str
    precision: str
    channels_last: bool
    root: Path
    epochs: int
    limit: int
    threads: int | None

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def parse(doc: str | None) -> Options:
    """Parse the command line and set the number of torch threads."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=["lenet5", "fmnist_cnn"], default="fmnist_cnn")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--root", type=Path, required=True, help="folder that contains FashionMNIST/raw")
    parser.add_argument("--epochs", type=int, default=3, help="the first one warms up and is excluded")
    parser.add_argument("--limit", type=int, default=60_000, help="training images")
    parser.add_argument("--threads", type=int, help="CPU threads (default: chosen by torch)")
    options = Options(**vars(parser.parse_args()))
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fashion_mnist(options: Options) -> tuple[Tensor, Tensor]:
    """Return training images (N, 1, 28, 28) uint8 and labels (N,) int64."""
    raw = options.root / "FashionMNIST" / "raw"
    images = np.fromfile(raw / "train-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 1, 28, 28)
    labels = np.fromfile(raw / "train-labels-idx1-ubyte", np.uint8, offset=8).astype(np.int64)
    return torch.from_numpy(images[: options.limit]), torch.from_numpy(labels[: options.limit])


def normalized(images: Tensor) -> Tensor:
    """Normalize to float32 with the mean and standard deviation of the dataset."""
    return (images.float() / 255 - MEAN) / STD


def network(name: str) -> nn.Module:
    """Build the layers of `model=lenet5` or `model=fmnist_cnn`, for 1x28x28 images and 10 classes."""
    return lenet5() if name == "lenet5" else fmnist_cnn()


def lenet5() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 20, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * 7 * 7, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


def fmnist_cnn() -> nn.Module:
    def block(channels: int, out: int) -> list[nn.Module]:
        return [
            nn.Conv2d(channels, out, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(out),
            nn.Conv2d(out, out, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(out),
            nn.MaxPool2d(2),
            nn.Dropout(DROPOUT),
        ]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 512),
        nn.ReLU(),
        nn.BatchNorm1d(512),
        nn.Dropout(DENSE_DROPOUT),
        nn.Linear(512, 10),
    )


def print_speed(epoch_seconds: list[float], images: int) -> None:
    """Print the median images/s over all epochs except the first."""
    speeds = [images / seconds for seconds in epoch_seconds[1:] or epoch_seconds]
    print(json.dumps({"images_per_s": statistics.median(speeds), "epochs": speeds}), flush=True)
