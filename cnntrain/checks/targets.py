"""Are the targets what they should be? Every class seen, points where points can be, partners that fit."""

import torch

from cnntrain.checks.context import CheckContext, failed, join_names, passed, skipped, warned
from cnntrain.checks.flip import MIN_EXAMPLES, diagnose_flip, measure_symmetry
from cnntrain.types import Finding

IMBALANCE = 50.0  # times as many examples of the commonest class as of the rarest
TINY = 0.03  # share of the canvas that points may not all lie within
MOST_SHAPES = 20_000


def classes(context: CheckContext) -> Finding:
    """Labels are in range, and training has examples of every class."""
    names = context.spec.classes
    if context.spec.keypoints or "label" not in context.loaders["train"].examples.targets:
        return skipped("these data have no label per image")
    for split, loader in context.loaders.items():
        labels = loader.examples.targets["label"]
        wrong = (labels < 0) | (labels >= len(names))
        if wrong.any():
            evidence = f"{split}: {int(wrong.sum())} labels outside 0 to {len(names) - 1}"
            which = join_names([loader.examples.names[int(i)] for i in wrong.nonzero().flatten()[:20]])
            return failed(
                evidence,
                f"labels are counted from another number, or of other data: {which}",
                "let them count the classes from 0",
                "data",
            )
    counts = torch.bincount(context.loaders["train"].examples.targets["label"], minlength=len(names))
    evidence = f"{len(names)} classes, {int(counts.min())} to {int(counts.max())} training examples each"
    if (counts == 0).any():
        missing = join_names([names[int(i)] for i in (counts == 0).nonzero().flatten()])
        limited = context.config["data"].get("limit") is not None
        return (warned if limited else failed)(
            evidence,
            f"training never sees {missing}" + (": data.limit leaves few examples" if limited else ""),
            "give it examples, or take the class out",
            "data",
            *(["data.limit"] if limited else []),
        )
    if counts.max() > IMBALANCE * counts.min():
        cause = f"{names[int(counts.argmin())]} is rare: always answering something else is nearly right"
        return warned(
            evidence,
            cause,
            "try task.class_weights=balanced, and look at the confusion matrix",
            "task.class_weights",
        )
    return passed(evidence)


def points(context: CheckContext) -> Finding:
    """Points lie on the canvas, spread over it, as (x, y) in pixels."""
    if not context.spec.keypoints:
        return skipped("these data have no keypoints")
    examples = context.loaders["train"].examples
    where, valid = examples.targets["points"].float(), examples.targets["valid"].bool()
    if not valid.any():
        return failed(
            "no point of any training example is valid",
            "they are unlabeled, or all lie outside their images (other units than pixels?)",
            "look at them: cnntrain preview",
            "data",
        )
    height, width = context.spec.image_size
    seen = where[valid]
    low, high = seen.quantile(0.01, dim=0), seen.quantile(0.99, dim=0)
    share = float(valid.float().mean())
    evidence = (
        f"{100 * share:.0f} % valid; x from {low[0]:.0f} to {high[0]:.0f} of {width}, y from {low[1]:.0f} to "
        f"{high[1]:.0f} of {height} px"
    )
    if float((high - low).max()) < TINY * max(height, width):
        cause = "all points lie in one spot: they are not in pixels (from 0 to 1, or from -1 to 1: normalized already)"
        return failed(evidence, cause, "give them in pixels of the image; the task scales them", "data")
    mirror = context.spec.flip_pairs
    if mirror is not None and len(where) >= MIN_EXAMPLES and len(mirror) == len(context.spec.keypoints):
        upright, lying = (measure_symmetry(each, valid, mirror).swapped for each in (where, where.flip(-1)))
        evidence += f"; mirrored shapes fit to {upright:.2f}, with x and y exchanged to {lying:.2f}"
        if lying < 0.5 * upright:
            return failed(
                evidence,
                "the points are (y, x): the shapes are symmetric about a level line",
                "exchange the two columns",
                "data",
            )
    if share < 0.5:
        cause = "most points are unlabeled or lie outside their images"
        return warned(evidence, cause, "look at them: cnntrain preview", "data")
    return passed(evidence)


def masks(context: CheckContext) -> Finding:
    """Masks have ids that are classes, and training has pixels of every class."""
    batch = context.stored_batch(count=512)
    if "mask" not in batch.targets:
        return skipped("these data have no masks")
    names, ignore = context.spec.classes, context.spec.ignore_index
    counts = torch.bincount(batch.targets["mask"].flatten().long().cpu(), minlength=256)
    total = int(counts.sum())
    unlabeled = int(counts[ignore]) if ignore is not None else 0
    if ignore is not None:
        counts[ignore] = 0
    unknown = [i for i in counts.nonzero().flatten().tolist() if i >= len(names)]
    evidence = (
        f"{len(names)} classes in {len(batch)} masks, {100 * unlabeled / total:.0f} % of the pixels unlabeled"
    )
    if unknown:
        return failed(
            evidence,
            f"ids {join_names([str(i) for i in unknown])} are no classes",
            "name them in data.classes, or map them to data.ignore_index",
            "data.classes",
        )
    if total == unlabeled:
        return failed(
            evidence, "no pixel is labeled", "look at data.ignore_index and the masks", "data.ignore_index"
        )
    missing = [names[i] for i in range(len(names)) if counts[i] == 0]
    if missing:
        return warned(
            evidence,
            f"no pixel of {join_names(missing)}",
            "look whether these classes are there at all",
            "data",
        )
    if unlabeled > 0.9 * total:
        return warned(
            evidence, "hardly anything is labeled", "look at data.ignore_index and the masks", "data"
        )
    return passed(evidence)


def flip(context: CheckContext) -> Finding:
    """The declared mirror partners fit the shapes; `cnntrain check flip` tells more and draws it."""
    spec = context.spec
    if not spec.keypoints:
        return skipped("these data have no keypoints")
    if spec.flip_pairs is None and not context.pipeline.can_flip:
        return skipped("no partners are declared, and nothing mirrors")
    targets = context.loaders["train"].examples.targets
    findings, _ = diagnose_flip(targets["points"][:MOST_SHAPES], targets["valid"][:MOST_SHAPES], spec)
    for verdict in ("FAIL", "WARN"):
        for finding in findings:
            if finding.verdict == verdict:
                return finding
    return passed(findings[-1].evidence)
