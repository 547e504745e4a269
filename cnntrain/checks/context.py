"""Input and output of the checks: the parts of a run that they work on, and constructors of findings."""

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
from cnntrain.train.evaluate import predict_batch
from cnntrain.train.lr_finder import RangeTest
from cnntrain.train.signals import StopFlag
from cnntrain.train.state import TrainingPlan
from cnntrain.types import Batch, DataSpec, Finding

SAMPLE_SIZE = 256  # examples taken from a split by default


@dataclass
class CheckContext:
    """The parts of a run. Methods return copies, so checks affect neither the run nor each other.

    Attributes:
        model: the model of the run. Checks must not change it; they work on `copy_model()`.
        make_optimizer: builds the configured optimizer for the trainable parameters of a model.
        run_range_test: runs the range test of `cnntrain lr-find` on a copy of the model, with a plan, until a
            time.monotonic().
        loaders: by split: `train`, `val` and, if there is one, `test`; uint8 images without augmentation.
        plan: length and batching of the run.
        config: the whole config as plain values.
        trained: whether the weights come from a checkpoint.
        deadline: time.monotonic() at which the time budget is used up.
        config_warnings: findings of lint about the config.
        curves: data for figures, by title: lines by label, each (x values, y values). Checks add to it.
        cache: results by name that several checks use and that are expensive to compute.
    """

    spec: DataSpec
    task: Task
    pipeline: Pipeline
    compute: Compute
    model: nn.Module
    make_optimizer: Callable[[nn.Module], Optimizer]
    run_range_test: Callable[[TrainingPlan, float], RangeTest]
    loaders: Mapping[str, Loader]
    plan: TrainingPlan
    config: Mapping[str, Any]
    trained: bool
    deadline: float
    stop: StopFlag
    config_warnings: Sequence[Finding] = ()
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)
    _samples: dict[tuple[str, int], Batch] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Remaining time budget in seconds; negative if it is used up."""
        return self.deadline - time.monotonic()

    def copy_model(self) -> nn.Module:
        """Return a copy of the model in eval mode, without gradients."""
        model = copy.deepcopy(self.model).eval()
        model.zero_grad(set_to_none=True)
        return model.to(memory_format=self.compute.memory_format)

    def stored_batch(self, split: str = "train", count: int = SAMPLE_SIZE) -> Batch:
        """Return the same `count` examples (or all, if there are fewer), evenly spaced in a split, as uint8."""
        key = (split, count)
        if key not in self._samples:
            loader = self.loaders[split]
            rows = torch.linspace(0, len(loader) - 1, min(count, len(loader))).round().long()
            batch = self.pipeline.resize(next(loader.batches(rows, len(rows))))
            if batch.images.is_floating_point():  # the cached images are larger and were resized
                batch = replace(batch, images=batch.images.round().to(torch.uint8))
            self._samples[key] = batch
        return _copy(self._samples[key])

    def eval_batch(self, split: str = "train", count: int = SAMPLE_SIZE) -> Batch:
        """Return the examples of `stored_batch`, normalized but not augmented."""
        return self._to_memory_format(self.pipeline.eval_transform(self.stored_batch(split, count)))

    def augmented_batch(self, count: int = SAMPLE_SIZE, epoch: int = 0) -> Batch:
        """Return the first `count` augmented training examples of an epoch of the run."""
        loader = self.loaders["train"]
        rows = epoch_order(self.plan.seed, epoch, len(loader))[:count]
        batch = next(loader.batches(rows, len(rows)))
        return self._to_memory_format(self.pipeline(batch, self.plan.seed, epoch))

    def train_examples(self, rows: Tensor) -> Batch:
        """Return the training examples at `rows`, normalized but not augmented."""
        return self._to_memory_format(
            self.pipeline.eval_transform(next(self.loaders["train"].batches(rows, len(rows))))
        )

    def _to_memory_format(self, batch: Batch) -> Batch:
        batch.images = batch.images.contiguous(memory_format=self.compute.memory_format)
        return batch

    def outputs(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the model's outputs (N, ...) as float32, computed in the run's precision."""
        return predict_batch(model, images, self.compute)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean training loss of a batch, a scalar with a gradient."""
        return self.mean_loss(self.outputs(model, batch.images), batch.truth)

    def mean_loss(self, outputs: Tensor, truth: dict[str, Tensor]) -> Tensor:
        """Return the mean training loss of outputs, a scalar."""
        loss_sum, count = self.task.loss(outputs, truth)
        return loss_sum / count.clamp(min=1e-12)

    def reseed(self, *parts: int | str) -> None:
        """Seed torch's generators (dropout) from the run's seed and `parts`."""
        seed_step(self.plan.seed, "check", *parts)


def _copy(batch: Batch) -> Batch:
    targets = {name: target.clone() for name, target in batch.targets.items()}
    return Batch(batch.images.clone(), targets, batch.index, batch.position, batch.source_to_image)


# `run_checks` adds the name of the check to these findings.


def passed(evidence: str) -> Finding:
    return Finding("", "PASS", evidence)


def skipped(reason: str) -> Finding:
    return Finding("", "SKIP", reason)


def warned(evidence: str, cause: str, remedy: str, *keys: str) -> Finding:
    return Finding("", "WARN", evidence, cause, remedy, keys)


def failed(evidence: str, cause: str, remedy: str, *keys: str) -> Finding:
    return Finding("", "FAIL", evidence, cause, remedy, keys)


def join_names(names: Sequence[str], limit: int = 4) -> str:
    """Return the first `limit` names, separated by commas, and the number of omitted ones."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
