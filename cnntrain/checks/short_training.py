"""A short training, watched: does what it learns carry over to images that it has not seen?

Two yardsticks. The loss of the best answer that does not look at the image (how often each class occurs, the mean
shape, how often each class occurs at each place): a network that is shown blank images can't learn anything better.
And the loss that the network's own answers have with the targets of other images: it is the same where they know
nothing of the image (a permutation test, as in Ojala and Garriga, Permutation Tests for Studying Classifier
Performance, JMLR 2010, but with the answers permuted, and so without a training on permuted labels).
"""

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.checks.context import CheckContext
from cnntrain.checks.overfit import backward, calibrate_norms
from cnntrain.randomness import epoch_order
from cnntrain.tasks.task import Targets, Task
from cnntrain.types import Batch

IMAGES, IMAGES_PER_CLASS = 256, 16  # trained on, at least
IMAGES_OF_MAPS = 64  # where every pixel is an answer
BATCH, SMALL_BATCH = 32, 8  # images a step, at most and at least: many small steps learn more in a second
STEP_S = 0.5  # a step should not take longer
JUDGED, FEWEST_JUDGED = 256, 48  # images of each split at a look
LOOK_S, LOOKING = 1.5, 0.25  # what a look should take, and the share of the time that all may
WARMUP_STEPS = 10
PERMUTATIONS = 8
PLACES = 8  # cells a side in which the best constant map may differ


@dataclass(frozen=True)
class ImageInformation:
    """What answers know of a split's images; losses are means of the plain loss over the examples.

    Attributes:
        loss: with their own targets; carried: how much larger it is with targets of other images.
        error: standard error of `carried`.
    """

    loss: float
    carried: float
    error: float

    @property
    def surely(self) -> float:
        """`carried` in standard errors."""
        return self.carried / max(self.error, 1e-12)


@dataclass
class ShortTraining:
    """A training under way.

    Attributes:
        model: as it is after the last step.
        rows: the training examples that it sees; `judged`: what a look is at, by split.
        priors: loss of the best answer that does not look at the image, fitted on train, by split.
        looks: by split, what was known after each of `steps`, in eval mode with norms calibrated.
    """

    model: nn.Module
    rows: Tensor
    batch_size: int
    learning_rate: float
    judged: Mapping[str, Batch]
    priors: Mapping[str, float] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    looks: dict[str, list[ImageInformation]] = field(default_factory=lambda: {"train": [], "val": []})

    @property
    def passes(self) -> float:
        return self.steps[-1] * self.batch_size / len(self.rows)


def without_decay(optimizer: Optimizer) -> Optimizer:
    """Whether the decay is too strong is asked by itself."""
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    return optimizer


def step_seconds(bench: CheckContext) -> float:
    """What a training step on 8 images takes, on a copy."""
    if "step seconds" not in bench.found:
        model = bench.model().train()
        optimizer, batch = bench.make_optimizer(model), bench.plain("train", SMALL_BATCH)
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            _step(bench, model, optimizer, batch, 0)
            bench.found["step seconds"] = time.perf_counter() - started
    return bench.found["step seconds"]


