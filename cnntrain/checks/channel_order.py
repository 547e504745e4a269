"""Do the colors come in the order from which the weights were learned?"""

import math

import torch
from torch import Tensor, nn

from cnntrain.checks.context import CheckContext
from cnntrain.checks.practice import few
from cnntrain.checks.verdicts import passed, skipped, warned
from cnntrain.train.hooks import attached
from cnntrain.types import Finding

IMAGES = 256
NEARER = 0.8  # how far the exchanged are from what was learned, beside the images as they are: below is told
USUAL = 0.25  # nats: images farther from what was learned are of another kind in either order
COLORS = 3
Norm = nn.modules.batchnorm._BatchNorm


def channel_order(bench: CheckContext) -> Finding:
    """Learned norms find their images more usual as they are than with red and blue exchanged (RGB, not BGR)."""
    learned = bench.trained or any(hasattr(module, "pretrained_from") for module in bench.network.modules())
    if not learned:
        return skipped("nothing was learned from one order of the channels")
    if bench.spec.channels != COLORS:
        return skipped(f"{bench.spec.channels} channels")
    count = few(bench, IMAGES)
    images = (
        bench.augmented(count) if bench.trained else bench.plain(count=count)
    ).images  # as they were learned
    model = bench.model()
    as_is, exchanged = activation_kl(model, images), activation_kl(model, images.flip(1))
    if not as_is:
        return skipped("no norm keeps statistics of what it learned from")
    deep = range(len(as_is) - max(len(as_is) // 3, 1), len(as_is))
    ratio = math.exp(math.fsum(math.log(exchanged[i] / as_is[i]) for i in deep) / len(deep))
    evidence = (
        f"with red and blue exchanged, activations are {ratio:.2f} times as far from what the norms learned"
    )
    if ratio >= NEARER or math.fsum(exchanged[i] for i in deep) / len(deep) > USUAL:
        return passed(evidence)
    cause = "the images come as BGR and the weights were learned from RGB, or the other way round"
    return warned(
        evidence, cause, "read RGB: image[..., ::-1] of what OpenCV reads", "data", "model.pretrained"
    )


@torch.no_grad()
def activation_kl(model: nn.Module, images: Tensor) -> list[float]:
    """How far a batch's statistics are from the running ones: for each norm in running order, the mean over channels.

    The Kullback-Leibler divergence of two normal distributions: of what arrives, from what was learned.

    Args:
        model: in eval mode; images: (N, C, H, W) normalized.
    """
    found: list[float] = []

    def look(norm: Norm, values: tuple[Tensor, ...]) -> None:
        if norm.running_mean is None or norm.running_var is None:
            return
        dims = [0, *range(2, values[0].ndim)]
        mean, variance = values[0].double().mean(dims), values[0].double().var(dims, correction=0)
        known = norm.running_var.double() + norm.eps
        ratio = (variance + norm.eps) / known
        each = 0.5 * (ratio - 1 - ratio.log() + (mean - norm.running_mean).square() / known)
        found.append(max(float(each.mean()), 1e-9))

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, Norm)]
    with attached(hooks):
        model(images)
    return found
