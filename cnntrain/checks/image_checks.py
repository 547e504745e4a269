"""Checks of the images: normalization, memory layout, channel order, blank images, validation, augmentation."""

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from cnntrain.augment.color import normalize
from cnntrain.checks.context import CheckContext, evenly_spaced, failed, join_names, passed, skipped, warned
from cnntrain.train.nonfinite import attached
from cnntrain.types import Finding

WARN_MEAN, WARN_STD = 0.75, (0.4, 2.0)  # absolute mean and standard deviation of a channel; outside: WARN
FAIL_MEAN, FAIL_STD = 1.5, (0.2, 2.2)  # outside: FAIL
SMOOTHER = 0.7  # ratio of roughness below which another axis order is considered the right one
BLANK_SAMPLE = 1024  # images per split
BLANK_STD = 0.5  # standard deviation over the pixels, in gray levels of 255
BLANK_SHARE, DUPLICATE_SHARE = 0.5, 0.1  # of a split: FAIL, WARN
AUGMENTED_IMAGES = 128
CHANNEL_ORDER_IMAGES = 256
SWAPPED_KL_RATIO = 0.8  # KL divergence with swapped channels, relative to that of the images as they are
MAX_KL = 0.25  # nats; images that are farther from the training statistics in either order are of another kind
RGB_CHANNELS = 3
PREVIEW = "weaken it; `cnntrain preview` shows its effect"
BatchNorm = nn.modules.batchnorm._BatchNorm


def normalized_inputs(context: CheckContext) -> Finding:
    """Check that each channel has about mean 0 and standard deviation 1 at the first layer with weights."""
    batch = context.eval_batch()
    inputs = first_input(context.copy_model(), batch.images)
    if inputs is None or not inputs.is_floating_point():
        return skipped("no layer with weights gets floating-point images")
    inputs = inputs.float()
    pixels = inputs.movedim(1, -1) if inputs.ndim == 4 else inputs[..., None]  # (N, H, W, C)
    varies = batch.images.float().movedim(1, -1).flatten(0, -2).std(0) > 1e-6
    if inputs.ndim == 4 and len(varies) == pixels.shape[-1]:
        pixels = pixels[..., varies]
    if pixels.shape[-1] == 0:
        return skipped("every channel is constant; see blank images")
    mean, low, high = _mean_and_stds(pixels.flatten(0, -2))
    borders = _black_borders(batch.images, context)
    # The dataset statistics exclude letterbox borders.
    if not _is_normal(mean, low, high) and inputs.shape == batch.images.shape and (~borders).sum() > 1:
        inner = _mean_and_stds(pixels[~borders])
        mean, low, high = inner if _is_normal(*inner) else (mean, low, high)
    evidence = f"mean {mean:.2f}, standard deviation {low:.2f} to {high:.2f} at the first layer with weights"
    if _is_normal(mean, low, high):
        return passed(evidence)
    if high > 20:
        cause = "the pixels are in the range 0 to 255: nothing scales and normalizes them"
    elif high > WARN_STD[1]:
        cause = "the images are normalized twice: by the pipeline, and again in the dataset or the model"
    elif pixels.min() >= 0 and pixels.max() <= 1:
        cause = "the images are in the range 0 to 1, but not normalized"
    else:
        cause = "mean and std belong to other images, or the images are scaled again"
    remedy = "let only the pipeline normalize: the dataset gives uint8 images and their mean and std"
    absurd = abs(mean) > FAIL_MEAN or low < FAIL_STD[0] or high > FAIL_STD[1]
    return (failed if absurd else warned)(evidence, cause, remedy, "data", "model")


def _mean_and_stds(channels: Tensor) -> tuple[float, float, float]:
    """Return the channel mean farthest from 0, and the smallest and largest channel standard deviation of (N, C)."""
    means, stds = channels.mean(0), channels.std(0)
    return float(means[means.abs().argmax()]), float(stds.min()), float(stds.max())


def _is_normal(mean: float, low: float, high: float) -> bool:
    return abs(mean) <= WARN_MEAN and low >= WARN_STD[0] and high <= WARN_STD[1]


def _black_borders(images: Tensor, context: CheckContext) -> Tensor:
    """Return a mask (N, H, W) of the black rows and columns at the edges of normalized images (N, C, H, W)."""
    zero = torch.zeros(1, images.shape[1], 1, 1, device=images.device)
    black = (images - normalize(zero, context.pipeline.mean, context.pipeline.std)).abs().amax(1) < 1e-3
    border = torch.zeros_like(black)
    for dim in (1, 2):
        line = black.all(dim, keepdim=True).int()
        border |= (line.cumprod(3 - dim) | line.flip(3 - dim).cumprod(3 - dim).flip(3 - dim)).bool()
    return border


