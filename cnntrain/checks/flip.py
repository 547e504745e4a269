"""Check that the declared flip pairs match the data: a flip that swaps wrong keypoints teaches wrong names.

Three questions: Is the permutation its own inverse? Are keypoints whose names contain a side paired with the other
side? Does the mirrored and relabeled mean shape match the mean shape, better than without relabeling, and better than
with the partners of any two keypoints exchanged?

Exchanging the partners of i and j changes the squared distance by 2 v . w, where v is the mean vector from j to i, and
w the mean vector between their mirrored partners. The two vectors point the same way if the pairs are right, and in
opposite directions if they are exchanged. Difference vectors need no common origin. Each is a mean over the examples in
which all four keypoints are valid, so its standard error is known and missing keypoints do not bias it.

What the data cannot show:
- keypoints that coincide in the mean shape within its noise (the inner lips of closed mouths): a WARN names them;
- which of two partners is the left one: exchanging both names gives the same permutation;
- anything if the objects have no common orientation (seen from above, rotated arbitrarily): all mean vectors vanish. If
  all shapes show the same profile, correct pairs may even be reported as wrong.
All other exchanges are detected: with 69 real faces all exchanges of the iBUG-68 keypoints. The smallest margin is 3.4
standard errors (inner lips), and 2 are required.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cnntrain.checks.context import failed, join_names, passed, skipped, warned
from cnntrain.types import DataSpec, Finding

MIN_Z_SCORE = 2.0  # standard errors by which an exchange must differ from no change
MIN_EXAMPLES = 5
MAX_EXAMPLES = 20_000  # more would not make the mean shape more precise
KEY = "data.flip_pairs"
SIDES = {"left": "right", "l": "r"} | {"right": "left", "r": "l"}


@dataclass(frozen=True)
class Symmetry:
    """How well flip pairs match the shapes. Distances are relative to the shape's size (root mean square radius)."""

    shape: Tensor  # (K, 2) mean shape, centered
    swapped: float  # root mean square distance from its mirror image, with names swapped by the flip pairs
    unswapped: float  # the same without
    change: Tensor  # (K, K) increase of the summed squared distance when keypoints i and j exchange their partners
    error: Tensor  # (K, K) standard error of `change`; infinite if all four are valid in too few examples

    @property
    def mirrored(self) -> Tensor:
        """(K, 2) mirror image of the shape, without relabeling."""
        return self.shape * torch.tensor([-1.0, 1.0])

    @property
    def is_certain(self) -> Tensor:
        """(K, K) bool: whether `change` differs significantly from 0."""
        return self.change.abs() >= MIN_Z_SCORE * self.error

    def exchanged(self, i: int, j: int) -> float:
        """Return `swapped` for flip pairs in which i and j have exchanged their partners."""
        return max(self.swapped**2 + float(self.change[i, j]) / len(self.shape), 0.0) ** 0.5


def diagnose_flip(points: Tensor, valid: Tensor, spec: DataSpec) -> tuple[list[Finding], Symmetry | None]:
    """Return findings about `spec.flip_pairs`, and the symmetry they are based on (None for an invalid permutation).

    Args:
        points: (N, K, 2) pixels (x, y).
        valid: (N, K) bool.
    """
    if spec.flip_pairs is None:
        cause = "neither data.flip_pairs nor a keypoint set declares pairs, and no keypoint name contains left or right"
        remedy = "set data.flip_pairs, for example data.flip_pairs={left_eye: right_eye}"
        finding = failed("no flip pairs are known", cause, remedy, KEY)
        return [replace(finding, name="mirror declared")], None
    names, pairs, symmetry = spec.keypoints, spec.flip_pairs, None
    findings = {"mirror map": diagnose_map(names, pairs), "mirror names": diagnose_names(names, pairs)}
    if len(pairs) == len(names) and all(0 <= partner < len(names) for partner in pairs):
        symmetry = measure_symmetry(points, valid, pairs)
        findings["mirror shape"] = _diagnose_shape(pairs, symmetry)
        findings["mirror pairs"] = _diagnose_exchanges(names, pairs, symmetry)
    return [replace(finding, name=name) for name, finding in findings.items()], symmetry


