"""Data types shared across packages: dataset metadata, batches and findings."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cnntrain.errors import UserError, suggest

Verdict = Literal["PASS", "WARN", "FAIL", "SKIP"]


@dataclass(frozen=True)
class DataSpec:
    """Facts that a data set states about itself, before and apart from any model or task.

    Attributes:
        channels, height, width: of the images as the store holds them (the canvas), in pixels.
        classes: class names by id: of the images (classification) or of the pixels (masks).
        keypoints: names of the K points.
        mirror: for each keypoint the index of its partner under a mirror image (itself when it lies on the axis),
            or None when the data set does not say.
        skeleton: pairs of keypoint indices to join by lines in drawings.
        per_pixel: whether the classes are the pixels': images have masks.
        ignore_index: the mask id that counts neither as right nor as wrong; None where the masks have none.
        mean, std: per channel on the 0-1 scale; None until the training images have been measured.
        hflip_ok: whether a mirrored image still means the same (False for digits and text).
    """

    channels: int
    height: int
    width: int
    classes: tuple[str, ...] = ()
    keypoints: tuple[str, ...] = ()
    mirror: tuple[int, ...] | None = None
    skeleton: tuple[tuple[int, int], ...] = ()
    per_pixel: bool = False
    ignore_index: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    hflip_ok: bool = True

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width

    @property
    def outside(self) -> int:
        """The mask id of what no pixel of the mask covers; it counts nowhere."""
        return 255 if self.ignore_index is None else self.ignore_index

    def with_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> "DataSpec":
        return replace(self, mean=mean, std=std)


@dataclass
class Batch:
    """N examples on their way from the store to the loss.

    Attributes:
        images: (N, C, H, W); uint8 as the store holds them, float and normalized once the pipeline has passed.
        targets: by name, each with N rows: `label` (N,) int64; `points` (N, K, 2) float32 canvas pixels (x, y) at
            pixel centers with `visible` (N, K) bool, and for objects with annotated boxes `box_size` (N, 2) float32,
            width and height in source pixels; `mask` (N, H, W) uint8 class ids.
        index: (N,) int64 on the CPU, row of each example in its split.
        position: (N,) int64 on the CPU, position of each example in the epoch.
        to_canvas: (N, 3, 3) float64 on the CPU, matrix from the source file's pixels to the canvas; None when it is
            the identity for all.
    """

    images: Tensor
    targets: dict[str, Tensor]
    index: Tensor
    position: Tensor
    to_canvas: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Tensor | slice) -> "Batch":
        """Some of the examples, by slice or by index on the CPU."""
        there = rows if isinstance(rows, slice) else rows.to(self.images.device)
        return Batch(
            self.images[there],
            {name: target[there] for name, target in self.targets.items()},
            self.index[rows],
            self.position[rows],
            None if self.to_canvas is None else self.to_canvas[rows],
        )

    def same_target(self, one: int, other: int) -> bool:
        """Whether two examples have the same targets."""
        return all(torch.equal(target[one], target[other]) for target in self.targets.values())

    @property
    def truth(self) -> dict[str, Tensor]:
        """The targets, with `to_canvas` among them where the batch has it: what a task judges by."""
        return self.targets if self.to_canvas is None else {**self.targets, "to_canvas": self.to_canvas}


def join(batches: Sequence[Batch]) -> Batch:
    """The examples of all batches as one; they have the same targets, and all or none have `to_canvas`."""
    if len(batches) == 1:
        return batches[0]
    matrices = [batch.to_canvas for batch in batches if batch.to_canvas is not None]
    return Batch(
        torch.cat([batch.images for batch in batches]),
        {name: torch.cat([batch.targets[name] for batch in batches]) for name in batches[0].targets},
        torch.cat([batch.index for batch in batches]),
        torch.cat([batch.position for batch in batches]),
        torch.cat(matrices) if matrices else None,
    )


def flip_permutation(keypoints: tuple[str, ...], partners: Mapping[str, str]) -> tuple[int, ...]:
    """Partner index of each keypoint, from partners declared by name (either direction; unnamed points stay).

    Raises:
        UserError: a name that is no keypoint, or a point with two different partners.
    """
    index = {name: i for i, name in enumerate(keypoints)}
    result = list(range(len(keypoints)))
    for left, right in (
        (str(one), str(other)) for one, other in partners.items()
    ):  # YAML reads 36 as a number
        for name in (left, right):
            if name not in index:
                raise UserError(f"data.mirror: {name!r} is no keypoint{suggest(name, keypoints)}")
        for one, other in ((left, right), (right, left)):
            if result[index[one]] not in (index[one], index[other]):
                raise UserError(
                    f"data.mirror: {one!r} has two partners, {keypoints[result[index[one]]]!r} and {other!r}"
                )
            result[index[one]] = index[other]
    return tuple(result)


def infer_flip_pairs(keypoints: tuple[str, ...]) -> tuple[int, ...] | None:
    """Infer left/right pairs from the keypoint names; None if no name contains a side.

    A name contains a side if it has the word left or right, or begins or ends with l or r. Words end at non-letters and
    before capitals: `left_eye`, `eyeLeft`, `left-eye2`. `lefteye` and `eyeleft` count only if the partner exists.

    Raises:
        UserError: a name says its side, but its partner's name is missing.
    """
    pairs: dict[str, str] = {}
    for name in keypoints:
        other, certain = _other_side(name)
        if other in keypoints:
            pairs[name] = str(other)
        elif other is not None and certain:
            raise UserError(f"data.mirror: {name!r} has no partner; add {name}: {other} or rename the point")
    return flip_permutation(keypoints, pairs) if pairs else None


_OPPOSITE = {
    "left": "right", "Left": "Right", "LEFT": "RIGHT", "l": "r", "L": "R",
    "right": "left", "Right": "Left", "RIGHT": "LEFT", "r": "l", "R": "L",
}  # fmt: skip
_SIDE_WORD = re.compile(
    "(?<![a-zA-Z])(?:left|right|Left|Right)(?![a-z])|(?<=[a-z])(?:Left|Right)(?![a-z])|(?<![a-zA-Z])(?:LEFT|RIGHT)(?![a-zA-Z])"
)
_SIDE_LETTER = re.compile("^[lrLR](?=_)|(?<=_)[lrLR]$")
_SIDE_ANYWHERE = re.compile("left|right|Left|Right|LEFT|RIGHT")


def _other_side(name: str) -> tuple[str | None, bool]:
    """Return the name with left and right swapped (None if it has no side), and whether the side is a separate word."""
    for pattern in (_SIDE_WORD, _SIDE_LETTER, _SIDE_ANYWHERE):
        if pattern.search(name):
            return pattern.sub(lambda found: _OPPOSITE[found[0]], name), pattern is not _SIDE_ANYWHERE
    return None, False


@dataclass(frozen=True)
class Finding:
    """One judgment.

    `name` is the check's, `evidence` the numbers it rests on, `cause` the likely reason, `remedy` what to do,
    and `keys` the config keys concerned.
    """

    name: str
    verdict: Verdict
    evidence: str = ""
    cause: str = ""
    remedy: str = ""
    keys: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return asdict(self)
