"""Shared by all checks: the parts of a run, copies of its network, and constructors of findings."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.augment.pipeline import Pipeline
from cnntrain.data.loader import Loader
from cnntrain.randomness import epoch_order, seed_all
from cnntrain.tasks.task import Task
from cnntrain.train.device import Compute
from cnntrain.train.evaluate import predict_batch
from cnntrain.train.lr_finder import RangeTest
from cnntrain.train.signals import StopFlag
from cnntrain.train.state import TrainingPlan
from cnntrain.types import Batch, DataSpec, Finding

SAMPLE_SIZE = 256  # examples taken from a split by default
FULL_COUNT_PIXELS = 64 * 64  # `image_count` uses fewer images only above this size
MAX_STEP_IMAGES = 16  # batch size of `train_steps`
STABLE_ADAM_LR = 1e-3  # of the steps of `calibrated_copy`
FP16_SCALE = 1024.0  # loss scale
OUT_OF_BUDGET = "the time budget (check.budget_s) is used up"


@dataclass
class CheckContext:
    """The parts of a run. Methods return copies, so checks affect neither the run nor each other."""

    spec: DataSpec
    task: Task
    pipeline: Pipeline
    compute: Compute
    model: nn.Module  # of the run; checks work on `copy_model()`
    make_optimizer: Callable[[nn.Module], Optimizer]  # the configured one, for the trainable parameters of a model
    # Runs the range test of `cnntrain lr-find` on a copy of the model, until a time.monotonic().
    run_range_test: Callable[[TrainingPlan, float], RangeTest]
    loaders: Mapping[str, Loader]  # of `train`, `val` and, if there is one, `test`: uint8 images without augmentation
    plan: TrainingPlan  # length and batching of the run
    config: Mapping[str, Any]  # the whole config as plain values
    trained: bool  # whether the weights come from a checkpoint
    deadline: float  # time.monotonic() at which the time budget is used up
    stop: StopFlag
    config_warnings: Sequence[Finding] = ()  # of lint
    # Data for figures, which checks add, by title: lines by label, each (x values, y values).
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)  # expensive results by name that several checks use
    _samples: dict[tuple[str, int], Batch] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Remaining time budget in seconds; negative if it is used up."""
        return self.deadline - time.monotonic()

    def stored_batch(self, split: str = "train", count: int = SAMPLE_SIZE) -> Batch:
        """Return the same `count` examples (or all, if there are fewer), evenly spaced in a split, as uint8."""
        key = (split, count)
        if key not in self._samples:
            loader = self.loaders[split]
            rows = evenly_spaced(len(loader), count)
            batch = self.pipeline.resize(next(loader.batches(rows, len(rows))))
            if batch.images.is_floating_point():  # the cached images are larger and were resized
                batch = replace(batch, images=batch.images.round().to(torch.uint8))
            self._samples[key] = batch
        return copy.deepcopy(self._samples[key])

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
        batch = next(self.loaders["train"].batches(rows, len(rows)))
        return self._to_memory_format(self.pipeline.eval_transform(batch))

    def _to_memory_format(self, batch: Batch) -> Batch:
        batch.images = batch.images.contiguous(memory_format=self.compute.memory_format)
        return batch

    def image_count(self, most: int, least: int = 8) -> int:
        """Return how many images to compute on: `most` for images of up to 64 px, fewer for larger ones."""
        height, width = self.pipeline.output_size
        return min(most, max(most * FULL_COUNT_PIXELS // (height * width), least))

    def outputs(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the model's outputs (N, ...) as float32, computed in the run's precision."""
        return predict_batch(model, images, self.compute)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean training loss of a batch, a scalar with a gradient."""
        return self.mean_loss(self.outputs(model, batch.images), batch.truth)

    def mean_loss(self, outputs: Tensor, truth: dict[str, Tensor], training: bool = True) -> Tensor:
        """Return the mean loss of outputs, a scalar."""
        loss_sum, count = self.task.loss(outputs, truth, training)
        return loss_sum / count.clamp(min=1e-12)

    def reseed(self, *parts: int | str) -> None:
        """Seed torch's generators (dropout) from the run's seed and `parts`."""
        seed_all(self.plan.seed, "check", *parts)

    def copy_model(self) -> nn.Module:
        """Return a copy of the model in eval mode, without gradients."""
        model = copy.deepcopy(self.model).eval()
        model.zero_grad(set_to_none=True)
        return model.to(memory_format=self.compute.memory_format)

    def calibrated_copy(self, images: Tensor, adam_steps: int = 0) -> nn.Module:
        """Return a copy of the model in eval mode whose BatchNorms have the statistics of `images`.

        The initial running statistics (mean 0, variance 1) would not show how the model starts, because its first
        training step uses batch statistics. Trained weights keep their statistics.

        Args:
            adam_steps: train the copy first, with Adam whatever the configured optimizer is. After a few steps, layers
                that start at zero (a head, the last norm of a residual block) no longer hide the layers before them.
        """
        model = self.copy_model()
        if adam_steps:
            parameters = trainable_parameters(model).values()
            self.train_steps(model, torch.optim.Adam(parameters, lr=STABLE_ADAM_LR), adam_steps)
        if not self.trained:
            calibrate_norms(model, images)
        return model

    def train_steps(
        self, model: nn.Module, optimizer: Optimizer, steps: int, on_gradients: Callable[[], None] | None = None
    ) -> list[float]:
        """Train `model` for a few steps on augmented batches like the run would, and set it to eval mode.

        Stops if the loss is not finite or has no gradient.

        Args:
            on_gradients: called after each backward pass, before the optimizer step.

        Returns:
            The loss before each step.
        """
        count = min(MAX_STEP_IMAGES, self.plan.batch_size if self.plan.batch_size > 1 else MAX_STEP_IMAGES)
        sample, losses = self.augmented_batch(count * steps), []
        batches = max(len(sample) // count, 1)
        model.train()
        for step in range(steps):
            start = step % batches * count
            self.reseed("practice", step)
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss(model, sample.take(slice(start, start + count)))
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]) or not loss.requires_grad:
                break
            backward(loss, model, self.compute)
            if on_gradients is not None:
                on_gradients()
            optimizer.step()
        model.eval()
        return losses


def evenly_spaced(length: int, count: int) -> Tensor:
    """Return `count` evenly spaced rows (or all, if there are fewer) of a split with `length` examples."""
    return torch.linspace(0, length - 1, min(count, length)).round().long()


def calibrate_norms(model: nn.Module, images: Tensor) -> int:
    """Set the running statistics of BatchNorms to those of `images` (N, C, H, W), and set the model to eval mode.

    Returns:
        The number of norms.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # replaces the running statistics in one pass
    if norms and len(images) > 1:
        with torch.no_grad():
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
    return len(norms)


def backward(loss: Tensor, model: nn.Module, compute: Compute) -> None:
    """Compute the gradients of a scalar loss. In fp16 the loss is scaled so that small gradients do not underflow."""
    if compute.precision != "fp16":
        loss.backward()
        return
    (loss * FP16_SCALE).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if gradients:
        torch._foreach_div_(gradients, FP16_SCALE)  # pyright: ignore[reportPrivateImportUsage]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def relative_distance(reference: Tensor, other: Tensor) -> float:
    """Return the L2 distance of two tensors of the same shape, relative to the norm of the first."""
    reference, other = reference.detach().cpu().double(), other.detach().cpu().double()
    return float((reference - other).norm() / reference.norm().clamp(min=1e-12))


def sums_to_one(outputs: Tensor) -> bool:
    """Return whether outputs (N, K, ...) are non-negative and sum to 1 over K, as probabilities do."""
    if outputs.ndim < 2 or outputs.shape[1] < 2:
        return False
    return bool((outputs >= 0).all() and ((outputs.sum(1) - 1).abs() < 1e-3).all())


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
