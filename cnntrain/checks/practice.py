"""Copies made ready for a check: norms that know the images, and a few real training steps."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.checks.context import CheckContext
from cnntrain.checks.overfit import backward, calibrate_norms

PRACTICE_IMAGES = 16  # of a batch
CAREFUL = 1e-3  # learning rate of Adam
USUAL_PIXELS = 64 * 64


def few(bench: CheckContext, most: int, least: int = 8) -> int:
    """How many images are quickly computed on: `most` of up to 64 px, fewer of larger ones."""
    height, width = bench.pipeline.output_size
    return min(most, max(most * USUAL_PIXELS // (height * width), least))


def calibrated(bench: CheckContext, images: Tensor) -> nn.Module:
    """A copy in eval mode whose BatchNorms have the statistics of `images`; as it is where the weights are trained.

    Fresh statistics (mean 0, variance 1) say nothing about how a network begins: its first step uses the batch's.
    """
    model = bench.model()
    if not bench.trained:
        calibrate_norms(model, images)
    return model


def practice(
    bench: CheckContext,
    model: nn.Module,
    optimizer: Optimizer,
    steps: int,
    look: Callable[[int], None] | None = None,
) -> list[float]:
    """Train `model` a few steps as the run would, on augmented batches; the loss before each. Ends in eval mode.

    Stops early where the loss is not finite or has no gradient.

    Args:
        look: called with the step's number when the gradients are there, before the optimizer's step.
    """
    count = min(PRACTICE_IMAGES, bench.plan.batch_size if bench.plan.batch_size > 1 else PRACTICE_IMAGES)
    sample, losses = bench.augmented(count * steps), []
    batches = max(len(sample) // count, 1)
    model.train()
    for step in range(steps):
        start = step % batches * count
        bench.reseed("practice", step)
        optimizer.zero_grad(set_to_none=True)
        loss = bench.loss(model, sample.take(slice(start, start + count)))
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]) or not loss.requires_grad:
            break
        backward(loss, model, bench.compute)
        if look is not None:
            look(step)
        optimizer.step()
    model.eval()
    return losses


def practiced(bench: CheckContext, images: Tensor, steps: int) -> nn.Module:
    """A calibrated copy after a few careful steps: what starts at zero has left it, whatever the learning rate."""
    model = bench.model()
    practice(bench, model, torch.optim.Adam(trainable(model).values(), lr=CAREFUL), steps)
    if not bench.trained:
        calibrate_norms(model, images)
    return model


def difference(outputs: Tensor) -> float:
    """How much the answers (N, ...) differ from image to image, beside their size; 0 where all are alike."""
    flat = outputs.detach().float().flatten(1)
    size = float(flat.square().mean().sqrt())
    return float(flat.std(dim=0, correction=0).square().mean().sqrt()) / size if size > 0 else 0.0


def distance(one: Tensor, other: Tensor) -> float:
    """How far two answers of one shape are apart, beside the size of the first."""
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    return float((one - other).norm() / one.norm().clamp(min=1e-12))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
