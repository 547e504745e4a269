"""Are the images what the network should see? Normalized, laid out rightly, none blank, validation left alone."""

import contextlib

import torch
from torch import Tensor, nn

from cnntrain.augment.color import normalize
from cnntrain.checks.context import CheckContext
from cnntrain.checks.verdicts import failed, passed, skipped, some, warned
from cnntrain.train.hooks import attached
from cnntrain.types import Finding

NORMAL_MEAN, NORMAL_STD = 0.75, (0.4, 2.0)  # what a channel's mean and deviation may be; beyond: WARN
ABSURD_MEAN, ABSURD_STD = 1.5, (0.2, 2.2)  # beyond: FAIL
SMOOTHER = 0.7  # part of the roughness that a right order of the axes leaves
LOOKED_AT = 1024  # images of a split that are looked at for blank ones
BLANK = 0.5  # standard deviation of the pixels of a blank image, in gray levels of 255


def normalized_inputs(bench: CheckContext) -> Finding:
    """What reaches the first layer with weights has about mean 0 and deviation 1 in every channel."""
    batch = bench.plain()
    seen = first_input(bench.model(), batch.images)
    if seen is None or not seen.is_floating_point():
        return skipped("no layer with weights takes the images as they are")
    channels = (
        seen.float().movedim(1, -1).reshape(-1, seen.shape[1])
        if seen.ndim == 4
        else seen.float().reshape(-1, 1)
    )
    changing = batch.images.float().movedim(1, -1).reshape(-1, batch.images.shape[1]).std(0) > 1e-6
    if seen.ndim == 4 and len(changing) == channels.shape[1]:
        channels = channels[:, changing.to(channels.device)]
    if channels.shape[1] == 0:
        return skipped("every channel is constant; see blank images")
    mean, low, high = _mean_and_stds(channels)
    bordered = _dark_borders(batch.images, bench)
    if not _is_normal(mean, low, high) and seen.shape == batch.images.shape and bool(bordered.any()):
        # Mean and standard deviation are those of the images, without letterbox borders.
        pixels = seen.float().movedim(1, -1)[~bordered]
        pixels = pixels[:, changing.to(pixels.device)] if len(changing) == pixels.shape[1] else pixels
        inner = _mean_and_stds(pixels) if len(pixels) > 1 else (mean, low, high)
        mean, low, high = inner if _is_normal(*inner) else (mean, low, high)
    evidence = f"mean {mean:.2f}, standard deviation {low:.2f} to {high:.2f} at the first layer with weights"
    if _is_normal(mean, low, high):
        return passed(evidence)
    if high > 20:
        cause = "pixels from 0 to 255 reach the network: nothing divides them by 255 and normalizes them"
    elif high > NORMAL_STD[1]:
        cause = "they are normalized twice, once by the pipeline and once more in the data or the model"
    elif float(channels.min()) >= 0 and float(channels.max()) <= 1:
        cause = "they are on the scale from 0 to 1 and not normalized"
    else:
        cause = "mean and standard deviation are those of other images, or something scales them once more"
    remedy = "let the pipeline alone normalize: uint8 from the data, true mean and std in its spec, none in the model"
    absurd = abs(mean) > ABSURD_MEAN or low < ABSURD_STD[0] or high > ABSURD_STD[1]
    return (failed if absurd else warned)(evidence, cause, remedy, "data", "model")


def _mean_and_stds(channels: Tensor) -> tuple[float, float, float]:
    """Of (N, C): the mean that is farthest from 0, the smallest and the largest standard deviation of a channel."""
    means, stds = channels.mean(0), channels.std(0)
    return float(means[means.abs().argmax()]), float(stds.min()), float(stds.max())


def _is_normal(mean: float, low: float, high: float) -> bool:
    return abs(mean) <= NORMAL_MEAN and low >= NORMAL_STD[0] and high <= NORMAL_STD[1]


def _dark_borders(images: Tensor, bench: CheckContext) -> Tensor:
    """(N, H, W) bool: rows and columns at the edges of normalized images (N, C, H, W) that are all black."""
    zero = torch.zeros(1, images.shape[1], 1, 1, device=images.device)
    dark = (images - normalize(zero, bench.pipeline.mean, bench.pipeline.std)).abs().amax(1) < 1e-3
    border = torch.zeros_like(dark)
    for dim in (1, 2):
        line = dark.all(3 - dim).int()
        edge = line.cumprod(1) | line.flip(1).cumprod(1).flip(1)
        border |= edge.bool().unsqueeze(3 - dim)
    return border


class _SeenError(Exception):
    """Ends a forward pass: what was wanted has come by."""


