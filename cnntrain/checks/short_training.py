"""Short trainings of copies of the model, and whether what they learn generalizes to other images.

Two reference losses. The first is the loss of the best predictor that ignores the image (class frequencies, the mean
shape, class frequencies per region of a mask). The second is the loss of the model's own outputs against the targets
of other images: it equals the loss against their own targets if the outputs carry no information about the image.
This is a permutation test (Ojala and Garriga, Permutation Tests for Studying Classifier Performance, JMLR 2010), except
that outputs are compared with permuted targets instead of training on permuted targets.
"""

import copy
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.checks.context import CheckContext, backward, calibrate_norms, evenly_spaced
from cnntrain.randomness import epoch_order
from cnntrain.tasks.task import Targets, Task
from cnntrain.types import Batch

MIN_IMAGES, MIN_IMAGES_PER_CLASS = 256, 16  # of a short training
MIN_IMAGES_WITH_MASKS = 64
MAX_BATCH, MIN_BATCH = 32, 8  # smaller batches learn more per second
MAX_STEP_S = 0.5
MAX_EVAL_IMAGES, MIN_EVAL_IMAGES = 256, 48  # of each split at each evaluation
EVALUATION_S, EVALUATION_SHARE = 1.5, 0.25  # target duration of one evaluation; their share of the time
WARMUP_STEPS = 10
PERMUTATIONS = 8
PRIOR_CELLS = 8  # cells per side of the grid in which a constant prediction of masks may vary


@dataclass(frozen=True)
class ImageInformation:
    """How much a model's outputs depend on the images of a split; means of the evaluation loss over examples."""

    loss: float  # against the examples' own targets
    gain: float  # by how much the loss is larger against the targets of other images
    error: float  # standard error of `gain`

    @property
    def z_score(self) -> float:
        """`gain` in standard errors."""
        return self.gain / max(self.error, 1e-12)


@dataclass
class ShortTraining:
    """A short training in progress."""

    model: nn.Module  # after the last step
    rows: Tensor  # training examples that it is trained on
    batch_size: int
    eval_batches: Mapping[str, Batch]  # the examples of each evaluation, by split
    priors: Mapping[str, float]  # loss of the best predictor that ignores the image, fitted on train, by split
    steps: list[int] = field(default_factory=list)  # the number of steps at each evaluation
    # The result of each evaluation, by split; in eval mode with calibrated norms.
    history: dict[str, list[ImageInformation]] = field(default_factory=lambda: {"train": [], "val": []})

    @property
    def epochs(self) -> float:
        """Passes over the training examples so far."""
        return self.steps[-1] * self.batch_size / len(self.rows)


def without_decay(optimizer: Optimizer) -> Optimizer:
    """Set the weight decay to 0, which has a check of its own, and return the optimizer."""
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    return optimizer


def step_seconds(context: CheckContext) -> float:
    """Return the duration of a training step on 8 images, measured on a copy."""
    if "step seconds" not in context.cache:
        model = context.copy_model().train()
        optimizer, batch = context.make_optimizer(model), context.eval_batch("train", MIN_BATCH)
        for _ in range(2):  # the first one is a warm-up
            started = time.perf_counter()
            _step(context, model, optimizer, batch, 0)
            context.cache["step seconds"] = time.perf_counter() - started
    return context.cache["step seconds"]


