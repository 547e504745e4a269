"""Do the declared mirror partners fit the data? A flip that relabels by a wrong pair teaches wrong names.

Three questions: is the map one that undoes itself; do names that tell a side trade with the other side; and does the
mirrored and relabeled mean shape come back onto the mean shape, nearer than without relabeling, and nearer than with
the partners of any two points exchanged? Exchanging the partners of i and j changes the squared distance by
2 v . w, where v is the mean way from j to i and w that between their mirrored partners: the two ways agree when the
pairs are right, and are opposite when they are exchanged. Being ways, they need no common origin, and each is a mean
over the examples that show all four points, so that its error is known and hidden points do no harm.

What the data can't tell:
- two points that lie upon one another in the mean shape, nearer than its noise (the inner lips of closed mouths); then
  the finding is a WARN that names them;
- which of two partners is called left: exchanging both names gives the same map;
- anything where shapes have no common upright (objects seen from above, turned at random): all ways vanish on the
  average. Shapes of which all show the same profile may even be judged wrong.
Otherwise every exchange is told: on 69 real faces all of iBUG-68's, the inner lips by the least margin, 3.4 standard
errors where 2 are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnntrain.types import DataSpec, Finding

SURE = 2.0  # standard errors that an exchange must be away from making no difference
FEWEST_EXAMPLES = 5
KEY = "data.flip_pairs"
SIDES = {"left": "right", "l": "r"} | {"right": "left", "r": "l"}


@dataclass(frozen=True)
class Symmetry:
    """What the data say about a map; distances are shares of the shape's size (root mean square radius).

    Attributes:
        shape: (K, 2) mean shape about its middle; mirrored: (K, 2) the same in the mirror, names kept.
        relabeled, kept: root mean square distance of the mirrored shape from the mean shape, with names traded as
            the map says, and without.
        change: (K, K) by how much the summed squared distance grows when i and j exchange their partners.
        error: (K, K) standard error of `change`; infinite where too few examples show all four points.
    """

    shape: Tensor
    mirrored: Tensor
    relabeled: float
    kept: float
    change: Tensor
    error: Tensor

    def exchanged(self, i: int, j: int) -> float:
        """`relabeled` as it would be with the partners of i and j exchanged."""
        count = len(self.shape)
        return max(self.relabeled**2 + float(self.change[i, j]) / count, 0.0) ** 0.5


def judge_flip(points: Tensor, valid: Tensor, spec: DataSpec) -> tuple[list[Finding], Symmetry | None]:
    """Findings about `spec.flip_pairs`, and what they rest on (None where the map is too broken to be tried).

    Args:
        points: (N, K, 2) pixels (x, y); valid: (N, K) bool.
    """
    if spec.flip_pairs is None:
        cause = "neither data.flip_pairs nor a scheme declares partners, and no name says left or right"
        remedy = "set data.flip_pairs, as in data.flip_pairs={left_eye: right_eye}"
        return [Finding("mirror declared", "FAIL", "no partners are known", cause, remedy, (KEY,))], None
    findings = [judge_map(spec.keypoints, spec.flip_pairs), judge_names(spec.keypoints, spec.flip_pairs)]
    count = len(spec.keypoints)
    if len(spec.flip_pairs) != count or not all(0 <= partner < count for partner in spec.flip_pairs):
        return findings, None
    symmetry = compare(points, valid, spec.flip_pairs)
    return [
        *findings,
        judge_shape(spec.flip_pairs, symmetry),
        judge_exchanges(spec.keypoints, spec.flip_pairs, symmetry),
    ], symmetry


def judge_map(names: Sequence[str], mirror: Sequence[int]) -> Finding:
    """Whether the map has one partner for each point, and undoes itself."""
    name, count = "mirror map", len(names)
    if len(mirror) != count:
        evidence = f"the map has {len(mirror)} entries, there are {count} keypoints"
        return Finding(
            name, "FAIL", evidence, "the list of partners is of other data", f"give {count}", (KEY,)
        )
    for i, partner in enumerate(mirror):
        if not 0 <= partner < count:
            evidence = f"{names[i]}: its partner is number {partner}, there are {count} keypoints (from 0)"
            return Finding(
                name, "FAIL", evidence, "a number is out of range", "declare partners by name", (KEY,)
            )
        if mirror[partner] != i:
            back = names[mirror[partner]] if 0 <= mirror[partner] < count else f"number {mirror[partner]}"
            evidence = f"{names[i]} becomes {names[partner]}, but {names[partner]} becomes {back}"
            cause = "a pair is declared one way only, or the list is shifted"
            return Finding(
                name, "FAIL", evidence, cause, f"pair {names[i]} with one point, both ways", (KEY,)
            )
    pairs = sum(partner > i for i, partner in enumerate(mirror))
    return Finding(name, "PASS", f"{pairs} pairs, {count - 2 * pairs} points stay; twice is the identity")


def judge_names(names: Sequence[str], mirror: Sequence[int]) -> Finding:
    """Whether what is called left trades with what is called right, and is the same part of the object.

    Numbers in a name may differ: some schemes count both ears from the left to the right.
    """
    told, wrong = 0, []
    for i, partner in enumerate(mirror[: len(names)]):
        side, part = side_and_part(names[i])
        if side is None or not 0 <= partner < len(names):
            continue
        told += 1
        other_side, other_part = side_and_part(names[partner])
        if other_side != SIDES[side] or other_part != part:
            wrong.append(f"{names[i]} " + ("stays" if partner == i else f"trades with {names[partner]}"))
    if not told:
        return Finding("mirror names", "SKIP", "no name says left or right")
    if not wrong:
        return Finding(
            "mirror names", "PASS", f"{told} names say left or right, and trade with the other side"
        )
    more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    return Finding(
        "mirror names", "FAIL", "; ".join(wrong[:4]) + more, "a pair is wrong, or a name is",
        "pair each left point with the same point on the right", (KEY,),
    )  # fmt: skip


def side_and_part(name: str) -> tuple[str | None, str]:
    """('left', 'eye') of `left_eye_2`; the side None where the name tells none, numbers left out."""
    words = [word for word in re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()) if word]
    sides = [word for word in words if word in SIDES]
    if not sides:  # in one word, as leftEye does after its capital was split off, but lefteye does not
        sides = [side for side in ("left", "right") if words and words[0].startswith(side)]
        words = [word.removeprefix(sides[0]) if sides else word for word in words]
    rest = [word for word in words if word and word not in SIDES]
    return (sides[0] if len(sides) == 1 else None), "_".join(rest)


def compare(points: Tensor, valid: Tensor, mirror: Sequence[int]) -> Symmetry:
    """Hold the mean shape against itself in the mirror: points (N, K, 2), valid (N, K)."""
    points, seen = points.double().cpu(), valid.bool().cpu()
    enough = seen.sum(1) >= 2
    points, seen = points[enough], seen[enough]
    weight = seen[..., None].double()
    middle = (points * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    size = ((points - middle).square() * weight).sum((1, 2)) / weight.sum((1, 2))
    shapes = (points - middle) / size.clamp(min=1e-12).sqrt()[:, None, None]
    partner = torch.tensor(list(mirror))
    flip = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    traded, traded_seen = shapes[:, partner] * flip, seen[:, partner]

    count = seen.shape[1]
    change = torch.zeros(count, count, dtype=torch.float64)
    error = torch.full((count, count), float("inf"), dtype=torch.float64)
    for i in range(count):
        all_four = (seen[:, i : i + 1] & seen & traded_seen[:, i : i + 1] & traded_seen).double()[..., None]
        examples = all_four.sum(0)  # (K, 1)
        way, traded_way = shapes[:, i : i + 1] - shapes, traded[:, i : i + 1] - traded  # (N, K, 2)
        v, w = ((ways * all_four).sum(0) / examples.clamp(min=1) for ways in (way, traded_way))
        change[i] = 2 * (v * w).sum(1)
        # To first order: what each example adds to the product of two means.
        share = 2 * ((way - v) * w + (traded_way - w) * v).sum(2) * all_four[..., 0]
        spread = share.square().sum(0).sqrt() / examples[:, 0].clamp(min=1)
        error[i] = torch.where(examples[:, 0] >= FEWEST_EXAMPLES, spread, float("inf"))

    shape = (shapes * weight).sum(0) / weight.sum(0).clamp(min=1)
    shape = shape - shape.mean(0)
    mirrored = shape * flip
    distances = [(shape - other).square().sum(1).mean().sqrt() for other in (mirrored[partner], mirrored)]
    return Symmetry(shape, mirrored, float(distances[0]), float(distances[1]), change, error)


def judge_shape(mirror: Sequence[int], symmetry: Symmetry) -> Finding:
    """Whether trading names brings the mirrored mean shape nearer to the mean shape."""
    evidence = (
        f"the mirrored mean shape lies {symmetry.relabeled:.3f} of its size from the mean shape with names "
        f"traded, {symmetry.kept:.3f} with names kept"
    )
    if all(partner == i for i, partner in enumerate(mirror)):
        cause, remedy = (
            "every point is its own partner",
            "declare the pairs, unless all points lie on the axis",
        )
        return Finding(
            "mirror shape", "WARN", f"no two points trade names; {evidence}", cause, remedy, (KEY,)
        )
    if symmetry.relabeled < symmetry.kept:
        return Finding("mirror shape", "PASS", evidence)
    cause = "most pairs are wrong, or the shapes have no common upright"
    return Finding(
        "mirror shape", "FAIL", evidence, cause, "look at the picture, and correct the pairs", (KEY,)
    )


def judge_exchanges(names: Sequence[str], mirror: Sequence[int], symmetry: Symmetry) -> Finding:
    """Whether the map is better than with the partners of any two points exchanged; names the worst two."""
    name = "mirror pairs"
    count, exchanges = len(names), len(names) * (len(names) - 1) // 2
    upper = torch.ones(count, count, dtype=torch.bool).triu(1)
    unsure = upper & ~(symmetry.change.abs() >= SURE * symmetry.error)
    wrong = upper & ~unsure & (symmetry.change < 0)
    if wrong.any():
        i, j = worst_pair(symmetry, wrong)
        evidence = (
            f"{_says(names, mirror, i)}, {_says(names, mirror, j)}: with these partners exchanged the mirrored "
            f"mean shape lies nearer, {symmetry.exchanged(i, j):.3f} of its size instead of {symmetry.relabeled:.3f}"
        )
        pairs = {frozenset((i, mirror[j])), frozenset((j, mirror[i]))}
        better = ", ".join(": ".join(names[k] for k in sorted(pair)) for pair in pairs if len(pair) == 2)
        remedy = f"declare {{{better}}}" if better else f"leave {names[i]} and {names[j]} out, they stay"
        return Finding(
            name, "FAIL", evidence, f"{names[i]} or {names[j]} has a wrong partner", remedy, (KEY,)
        )
    if unsure.any():
        shown = [f"{names[i]} and {names[j]}" for i, j in unsure.nonzero().tolist()]
        more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
        evidence = f"the data can't tell the partners of {', '.join(shown[:5])}{more} apart"
        cause = "they lie upon one another on the average, or too few examples show them"
        return Finding(name, "WARN", evidence, cause, "compare their pairs by eye", (KEY,))
    return Finding(
        name, "PASS", f"better than with the partners of any two points exchanged ({exchanges:,} tried)"
    )


def worst_pair(symmetry: Symmetry, wrong: Tensor) -> tuple[int, int]:
    """The two points whose exchange would help most, among `wrong` (K, K)."""
    gain = torch.where(wrong, symmetry.change, float("inf"))
    i, j = divmod(int(gain.argmin()), len(gain))
    return i, j


def _says(names: Sequence[str], mirror: Sequence[int], i: int) -> str:
    return f"{names[i]} stays" if mirror[i] == i else f"{names[i]} trades with {names[mirror[i]]}"
