"""Checks of the targets: labels, keypoints, masks and flip pairs."""

import torch

from cnntrain.checks.context import CheckContext, failed, join_names, passed, skipped, warned
from cnntrain.checks.flip import MAX_EXAMPLES, MIN_EXAMPLES, diagnose_flip, measure_symmetry
from cnntrain.types import Finding

MAX_IMBALANCE = 50.0  # ratio of the most frequent class to the rarest
MIN_EXTENT = 0.03  # extent of all keypoints, relative to the image
MASKS = 512
MASK_REMEDY = "check data.ignore_index and the masks"


def classes(context: CheckContext) -> Finding:
    """Check that every class has training examples, and that none is rare. (Loading the data checks the labels.)"""
    names = context.spec.classes
    if context.spec.keypoints or "label" not in context.loaders["train"].examples.targets:
        return skipped("this dataset has no class labels")
    counts = torch.bincount(context.loaders["train"].examples.targets["label"], minlength=len(names))
    evidence = f"{len(names)} classes with {int(counts.min())} to {int(counts.max())} training examples each"
    if (counts == 0).any():
        missing = join_names([names[int(i)] for i in (counts == 0).nonzero()])
        cause, remedy = f"no training examples of {missing}", "add examples, or remove the class"
        if context.config["data"].get("limit") is not None:
            return warned(evidence, f"{cause}: data.limit leaves few examples", remedy, "data", "data.limit")
        return failed(evidence, cause, remedy, "data")
    if counts.max() > MAX_IMBALANCE * counts.min():
        cause = f"{names[int(counts.argmin())]} is rare: a model that never predicts it is almost always right"
        remedy = "try task.class_weights=balanced, and look at the confusion matrix"
        return warned(evidence, cause, remedy, "task.class_weights")
    return passed(evidence)


def points(context: CheckContext) -> Finding:
    """Check that keypoints are (x, y) in pixels, inside the image, and not all in one place."""
    if not context.spec.keypoints:
        return skipped("this dataset has no keypoints")
    examples = context.loaders["train"].examples
    coordinates, valid = examples.targets["points"].float(), examples.targets["valid"].bool()
    height, width = context.spec.image_size
    valid_points = coordinates[valid]
    low, high = valid_points.quantile(0.01, dim=0), valid_points.quantile(0.99, dim=0)
    share = float(valid.float().mean())
    evidence = (
        f"{100 * share:.0f} % of the keypoints are valid; x from {low[0]:.0f} to {high[0]:.0f} of {width} px, y from "
        f"{low[1]:.0f} to {high[1]:.0f} of {height} px"
    )
    if float((high - low).max()) < MIN_EXTENT * max(height, width):
        cause = "all keypoints are in one place: they are not in pixels, but normalized (0 to 1, or -1 to 1)"
        return failed(evidence, cause, "give them in pixels of the image; the task normalizes them", "data")
    pairs = context.spec.flip_pairs
    if pairs is not None and len(coordinates) >= MIN_EXAMPLES and len(pairs) == len(context.spec.keypoints):
        xy, yx = (measure_symmetry(each, valid, pairs).swapped for each in (coordinates, coordinates.flip(-1)))
        evidence += f"; distance from the mirrored shape {xy:.2f}, with x and y exchanged {yx:.2f}"
        if yx < 0.5 * xy:
            cause = "the keypoints are (y, x): the shapes are symmetric about a horizontal axis"
            return failed(evidence, cause, "exchange the two columns", "data")
    if share < 0.5:
        cause = "most keypoints are unlabeled or outside their images"
        return warned(evidence, cause, "look at them with `cnntrain preview`", "data")
    return passed(evidence)


def masks(context: CheckContext) -> Finding:
    """Check that masks contain valid class ids, and that every class occurs in training."""
    batch = context.stored_batch(count=MASKS)
    if "mask" not in batch.targets:
        return skipped("this dataset has no masks")
    names, ignore = context.spec.classes, context.spec.ignore_index
    counts = torch.bincount(batch.targets["mask"].flatten().long().cpu(), minlength=256)
    total = int(counts.sum())
    unlabeled = 0
    if ignore is not None:
        unlabeled, counts[ignore] = int(counts[ignore]), 0
    unknown = [i for i in counts.nonzero().flatten().tolist() if i >= len(names)]
    evidence = f"{len(names)} classes in {len(batch)} masks, {100 * unlabeled / total:.0f} % of the pixels unlabeled"
    if unknown:
        cause = f"the masks contain ids that are not classes: {join_names([str(i) for i in unknown])}"
        remedy = "add them to data.classes, or map them to data.ignore_index"
        return failed(evidence, cause, remedy, "data.classes")
    if total == unlabeled:
        return failed(evidence, "no pixel is labeled", MASK_REMEDY, "data.ignore_index")
    if missing := [name for name, count in zip(names, counts, strict=False) if not count]:
        remedy = "check whether these classes occur at all"
        return warned(evidence, f"no pixel of {join_names(missing)}", remedy, "data")
    if unlabeled > 0.9 * total:
        return warned(evidence, "hardly any pixel is labeled", MASK_REMEDY, "data")
    return passed(evidence)


def flip(context: CheckContext) -> Finding:
    """Check the flip pairs; `cnntrain check flip` reports all findings and draws a figure."""
    spec = context.spec
    if not spec.keypoints:
        return skipped("this dataset has no keypoints")
    if spec.flip_pairs is None:  # then no augmentation may flip images
        return skipped("no flip pairs are declared, so no augmentation flips images")
    targets = context.loaders["train"].examples.targets
    findings, _ = diagnose_flip(targets["points"][:MAX_EXAMPLES], targets["valid"][:MAX_EXAMPLES], spec)
    worst = next((f for verdict in ("FAIL", "WARN") for f in findings if f.verdict == verdict), None)
    return worst or passed(findings[-1].evidence)
