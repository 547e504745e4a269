"""Compare the images/s of a whole `cnntrain` training, with all logging, with a bare training step.

    python benchmarks/throughput.py                       # fmnist_cnn, resnet18, lenet5; random images
    python benchmarks/throughput.py --root DATA           # files of Fashion-MNIST
    python benchmarks/throughput.py --precision fp32 --models lenet5 --windows 5
    python benchmarks/throughput.py --batch-size 512      # on a GPU

The bare step is a handwritten forward, backward and optimizer step on one batch that is already on the device, in the
same precision and layout. Both run alternately in one process: a window of the bare step follows every logged loss of
full-length epochs. Validation is in no window; checkpoint writing is if it overlaps the next epoch. Pairs of windows
during which other processes took CPU time are excluded; up to three times as many are taken until there are enough
clean ones. Prints medians of the images/s and of the ratio within a pair (the speed of a shared machine changes less
within a pair than between pairs). The ratio should be at least 0.97 for fmnist_cnn and resnet18 and 0.95 for lenet5 (on
a GPU 0.95 with batch size 512).
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
from common import add_root, fashion_mnist, parser_of
from torch.nn.functional import cross_entropy

from cnntrain import compose
from cnntrain.augment.pipeline import MAX_GROUP
from cnntrain.benchmark.measurement import BUSY_CORES, other_cores, read_cpu_times
from cnntrain.commands.train import train
from cnntrain.config.schema import Settings
from cnntrain.report.run_logger import RunLogger
from cnntrain.train.setup import build_components

MODELS = ("fmnist_cnn", "resnet18", "lenet5")
TRAIN_IMAGES = 54_000  # of Fashion-MNIST, without the validation split


class EnoughWindows(Exception):
    """Ends the training when there are enough clean windows."""


class BareStep:
    """A training step with the same network and optimizer on one fixed batch."""

    def __init__(self, settings: Settings, batch_size: int) -> None:
        components = build_components(settings)
        self.compute = compute = components.compute
        self.model = components.model.to(memory_format=compute.memory_format).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        images = torch.randn(batch_size, 1, 28, 28, device=compute.device)
        self.images = images.contiguous(memory_format=compute.memory_format)
        self.labels = torch.arange(batch_size, device=compute.device) % 10

    def seconds_per_image(self, steps: int) -> float:
        """Time a window of some steps."""
        self._synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            with self.compute.autocast():
                outputs = self.model(self.images)
            cross_entropy(outputs.float(), self.labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self._synchronize()
        return (time.perf_counter() - started) / (steps * len(self.images))

    def _synchronize(self) -> None:
        if self.compute.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass
class WindowPair:
    """Seconds per image of two consecutive windows; clean if no other process disturbed them."""

    training: float
    bare: float
    clean: bool


def measure(model: str, root: Path, options: argparse.Namespace) -> list[WindowPair]:
    """Time the training from one logged loss to the next, and the bare step, alternately."""
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
    bare.seconds_per_image(2)  # warm up
    steps = round(options.window_s / (bare.seconds_per_image(3) * options.batch_size))
    steps = min(steps, TRAIN_IMAGES // options.batch_size)  # no window spans two epochs
    group = MAX_GROUP["cpu"][0]  # batches that are augmented at once: every window contains whole groups
    steps = max(1, steps // group) * group
    pairs: list[WindowPair] = []
    before, log_step = read_cpu_times(), RunLogger.log_step

    def log_and_time(logger: RunLogger, step: int, epoch: int, values: dict[str, float]) -> None:
        nonlocal before
        log_step(logger, step, epoch, values)
        bare_seconds = bare.seconds_per_image(steps)
        if step > steps:  # the first window warms up
            others = other_cores(before, read_cpu_times())
            pairs.append(WindowPair(1 / values["images_per_s"], bare_seconds, (others or 0.0) <= BUSY_CORES))
        if sum(pair.clean for pair in pairs) >= options.windows or len(pairs) >= 3 * options.windows:
            raise EnoughWindows
        before = read_cpu_times()

    with (
        tempfile.TemporaryDirectory() as folder,
        suppress(EnoughWindows),
        patch.object(RunLogger, "log_step", log_and_time),
    ):
        train(compose(*common, f"log.every_steps={steps}", f"run_dir={folder}/run"), test=False)
    return pairs


def main() -> None:
    parser = parser_of(__doc__)
    add_root(parser)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--windows", type=int, default=20, help="number of clean pairs")
    parser.add_argument("--window-s", type=float, default=2.0, help="seconds of a window")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--augment", help="default: that of the dataset, crop with padding and flip")
    options = parser.parse_args()
    print(f"batch {options.batch_size}, precision {options.precision}; images/s")
    print(f"{'model':<12}{'cnntrain':>10}{'bare step':>11}{'ratio':>8}   clean pairs of windows")
    with fashion_mnist(options.root) as root:
        for model in options.models:
            pairs = measure(model, root, options)
            clean = [pair for pair in pairs if pair.clean]
            used = clean or pairs
            training = median(1 / pair.training for pair in used)
            bare = median(1 / pair.bare for pair in used)
            ratio = median(pair.bare / pair.training for pair in used)
            busy = "" if clean else "   BUSY: not meaningful"
            count = f"{len(clean)} of {len(pairs)}"
            print(f"{model:<12}{training:>10,.0f}{bare:>11,.0f}{ratio:>8.3f}   {count}{busy}", flush=True)


if __name__ == "__main__":
    main()