class _StopForwardError(Exception):
    """Ends a forward pass early."""


def first_input(model: nn.Module, images: Tensor) -> Tensor | None:
    """Return the input of the first layer with its own parameters; None if no such layer is called."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, arguments: tuple[object, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            caught.append(arguments[0].detach())
            raise _StopForwardError

    hooks = [
        module.register_forward_pre_hook(catch)
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    with attached(hooks), torch.no_grad(), contextlib.suppress(_StopForwardError):
        model(images)
    return caught[0] if caught else None


def layout(context: CheckContext) -> Finding:
    """Check that no other axis order makes the images much smoother."""
    images = context.stored_batch(count=64).images.float()
    if not (images.std(dim=(2, 3)) > 0).any():
        return skipped("the images are blank")
    n, c, h, w = images.shape
    others: dict[str, Tensor] = {}
    if c > 1:
        others["(height, width, channels) was reshaped instead of permuted"] = images.reshape(n, h, w, c).movedim(-1, 1)
        others["(channels, height, width) was reshaped instead of permuted"] = images.movedim(1, -1).reshape(n, c, h, w)
    if h != w:
        others["rows and columns were reshaped instead of transposed"] = images.reshape(n, c, w, h).mT
    if not others:
        return skipped("square images with one channel have no other axis order to compare with")
    own = roughness(images)
    other, cause = min((roughness(each), cause) for cause, each in others.items())
    evidence = f"difference of neighboring pixels: {own:.2f} standard deviations, {other:.2f} with another axis order"
    if other < SMOOTHER * own:
        remedy = "permute the axes to (channels, height, width) where the dataset reads the images"
        return failed(evidence, cause, remedy, "data")
    return passed(evidence)


def roughness(images: Tensor) -> float:
    """Return the mean absolute difference of neighboring pixels of (N, C, H, W), in standard deviations."""
    down, right = images.diff(dim=2).abs().mean(), images.diff(dim=3).abs().mean()
    return float((down + right) / 2 / images.std().clamp(min=1e-6))


def channel_order(context: CheckContext) -> Finding:
    """Check that pretrained BatchNorms match the images better as they are than with red and blue swapped."""
    if not context.trained and not any(hasattr(m, "pretrained_from") for m in context.model.modules()):
        return skipped("the weights are not pretrained, so the channel order does not matter")
    if context.spec.channels != RGB_CHANNELS:
        return skipped(f"the images have {context.spec.channels} channels")
    count = context.image_count(CHANNEL_ORDER_IMAGES)
    # Compare with the images that the running statistics come from.
    batch = context.augmented_batch(count) if context.trained else context.eval_batch(count=count)
    model = context.copy_model()
    original, swapped = activation_kl(model, batch.images), activation_kl(model, batch.images.flip(1))
    if not original:
        return skipped("no layer has running statistics")
    deepest = range(len(original) - max(len(original) // 3, 1), len(original))
    ratio = math.exp(math.fsum(math.log(swapped[i] / original[i]) for i in deepest) / len(deepest))
    evidence = f"KL divergence from the running statistics: {ratio:.2f} times as large with red and blue swapped"
    if ratio >= SWAPPED_KL_RATIO or math.fsum(swapped[i] for i in deepest) / len(deepest) > MAX_KL:
        return passed(evidence)
    cause = "the images are BGR, but the weights were trained on RGB images, or the other way round"
    remedy = "read the images as RGB (OpenCV reads BGR: reverse with image[..., ::-1])"
    return warned(evidence, cause, remedy, "data", "model.pretrained")


@torch.no_grad()
def activation_kl(model: nn.Module, images: Tensor) -> list[float]:
    """Return, for each BatchNorm in execution order, how far its input is from its running statistics, in nats.

    This is the KL divergence of two normal distributions (batch from running statistics), averaged over the channels.

    Args:
        model: in eval mode.
        images: (N, C, H, W), normalized.
    """
    divergences: list[float] = []

    def measure(norm: BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        if norm.running_mean is None or norm.running_var is None:
            return
        variance, mean = torch.var_mean(inputs[0].double(), [0, *range(2, inputs[0].ndim)], correction=0)
        batch = Normal(mean, (variance + norm.eps).sqrt())
        running = Normal(norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt())
        divergences.append(max(float(kl_divergence(batch, running).mean()), 1e-9))

    hooks = [m.register_forward_pre_hook(measure) for m in model.modules() if isinstance(m, BatchNorm)]
    with attached(hooks):
        model(images)
    return divergences


def blank_images(context: CheckContext) -> Finding:
    """Check that images are not blank, and not all the same."""
    counts, blank_names, worst = list[str](), list[str](), 0.0
    for split, loader in context.loaders.items():
        batch = context.stored_batch(split, BLANK_SAMPLE)
        flat = batch.images.flatten(1).float()
        blank = flat.std(1) < BLANK_STD
        distinct = len(torch.unique(flat, dim=0)) / len(flat)
        counts.append(f"{split} {int(blank.sum())} of {len(flat)} blank, {100 * distinct:.0f} % distinct")
        worst = max(worst, float(blank.float().mean()), 1 - distinct if len(flat) > 1 else 0.0)
        blank_names += [loader.examples.names[int(i)] for i in batch.index[blank.cpu()]]
    evidence = "; ".join(counts)
    if worst > BLANK_SHARE:
        shown = f" ({join_names(blank_names)})" if blank_names else ""
        return failed(evidence, f"most images are blank or identical{shown}", "check how they are read", "data")
    if blank_names or worst > DUPLICATE_SHARE:
        cause = f"blank: {join_names(blank_names)}" if blank_names else "many images are duplicates"
        return warned(evidence, cause, "look at these files, and remove useless ones", "data")
    return passed(evidence)


def validation_is_constant(context: CheckContext) -> Finding:
    """Check that validation images are the same each time they are read."""
    loader, transform = context.loaders["val"], context.pipeline.eval_transform
    rows = evenly_spaced(len(loader), 64)
    batches = [next(loader.batches(each, len(rows))) for each in (rows, rows, rows.flip(0))]
    first, second, reverse = (transform(batch).images for batch in batches)
    if not (torch.equal(first, second) and torch.equal(first, reverse.flip(0))):
        evidence = f"{len(rows)} validation images differ each time they are read"
        cause = "the dataset changes its images at random, so validation is augmented too"
        remedy = "augment with augment=, which does not affect validation"
        return failed(evidence, cause, remedy, "data", "augment")
    return passed(f"{len(rows)} images are identical when read twice, and in reverse order")


def augmentation(context: CheckContext) -> Finding:
    """Check that augmented images still show what their targets describe."""
    pipeline = context.pipeline
    if not pipeline.augmentations:
        return skipped("no augmentation (augment=none)")
    if pipeline.per_sample:
        return skipped(f"{join_names(list(pipeline.per_sample))} runs in the workers that decode the images")
    if pipeline.can_flip and not context.spec.hflip_ok:
        flips = (name for name, item in pipeline.augmentations.items() if getattr(item, "can_flip", False))
        key = f"augment.{next(flips)}"
        cause = "flipped digits or letters have another meaning"
        remedy = f"remove it with '~{key}', or choose another augment="
        return warned(f"{key} flips the images", cause, remedy, key, "data")
    batch = context.augmented_batch(AUGMENTED_IMAGES)
    original = context.stored_batch(count=AUGMENTED_IMAGES)
    limit = 0.02 * float(context.eval_batch(count=AUGMENTED_IMAGES).images.float().std())
    blank = float((batch.images.float().flatten(1).std(1) < limit).float().mean())
    parts = [f"{100 * blank:.0f} % of {AUGMENTED_IMAGES} augmented images are blank"]
    kept = 1.0
    if "valid" in batch.targets:
        before = float(original.targets["valid"].float().mean())
        kept = float(batch.targets["valid"].float().mean()) / max(before, 1e-9)
        parts.append(f"{100 * kept:.0f} % of the valid keypoints stay inside the image")
    if "mask" in batch.targets:
        labeled = [each.targets["mask"] != pipeline.spec.mask_fill for each in (batch, original)]
        after, before = (float(each.float().mean()) for each in labeled)
        kept = after / before if before else 1.0
        parts.append(f"{100 * kept:.0f} % of the labeled pixels stay inside the image")
    evidence = ", ".join(parts)
    keys = tuple(f"augment.{key}" for key in pipeline.augmentations)
    if blank > 0.05:
        return failed(evidence, "an augmentation erases whole images", PREVIEW, *keys)
    if kept < 0.5:
        return warned(evidence, "an augmentation moves half of the targets out of the image", PREVIEW, *keys)
    return passed(evidence)
