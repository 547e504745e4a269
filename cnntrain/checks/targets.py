"""Are the targets what they should be? Every class seen, points where points can be, partners that fit."""

import torch

from cnntrain.checks.context import CheckContext
from cnntrain.checks.flip import FEWEST_EXAMPLES, compare, judge_flip
from cnntrain.checks.verdicts import failed, passed, skipped, some, warned
from cnntrain.types import Finding

IMBALANCE = 50.0  # times as many examples of the commonest class as of the rarest
TINY = 0.03  # share of the canvas that points may not all lie within
MOST_SHAPES = 20_000


def classes(bench: CheckContext) -> Finding:
    """Labels are in range, and training has examples of every class."""
    names = bench.spec.classes
    if bench.spec.keypoints or "label" not in bench.loaders["train"].examples.targets:
        return skipped("these data have no label per image")
    for split, loader in bench.loaders.items():
        labels = loader.examples.targets["label"]
        wrong = (labels < 0) | (labels >= len(names))
        if wrong.any():
            evidence = f"{split}: {int(wrong.sum())} labels outside 0 to {len(names) - 1}"
            which = some([loader.examples.names[int(i)] for i in wrong.nonzero().flatten()[:20]])
            return failed(evidence, f"labels are counted from another number, or of other data: {which}",
                          "let them count the classes from 0", "data")  # fmt: skip
    counts = torch.bincount(bench.loaders["train"].examples.targets["label"], minlength=len(names))
    evidence = f"{len(names)} classes, {int(counts.min())} to {int(counts.max())} training examples each"
    if (counts == 0).any():
        missing = some([names[int(i)] for i in (counts == 0).nonzero().flatten()])
        limited = bench.config["data"].get("limit") is not None
        return (warned if limited else failed)(
            evidence, f"training never sees {missing}" + (": data.limit leaves few examples" if limited else ""),
            "give it examples, or take the class out", "data", *(["data.limit"] if limited else []),
        )  # fmt: skip
    if counts.max() > IMBALANCE * counts.min():
        cause = f"{names[int(counts.argmin())]} is rare: always answering something else is nearly right"
        return warned(evidence, cause, "try task.class_weights=balanced, and look at the confusion matrix",
                      "task.class_weights")  # fmt: skip
    return passed(evidence)


def points(bench: CheckContext) -> Finding:
    """Points lie on the canvas, spread over it, as (x, y) in pixels."""
    if not bench.spec.keypoints:
        return skipped("these data have no keypoints")
    examples = bench.loaders["train"].examples
    where, valid = examples.targets["points"].float(), examples.targets["valid"].bool()
    if not valid.any():
        return failed("no point of any training example is valid", "they are unlabeled, or all lie outside their "
                      "images (other units than pixels?)", "look at them: cnntrain preview", "data")  # fmt: skip
    height, width = bench.spec.image_size
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
    mirror = bench.spec.flip_pairs
    if mirror is not None and len(where) >= FEWEST_EXAMPLES and len(mirror) == len(bench.spec.keypoints):
        upright, lying = (compare(each, valid, mirror).relabeled for each in (where, where.flip(-1)))
        evidence += f"; mirrored shapes fit to {upright:.2f}, with x and y exchanged to {lying:.2f}"
        if lying < 0.5 * upright:
            return failed(evidence, "the points are (y, x): the shapes are symmetric about a level line",
                          "exchange the two columns", "data")  # fmt: skip
    if share < 0.5:
        cause = "most points are unlabeled or lie outside their images"
        return warned(evidence, cause, "look at them: cnntrain preview", "data")
    return passed(evidence)


def masks(bench: CheckContext) -> Finding:
    """Masks have ids that are classes, and training has pixels of every class."""
    batch = bench.stored(count=512)
    if "mask" not in batch.targets:
        return skipped("these data have no masks")
    names, ignore = bench.spec.classes, bench.spec.ignore_index
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
        return failed(evidence, f"ids {some([str(i) for i in unknown])} are no classes",
                      "name them in data.classes, or map them to data.ignore_index", "data.classes")  # fmt: skip
    if total == unlabeled:
        return failed(
            evidence, "no pixel is labeled", "look at data.ignore_index and the masks", "data.ignore_index"
        )
    missing = [names[i] for i in range(len(names)) if counts[i] == 0]
    if missing:
        return warned(
            evidence, f"no pixel of {some(missing)}", "look whether these classes are there at all", "data"
        )
    if unlabeled > 0.9 * total:
        return warned(
            evidence, "hardly anything is labeled", "look at data.ignore_index and the masks", "data"
        )
    return passed(evidence)


def flip(bench: CheckContext) -> Finding:
    """The declared mirror partners fit the shapes; `cnntrain check flip` tells more and draws it."""
    spec = bench.spec
    if not spec.keypoints:
        return skipped("these data have no keypoints")
    if spec.flip_pairs is None and not bench.pipeline.can_flip:
        return skipped("no partners are declared, and nothing mirrors")
    targets = bench.loaders["train"].examples.targets
    findings, _ = judge_flip(targets["points"][:MOST_SHAPES], targets["valid"][:MOST_SHAPES], spec)
    for verdict in ("FAIL", "WARN"):
        for finding in findings:
            if finding.verdict == verdict:
                return finding
    return passed(findings[-1].evidence)
