"""What the checks work on: the parts of a run, laid out to be tried without a trace."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.augment.pipeline import Pipeline
from cnntrain.data.loader import Loader
from cnntrain.randomness import epoch_order
from cnntrain.tasks.task import Task
from cnntrain.train.device import Compute, seed_step
from cnntrain.train.lr_finder import RangeTest
from cnntrain.train.signals import StopFlag
from cnntrain.train.state import TrainingPlan
from cnntrain.types import Batch, DataSpec, Finding

SAMPLE = 256  # images that a look at the data takes from a split


@dataclass
class CheckContext:
    """The parts of a run. What a check does to what it gets from here does not reach the run, nor another check.

    Attributes:
        network: the run's model; never handed out, never changed: `model()` gives copies.
        make_optimizer: the configured optimizer over a model's trainable parameters.
        try_learning_rates: the range test of `cnntrain lr-find`, on a copy, by a plan and until a time.monotonic().
        loaders: of `train`, `val` and, where there is one, `test`; uint8 images, not augmented.
        plan: how the run would train.
        config: the whole config as plain values, for what no part says.
        trained: whether the weights come from a checkpoint.
        notes: what lint said about the config.
        ends_at: time.monotonic() at which the budget is used up.
        curves: what to draw, by title: lines by label, each (x values, y values). Checks add to it.
        found: what was costly to measure and several checks use, by name.
    """

    spec: DataSpec
    task: Task
    pipeline: Pipeline
    compute: Compute
    network: nn.Module
    make_optimizer: Callable[[nn.Module], Optimizer]
    try_learning_rates: Callable[[TrainingPlan, float], RangeTest]
    loaders: Mapping[str, Loader]
    plan: TrainingPlan
    config: Mapping[str, Any]
    trained: bool
    ends_at: float
    stop: StopFlag
    notes: Sequence[Finding] = ()
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    _samples: dict[tuple[str, int], Batch] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Of the budget; below 0 when it is used up."""
        return self.ends_at - time.monotonic()

    def model(self) -> nn.Module:
        """A copy of the network, in eval mode, without gradients."""
        model = copy.deepcopy(self.network).eval()
        model.zero_grad(set_to_none=True)
        return model.to(memory_format=self.compute.memory_format)

    def stored(self, split: str = "train", count: int = SAMPLE) -> Batch:
        """`count` examples (or all, when there are fewer) spread evenly over a split, as uint8; always the same."""
        key = (f"{split} stored", count)
        if key not in self._samples:
            loader = self.loaders[split]
            rows = torch.linspace(0, len(loader) - 1, min(count, len(loader))).round().long()
            batch = self.pipeline.resize(next(loader.batches(rows, len(rows))))
            if batch.images.is_floating_point():  # it came on a finer canvas
                batch = replace(batch, images=batch.images.round().to(torch.uint8))
            self._samples[key] = batch
        return _copy(self._samples[key])

    def plain(self, split: str = "train", count: int = SAMPLE) -> Batch:
        """As `stored`, normalized, in the compute's memory layout, not augmented."""
        return self._laid_out(self.pipeline.eval_transform(self.stored(split, count)))

    def augmented(self, count: int = SAMPLE, epoch: int = 0) -> Batch:
        """The first `count` training examples that epoch `epoch` of the run would see, augmented."""
        loader = self.loaders["train"]
        rows = epoch_order(self.plan.seed, epoch, len(loader))[:count]
        batch = next(loader.batches(rows, len(rows)))
        return self._laid_out(self.pipeline(batch, self.plan.seed, epoch))

    def _laid_out(self, batch: Batch) -> Batch:
        batch.images = batch.images.contiguous(memory_format=self.compute.memory_format)
        return batch

    def outputs(self, model: nn.Module, images: Tensor) -> Tensor:
        """The model's answer (N, ...) as float32, in the run's precision."""
        with self.compute.autocast():
            outputs = model(images)
        return outputs.float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean training loss of a batch, a scalar to differentiate."""
        loss_sum, count = self.task.loss(self.outputs(model, batch.images), batch.truth)
        return loss_sum / count.clamp(min=1e-12)

    def reseed(self, *parts: int | str) -> None:
        """Make what torch draws next (dropout) a function of `parts` alone."""
        seed_step(self.plan.seed, "check", *parts)


def _copy(batch: Batch) -> Batch:
    targets = {name: target.clone() for name, target in batch.targets.items()}
    return Batch(batch.images.clone(), targets, batch.index, batch.position, batch.source_to_image)