def diagnose_map(names: Sequence[str], flip_pairs: Sequence[int]) -> Finding:
    """Check that every keypoint has one partner, and that the permutation is its own inverse."""
    count = len(names)
    if len(flip_pairs) != count:
        evidence = f"the list has {len(flip_pairs)} entries for {count} keypoints"
        return failed(evidence, "the list of partners belongs to other data", f"list {count} partners", KEY)
    for i, partner in enumerate(flip_pairs):
        if not 0 <= partner < count:
            evidence = f"{names[i]} has the partner number {partner}; there are {count} keypoints, counted from 0"
            return failed(evidence, "an index is out of range", "declare partners by name", KEY)
        if flip_pairs[partner] != i:
            index = flip_pairs[partner]
            back = names[index] if 0 <= index < count else f"number {index}"
            evidence = f"{names[i]} becomes {names[partner]}, but {names[partner]} becomes {back}"
            cause = "a pair is declared in one direction only, or the list is shifted"
            return failed(evidence, cause, f"pair {names[i]} with one keypoint, in both directions", KEY)
    pairs = sum(partner > i for i, partner in enumerate(flip_pairs))
    return passed(f"{pairs} pairs, {count - 2 * pairs} unpaired keypoints; applied twice, the identity")


def diagnose_names(names: Sequence[str], flip_pairs: Sequence[int]) -> Finding:
    """Check that left keypoints are paired with right keypoints of the same part.

    Numbers in names may differ: some datasets number both ears from left to right.
    """
    count, wrong = 0, []
    for i, partner in enumerate(flip_pairs[: len(names)]):
        side, part = side_and_part(names[i])
        if side is None or not 0 <= partner < len(names):
            continue
        count += 1
        if side_and_part(names[partner]) != (SIDES[side], part):
            wrong.append(_describe(names, flip_pairs, i))
    if not count:
        return skipped("no keypoint name contains left or right")
    if not wrong:
        return passed(f"{count} names contain a side, and are paired with the other side")
    remedy = "pair each left keypoint with the same keypoint on the right"
    return failed(join_names(wrong), "a pair or a name is wrong", remedy, KEY)


def side_and_part(name: str) -> tuple[str | None, str]:
    """Split a keypoint name: ('left', 'eye') for `left_eye_2`. The side is None if the name has none."""
    words = [word for word in re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()) if word]
    sides = [word for word in words if word in SIDES]
    if not sides:  # one word, such as lefteye
        sides = [side for side in ("left", "right") if words and words[0].startswith(side)]
        words = [word.removeprefix(sides[0]) if sides else word for word in words]
    rest = [word for word in words if word and word not in SIDES]
    return (sides[0] if len(sides) == 1 else None), "_".join(rest)


