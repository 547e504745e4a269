"""Images/s of a whole `cnntrain` training, all logging on, beside the bare step: forward, backward and optimizer step
written by hand, on one batch that lies on the device, in the same precision and layout.

    python benchmarks/throughput.py                       # fmnist_cnn, resnet18, lenet5; a stand-in for the data
    python benchmarks/throughput.py --root DATA           # Fashion-MNIST's files
    python benchmarks/throughput.py --precision fp32 --models lenet5 --windows 5
    python benchmarks/throughput.py --batch-size 512      # on a GPU

Both take turns in one process: a window of the bare step after every reading of the loss, in epochs of full length.
Validation is in no window; what a checkpoint costs is where it is still being written when the next epoch has begun.
Pairs of windows in which another process took CPU time do not count; up to three times as many are taken until there
are enough clean ones. Prints medians, of the images/s and of the pairs' ratios (a machine that others share changes its
speed between pairs, less within one): it should be 0.97 or more for fmnist_cnn and resnet18, 0.95 for lenet5 (on a GPU
0.95, batches of 512).
"""

import argparse
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from fashion import add_root, fashion_mnist
from torch.nn.functional import cross_entropy

from cnntrain import compose
from cnntrain.augment.pipeline import MAX_GROUP
from cnntrain.benchmark.measurement import BUSY_CORES, other_cores, read_cpu_times
from cnntrain.commands.train import train
from cnntrain.config.schema import Settings
from cnntrain.report.run_logger import RunLogger
from cnntrain.train.setup import build_components

MODELS = ("fmnist_cnn", "resnet18", "lenet5")


class EnoughError(Exception):
    """There are as many clean windows as were asked for."""


class BareStep:
    """The same network and optimizer without anything around them."""

    def __init__(self, settings: Settings, batch_size: int) -> None:
        assembly = build_components(settings)
        self.compute = compute = assembly.compute
        self.model = assembly.model.to(memory_format=compute.memory_format).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        images = torch.randn(batch_size, 1, 28, 28, device=compute.device)
        self.images = images.contiguous(memory_format=compute.memory_format)
        self.labels = torch.arange(batch_size, device=compute.device) % 10

    def window(self, steps: int) -> tuple[int, float]:
        """Images and seconds of some steps."""
        self._wait()
        started = time.perf_counter()
        for _ in range(steps):
            with self.compute.autocast():
                outputs = self.model(self.images)
            cross_entropy(outputs.float(), self.labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        return steps * len(self.images), time.perf_counter() - started

    def _wait(self) -> None:
        if self.compute.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass
class Pair:
    """Seconds an image of two windows, one after the other, and whether no other process took part in them."""

    training: float
    bare: float
    clean: bool


def measure(model: str, root: Path, options: argparse.Namespace) -> list[Pair]:
    """TimingWindows of the training, from one reading of the loss to the next, and of the bare step, in turns."""
    common = [
        f"model={model}",
        "data=fashion_mnist",
        f"data.root={root}",
        f"batch_size={options.batch_size}",
        f"precision={options.precision}",
        f"device={options.device}",
        "epochs=1000",
        *([f"threads={options.threads}"] if options.threads else []),
        *([f"augment={options.augment}"] if options.augment else []),
    ]
    bare = BareStep(compose(*common), options.batch_size)
    bare.window(2)
    images, seconds = bare.window(3)
    steps = round(options.window_s * images / seconds / options.batch_size)
    steps = min(steps, 54_000 // options.batch_size)  # no reading goes beyond an epoch
    steps = (
        max(1, steps // MAX_GROUP["cpu"][0]) * MAX_GROUP["cpu"][0]
    )  # every window has its share of what is augmented at once
    pairs: list[Pair] = []
    before, read = read_cpu_times(), RunLogger.log_step

    def read_and_time(journal: RunLogger, step: int, epoch: int, batch: int, values: dict[str, float]) -> None:
        nonlocal before
        read(journal, step, epoch, batch, values)
        images, seconds = bare.window(steps)
        if step > steps:  # the first one warms up
            busy = other_cores(before, read_cpu_times())
            clean = busy is None or busy <= BUSY_CORES
            pairs.append(Pair(1 / values["images_per_s"], seconds / images, clean))
        if sum(pair.clean for pair in pairs) >= options.windows or len(pairs) >= 3 * options.windows:
            raise EnoughError
        before = read_cpu_times()

    with (
        tempfile.TemporaryDirectory() as folder,
        suppress(EnoughError),
        patch.object(RunLogger, "log_step", read_and_time),
    ):
        train(compose(*common, f"log.every_steps={steps}", f"run_dir={folder}/run"), test=False)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_root(parser)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--windows", type=int, default=20, help="clean pairs that are asked for")
    parser.add_argument("--window-s", type=float, default=2.0, help="seconds of a window")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--augment", help="null: the data set's own, crop with padding and flip")
    options = parser.parse_args()
    print(f"batch {options.batch_size}, precision {options.precision}; images/s")
    print(f"{'model':<12}{'cnntrain':>10}{'bare step':>11}{'ratio':>8}   clean pairs of windows")
    with fashion_mnist(options.root) as root:
        for model in options.models:
            pairs = measure(model, root, options)
            clean = [pair for pair in pairs if pair.clean] or pairs
            ours, theirs, ratio = (
                median(values)
                for values in zip(*((1 / p.training, 1 / p.bare, p.bare / p.training) for p in clean), strict=True)
            )
            busy = "" if any(pair.clean for pair in pairs) else "   BUSY: these figures say nothing"
            count = f"{sum(pair.clean for pair in pairs)} of {len(pairs)}"
            print(f"{model:<12}{ours:>10,.0f}{theirs:>11,.0f}{ratio:>8.3f}   {count}{busy}", flush=True)


if __name__ == "__main__":
    main()