def train_briefly(bench: CheckContext, learning_rate: float, seconds: float) -> Iterator[ShortTraining]:
    """Train a copy on some plain training images, and give word after each look, until `seconds` are over.

    With the configured optimizer, without weight decay, at a constant learning rate after a short warm-up.
    """
    ends_at, a_step = time.monotonic() + seconds, step_seconds(bench)
    count = len(bench.loaders["train"])
    shape = output_shape(bench)
    images = max(IMAGES, IMAGES_PER_CLASS * len(bench.spec.classes)) if len(shape) < 3 else IMAGES_OF_MAPS
    rows = _spread(torch.arange(count), images)
    size = max(SMALL_BATCH, min(BATCH, int(SMALL_BATCH * STEP_S / a_step)))
    size = min(size, bench.plan.batch_size if bench.plan.batch_size > 1 else size, len(rows))
    judged = max(FEWEST_JUDGED, min(JUDGED, int(LOOK_S * SMALL_BATCH / a_step)))
    model = bench.model()
    optimizer = without_decay(bench.make_optimizer(model))
    largest = max(group["peak_lr"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["share"] = group["peak_lr"] / largest if largest else 1.0
    shown = {"train": batch_of(bench, _spread(rows, judged)), "val": bench.plain("val", judged)}
    training = ShortTraining(model, rows, size, learning_rate, shown)
    training.priors = prior_losses(bench, shape, shown)
    step = epoch = 0
    look_s, looked_at = 0.0, time.monotonic()
    while True:
        order = rows[epoch_order(bench.plan.seed, epoch, len(rows))]
        for chunk in order[: len(order) - len(order) % size].split(size):
            bench.stop.check()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["share"] * min((step + 1) / WARMUP_STEPS, 1)
            loss = _step(bench, model.train(), optimizer, batch_of(bench, chunk), step)
            step, now = step + 1, time.monotonic()
            late = now > ends_at or not math.isfinite(loss)
            if late or (step >= WARMUP_STEPS and now - looked_at >= look_s * (1 / LOOKING - 1)):
                training.steps.append(step)
                for split, known in look(bench, model, shown).items():
                    training.looks[split].append(known)
                yield training
                look_s, looked_at = time.monotonic() - now, time.monotonic()
            if late:
                return
        epoch += 1


def _spread(rows: Tensor, count: int) -> Tensor:
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()]


def batch_of(bench: CheckContext, rows: Tensor) -> Batch:
    """Training examples, plain, in the compute's memory layout."""
    batch = bench.pipeline.eval_transform(next(bench.loaders["train"].batches(rows, len(rows))))
    batch.images = batch.images.contiguous(memory_format=bench.compute.memory_format)
    return batch


def _step(bench: CheckContext, model: nn.Module, optimizer: Optimizer, batch: Batch, step: int) -> float:
    bench.reseed("short training", step)
    loss_sum, count = bench.task.loss(bench.outputs(model, batch.images), batch.targets, plain=True)
    loss = loss_sum / count.clamp(min=1e-12)
    optimizer.zero_grad(set_to_none=True)
    if loss.requires_grad:
        backward(loss, model, bench.compute)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def look(bench: CheckContext, model: nn.Module, shown: Mapping[str, Batch]) -> dict[str, ImageInformation]:
    """What the network knows, by split. Norms are calibrated, on a copy: whether its own work is asked elsewhere."""
    model = copy.deepcopy(model)
    calibrate_norms(model, shown["train"].images[:64])
    found = {}
    for split, batch in shown.items():
        outputs = torch.cat([bench.outputs(model, images) for images in batch.images.split(32)])
        found[split] = knowledge(bench.task, outputs, batch.targets)
    return found


def knowledge(task: Task, outputs: Tensor, targets: Targets) -> ImageInformation:
    """What the answers (N, ...) know of their images, by permuting the targets."""
    own, others = _each(task, outputs, targets), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(PERMUTATIONS):
        order = torch.randperm(len(own), generator=generator).to(own.device)
        others.append(_each(task, outputs, {name: target[order] for name, target in targets.items()}))
    gain = torch.stack(others).nanmean(0) - own
    known = gain.isfinite()
    own, gain = own[known].double(), gain[known].double()
    if len(own) < 2:
        return ImageInformation(math.nan, math.nan, math.nan)
    return ImageInformation(float(own.mean()), float(gain.mean()), float(gain.std()) / len(gain) ** 0.5)


def _each(task: Task, outputs: Tensor, targets: Targets) -> Tensor:
    """(N,) mean loss of each example; NaN where nothing counts."""
    sums, counts = task.losses(outputs, targets, plain=True)
    return sums / torch.where(counts > 0, counts, math.nan)


def output_shape(bench: CheckContext) -> torch.Size:
    """Of the answer for one image."""
    with torch.no_grad():
        return bench.outputs(bench.model(), bench.plain("train", SMALL_BATCH).images[:1]).shape[1:]


def prior_losses(bench: CheckContext, shape: torch.Size, shown: Mapping[str, Batch]) -> dict[str, float]:
    """Mean loss of the best answer that does not look at the image, fitted to the targets of train, by split.

    A constant, learned by itself; for maps one that differs from place to place, coarsely.
    """
    maps = len(shape) == 3
    cells = (shape[0], min(shape[1], PLACES), min(shape[2], PLACES)) if maps else shape
    answer = torch.zeros(1, *cells, device=shown["train"].images.device, requires_grad=True)

    def loss(batch: Batch, most: int) -> Tensor:
        full = nn.functional.interpolate(answer, shape[1:], mode="bilinear") if maps else answer
        targets = {name: target[:most] for name, target in batch.targets.items()}
        return _each(bench.task, full.expand(min(len(batch), most), *shape), targets).nanmean()

    optimizer = torch.optim.LBFGS([answer], max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(shown["train"], FEWEST_JUDGED if maps else JUDGED)
        value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        return {split: float(loss(batch, JUDGED)) for split, batch in shown.items()}