def measure_symmetry(points: Tensor, valid: Tensor, flip_pairs: Sequence[int]) -> Symmetry:
    """Compare the mean shape of points (N, K, 2), valid (N, K), with its mirror image."""
    points, valid = points.double().cpu(), valid.bool().cpu()
    enough = valid.sum(1) >= 2
    points, valid = points[enough], valid[enough]
    weight = valid[..., None].double()
    center = (points * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    size = ((points - center).square() * weight).sum((1, 2)) / weight.sum((1, 2))
    shapes = (points - center) / size.clamp(min=1e-12).sqrt()[:, None, None]
    partner = torch.tensor(list(flip_pairs))
    flip = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    swapped, swapped_valid = shapes[:, partner] * flip, valid[:, partner]

    count = valid.shape[1]
    change = torch.zeros(count, count, dtype=torch.float64)
    error = torch.full((count, count), float("inf"), dtype=torch.float64)
    for i in range(count):
        all_valid = (valid[:, i : i + 1] & valid & swapped_valid[:, i : i + 1] & swapped_valid).double()[..., None]
        examples = all_valid.sum(0)  # (K, 1)
        vectors, swapped_vectors = shapes[:, i : i + 1] - shapes, swapped[:, i : i + 1] - swapped  # (N, K, 2)
        v, w = ((each * all_valid).sum(0) / examples.clamp(min=1) for each in (vectors, swapped_vectors))
        change[i] = 2 * (v * w).sum(1)
        # First-order contribution of each example to the product of the two means.
        share = 2 * ((vectors - v) * w + (swapped_vectors - w) * v).sum(2) * all_valid[..., 0]
        spread = share.square().sum(0).sqrt() / examples[:, 0].clamp(min=1)
        error[i] = torch.where(examples[:, 0] >= MIN_EXAMPLES, spread, float("inf"))

    shape = (shapes * weight).sum(0) / weight.sum(0).clamp(min=1)
    shape = shape - shape.mean(0)
    mirrored = shape * flip
    distances = [(shape - other).square().sum(1).mean().sqrt() for other in (mirrored[partner], mirrored)]
    return Symmetry(shape, float(distances[0]), float(distances[1]), change, error)


def _diagnose_shape(flip_pairs: Sequence[int], symmetry: Symmetry) -> Finding:
    """Check that swapping names brings the mirrored mean shape closer to the mean shape."""
    distances = f"{symmetry.swapped:.3f} with names swapped, {symmetry.unswapped:.3f} without"
    evidence = f"distance of the mirrored mean shape from the mean shape, relative to its size: {distances}"
    if all(partner == i for i, partner in enumerate(flip_pairs)):
        remedy = "declare the pairs, unless all keypoints lie on the axis of symmetry"
        return warned(f"no names are swapped; {evidence}", "every keypoint is its own partner", remedy, KEY)
    if symmetry.swapped < symmetry.unswapped:
        return passed(evidence)
    cause = "most pairs are wrong, or the shapes have no common orientation"
    return failed(evidence, cause, "look at the figure, and correct the pairs", KEY)


def _diagnose_exchanges(names: Sequence[str], flip_pairs: Sequence[int], symmetry: Symmetry) -> Finding:
    """Check that exchanging the partners of any two keypoints makes the match worse."""
    if pair := wrong_pair(symmetry):
        i, j = pair
        evidence = (
            f"{_describe(names, flip_pairs, i)}, {_describe(names, flip_pairs, j)}: exchanging these partners reduces "
            f"the distance of the mirrored mean shape from {symmetry.swapped:.3f} to {symmetry.exchanged(i, j):.3f} "
            "of its size"
        )
        pairs = {frozenset((i, flip_pairs[j])), frozenset((j, flip_pairs[i]))}
        better = ", ".join(": ".join(names[k] for k in sorted(pair)) for pair in pairs if len(pair) == 2)
        remedy = f"declare {{{better}}}" if better else f"leave {names[i]} and {names[j]} unpaired"
        return failed(evidence, f"{names[i]} or {names[j]} has a wrong partner", remedy, KEY)
    undecided = (~symmetry.is_certain).triu(1)
    if undecided.any():
        shown = join_names([f"{names[i]} and {names[j]}" for i, j in undecided.nonzero().tolist()], 5)
        evidence = f"the data do not show whether the partners of {shown} are exchanged"
        cause = "these keypoints coincide on average, or are valid in too few examples"
        return warned(evidence, cause, "compare their pairs by eye", KEY)
    exchanges = len(names) * (len(names) - 1) // 2
    return passed(f"exchanging the partners of any two keypoints is worse ({exchanges:,} exchanges)")


def wrong_pair(symmetry: Symmetry) -> tuple[int, int] | None:
    """Return the two keypoints whose exchange improves the match most, if any exchange improves it significantly."""
    wrong = (symmetry.is_certain & (symmetry.change < 0)).triu(1)
    if not wrong.any():
        return None
    change = torch.where(wrong, symmetry.change, float("inf"))
    i, j = divmod(int(change.argmin()), len(change))
    return i, j


def _describe(names: Sequence[str], flip_pairs: Sequence[int], i: int) -> str:
    return f"{names[i]} is unpaired" if flip_pairs[i] == i else f"{names[i]} is paired with {names[flip_pairs[i]]}"