def train_briefly(context: CheckContext, learning_rate: float, seconds: float) -> Iterator[ShortTraining]:
    """Train a copy on some training images for `seconds`, and yield the training after each evaluation.

    Uses the configured optimizer without weight decay, a constant learning rate after a short warm-up, and images
    without augmentation.
    """
    ends_at, one_step_s = time.monotonic() + seconds, step_seconds(context)
    model = context.copy_model()
    with torch.no_grad():
        shape = context.outputs(model, context.eval_batch("train", MIN_BATCH).images[:1]).shape[1:]
    count = max(MIN_IMAGES, MIN_IMAGES_PER_CLASS * len(context.spec.classes))
    rows = evenly_spaced(len(context.loaders["train"]), MIN_IMAGES_WITH_MASKS if len(shape) == 3 else count)
    size = max(MIN_BATCH, min(MAX_BATCH, int(MIN_BATCH * MAX_STEP_S / one_step_s)))
    size = min(size, context.plan.batch_size if context.plan.batch_size > 1 else size, len(rows))
    eval_count = max(MIN_EVAL_IMAGES, min(MAX_EVAL_IMAGES, int(EVALUATION_S * MIN_BATCH / one_step_s)))
    optimizer = without_decay(context.make_optimizer(model))
    peak_lr = max(group["peak_lr"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["share"] = group["peak_lr"] / peak_lr if peak_lr else 1.0
    eval_batches = {
        "train": context.train_examples(rows[evenly_spaced(len(rows), eval_count)]),
        "val": context.eval_batch("val", eval_count),
    }
    training = ShortTraining(model, rows, size, eval_batches, prior_losses(context, shape, eval_batches))
    step = epoch = 0
    evaluation_s, evaluated_at = 0.0, time.monotonic()
    while True:
        order = rows[epoch_order(context.plan.seed, epoch, len(rows))]
        for batch_rows in order[: len(order) - len(order) % size].split(size):
            context.stop.check()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["share"] * min((step + 1) / WARMUP_STEPS, 1)
            loss = _step(context, model.train(), optimizer, context.train_examples(batch_rows), step)
            step, now = step + 1, time.monotonic()
            last = now > ends_at or not math.isfinite(loss)
            due = now - evaluated_at >= evaluation_s * (1 / EVALUATION_SHARE - 1)
            if last or (step >= WARMUP_STEPS and due):
                training.steps.append(step)
                for split, information in evaluate(context, model, eval_batches).items():
                    training.history[split].append(information)
                yield training
                evaluation_s, evaluated_at = time.monotonic() - now, time.monotonic()
            if last:
                return
        epoch += 1


def _step(context: CheckContext, model: nn.Module, optimizer: Optimizer, batch: Batch, step: int) -> float:
    """Train on one batch with the evaluation loss (no label smoothing, no class weights); return the loss."""
    context.reseed("short training", step)
    loss = context.mean_loss(context.outputs(model, batch.images), batch.targets, training=False)
    optimizer.zero_grad(set_to_none=True)
    if loss.requires_grad:
        backward(loss, model, context.compute)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate(context: CheckContext, model: nn.Module, batches: Mapping[str, Batch]) -> dict[str, ImageInformation]:
    """Return the image information of a model by split, measured on a copy with calibrated norms.

    `batch norm gap` checks the model's own running statistics.
    """
    model = copy.deepcopy(model)
    calibrate_norms(model, batches["train"].images[:64])
    results = {}
    for split, batch in batches.items():
        outputs = torch.cat([context.outputs(model, images) for images in batch.images.split(32)])
        results[split] = image_information(context.task, outputs, batch.targets)
    return results


def image_information(task: Task, outputs: Tensor, targets: Targets) -> ImageInformation:
    """Compare the loss of outputs (N, ...) against their own targets with that against permuted targets."""
    own, permuted = _example_losses(task, outputs, targets), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(PERMUTATIONS):
        order = torch.randperm(len(own), generator=generator).to(own.device)
        shuffled = {name: target[order] for name, target in targets.items()}
        permuted.append(_example_losses(task, outputs, shuffled))
    gain = torch.stack(permuted).nanmean(0) - own
    finite = gain.isfinite()
    own, gain = own[finite].double(), gain[finite].double()
    if len(own) < 2:
        return ImageInformation(math.nan, math.nan, math.nan)
    return ImageInformation(float(own.mean()), float(gain.mean()), float(gain.std()) / len(gain) ** 0.5)


def _example_losses(task: Task, outputs: Tensor, targets: Targets) -> Tensor:
    """Return the mean loss of each example, (N,); NaN for examples without a target."""
    sums, counts = task.losses(outputs, targets, training=False)
    return sums / torch.where(counts > 0, counts, math.nan)


def prior_losses(context: CheckContext, shape: torch.Size, batches: Mapping[str, Batch]) -> dict[str, float]:
    """Return the mean loss of the best constant output by split, fitted to the targets of train.

    For maps (K, H, W) the output may vary over a coarse grid.
    """
    maps = len(shape) == 3
    cells = (shape[0], min(shape[1], PRIOR_CELLS), min(shape[2], PRIOR_CELLS)) if maps else shape
    constant = torch.zeros(1, *cells, device=batches["train"].images.device, requires_grad=True)

    def loss(batch: Batch, most: int) -> Tensor:
        full = nn.functional.interpolate(constant, shape[1:], mode="bilinear") if maps else constant
        targets = {name: target[:most] for name, target in batch.targets.items()}
        outputs = full.expand(min(len(batch), most), *shape)
        return _example_losses(context.task, outputs, targets).nanmean()

    optimizer = torch.optim.LBFGS([constant], max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(batches["train"], MIN_EVAL_IMAGES if maps else MAX_EVAL_IMAGES)
        value.backward()
        return value

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        return {split: float(loss(batch, MAX_EVAL_IMAGES)) for split, batch in batches.items()}