def first_input(model: nn.Module, images: Tensor) -> Tensor | None:
    """What the first layer with weights of its own is given for `images`; None where none is called."""
    caught: list[Tensor] = []

    def look(module: nn.Module, arguments: tuple[object, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            caught.append(arguments[0].detach())
            raise _SeenError

    hooks = [
        module.register_forward_pre_hook(look)
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    with attached(hooks), torch.no_grad(), contextlib.suppress(_SeenError):
        model(images)
    return caught[0] if caught else None


def layout(bench: CheckContext) -> Finding:
    """Neighbors look alike: no other order of the axes makes the images much smoother."""
    images = bench.stored(count=64).images.float()
    if (images.std(dim=(2, 3)) > 0).sum() < 1:
        return skipped("the images are blank")
    count, channels, height, width = images.shape
    others: dict[str, Tensor] = {}
    if channels > 1:
        others["height, width and channels were reshaped where a permute belongs"] = images.reshape(
            count, height, width, channels
        ).movedim(-1, 1)
        others["channels, height and width were reshaped where a permute belongs"] = images.movedim(
            1, -1
        ).reshape(count, channels, height, width)
    if height != width:
        others["rows and columns were reshaped where a transpose belongs"] = images.reshape(
            count, channels, width, height
        ).mT
    if not others:
        return skipped("square images of one channel have no other order to compare with")
    own = roughness(images)
    cause, other = min(((cause, roughness(each)) for cause, each in others.items()), key=lambda pair: pair[1])
    evidence = (
        f"neighbors differ by {own:.2f} of the images' deviation; {other:.2f} in another order of the axes"
    )
    if other < SMOOTHER * own:
        return failed(
            evidence, cause, "permute the axes to (channels, height, width) where the data are read", "data"
        )
    return passed(evidence)


def roughness(images: Tensor) -> float:
    """Mean difference of neighboring pixels of (N, C, H, W), beside the deviation of all of them."""
    down, right = images.diff(dim=2).abs().mean(), images.diff(dim=3).abs().mean()
    return float((down + right) / 2 / images.std().clamp(min=1e-6))


def blank_images(bench: CheckContext) -> Finding:
    """Images show something, and not the same again and again."""
    notes: list[str] = []
    worst = 0.0
    names: list[str] = []
    for split, loader in bench.loaders.items():
        batch = bench.stored(split, LOOKED_AT)
        flat = batch.images.flatten(1).float()
        blank = flat.std(1) < BLANK
        distinct = len(torch.unique(flat, dim=0)) / len(flat)
        notes.append(f"{split} {int(blank.sum())} of {len(flat)} blank, {100 * distinct:.0f} % distinct")
        worst = max(worst, float(blank.float().mean()), 1 - distinct if len(flat) > 1 else 0.0)
        names += [loader.examples.names[int(i)] for i in batch.index[blank.cpu()]]
    evidence = "; ".join(notes)
    if worst > 0.5:
        shown = f" ({some(names)})" if names else ""
        return failed(
            evidence, f"most images are blank or the same{shown}", "look at how they are read", "data"
        )
    if names or worst > 0.1:
        shown = f"blank: {some(names)}" if names else "many images come more than once"
        return warned(evidence, shown, "look at these files, and leave out what shows nothing", "data")
    return passed(evidence)


def validation_is_plain(bench: CheckContext) -> Finding:
    """Validation images are the same whenever they are looked at, and only normalized."""
    loader = bench.loaders["val"]
    rows = torch.linspace(0, len(loader) - 1, min(64, len(loader))).round().long().unique()
    first = next(loader.batches(rows, len(rows)))
    again = next(loader.batches(rows, len(rows)))
    backwards = next(loader.batches(rows.flip(0), len(rows)))
    if not (torch.equal(first.images, again.images) and torch.equal(first.images, backwards.images.flip(0))):
        evidence = f"{len(rows)} validation images differ from one look to the next"
        cause = "the data set changes its images at random: validation is augmented too"
        return failed(
            evidence, cause, "augment by augment=, which leaves validation alone", "data", "augment"
        )
    plain, twice = bench.pipeline.eval_transform(first), bench.pipeline.eval_transform(again)
    if not torch.equal(plain.images, twice.images):
        cause = "the pipeline changes validation images at random"
        return failed(
            "plain images differ from one look to the next", cause, "report this as a bug", "augment"
        )
    return passed(f"{len(rows)} images: the same bits twice, and in another order")


def augmentation(bench: CheckContext) -> Finding:
    """Augmented images still show what their targets say."""
    pipeline = bench.pipeline
    if not pipeline.augmentations:
        return skipped("augment=none")
    if pipeline.per_sample:
        return skipped(f"{some(list(pipeline.per_sample))} are applied where workers decode")
    if pipeline.can_flip and not bench.spec.hflip_ok:
        mirroring = [key for key, item in pipeline.augmentations.items() if getattr(item, "can_flip", False)]
        return warned(
            f"augment.{mirroring[0]} mirrors the images", "mirrored digits or letters mean something else",
            f"take it out: '~augment.{mirroring[0]}', or choose another augment=", f"augment.{mirroring[0]}", "data",
        )  # fmt: skip
    batch = bench.augmented(128)
    limit = 0.02 * float(bench.plain(count=128).images.float().std())
    blank = float((batch.images.float().flatten(1).std(1) < limit).float().mean())
    parts = [f"{100 * blank:.0f} % of 128 augmented images are blank"]
    kept = 1.0
    if "valid" in batch.targets:
        before = float(bench.stored(count=128).targets["valid"].float().mean())
        kept = float(batch.targets["valid"].float().mean()) / max(before, 1e-9)
        parts.append(f"{100 * kept:.0f} % of the points stay valid")
    if "mask" in batch.targets:
        after, before = (
            float((each.targets["mask"] != pipeline.spec.mask_fill).float().mean())
            for each in (batch, bench.stored(count=128))
        )
        kept = after / before if before else 1.0
        parts.append(f"{100 * kept:.0f} % of the labeled pixels stay")
    evidence = ", ".join(parts)
    keys = tuple(f"augment.{key}" for key in pipeline.augmentations)
    if blank > 0.05:
        return failed(
            evidence, "an augmentation wipes images out", "weaken it; `cnntrain preview` shows it", *keys
        )
    if kept < 0.5:
        cause = "an augmentation moves half of what is to be learned off the canvas"
        return warned(evidence, cause, "weaken it; `cnntrain preview` shows it", *keys)
    return passed(evidence)
