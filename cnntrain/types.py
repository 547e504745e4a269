"""Data types shared across packages: dataset metadata, batches and findings."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cnntrain.errors import UserError, suggest

Verdict = Literal["PASS", "WARN", "FAIL", "SKIP"]
Size = tuple[int, int]  # (height, width) in pixels


def format_shape(shape: Sequence[int]) -> str:
    """Return for example `3x224x224`."""
    return "x".join(map(str, shape))


@dataclass(frozen=True)
class DataSpec:
    """Metadata of a dataset, independent of any model or task.

    Attributes:
        channels, height, width: shape of the images after decoding and resizing; height and width in pixels.
        classes: class names by id: of the images (classification) or of the pixels (masks).
        keypoints: names of the K keypoints.
        flip_pairs: for each keypoint the index of its left/right partner (its own index if it has none), or None
            if unknown.
        skeleton: pairs of keypoint indices that plots connect with lines.
        per_pixel: True if the classes are those of the pixels: images have masks.
        ignore_index: mask value that is excluded from the loss and the metrics; None if there is none.
        mean, std: per channel on the 0-1 scale; None until measured on the training images.
        hflip_ok: whether a horizontally flipped image keeps its meaning (False for digits and text).
    """

    channels: int
    height: int
    width: int
    classes: tuple[str, ...] = ()
    keypoints: tuple[str, ...] = ()
    flip_pairs: tuple[int, ...] | None = None
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
    def mask_fill(self) -> int:
        """Mask value of pixels outside the annotated mask; excluded from the loss and the metrics."""
        return 255 if self.ignore_index is None else self.ignore_index

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel that images are normalized with; 0 and 1 if the spec has none."""
        return self.mean or (0.0,) * self.channels, self.std or (1.0,) * self.channels

    def with_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> "DataSpec":
        return replace(self, mean=mean, std=std)


@dataclass
class Batch:
    """A batch of N examples.

    Attributes:
        images: (N, C, H, W); uint8 from the loader, float and normalized after augmentation.
        targets: tensors by name, each with N rows: `label` (N,) int64; `points` (N, K, 2) float32, (x, y) in image
            pixels at pixel centers, with `valid` (N, K) bool (labeled and inside the image), and `box_size` (N, 2)
            float32, width and height of the annotated boxes in source pixels, if there are boxes; `mask` (N, H, W)
            uint8 class ids.
        index: (N,) int64 on the CPU, row of each example in its split.
        position: (N,) int64 on the CPU, position of each example in the epoch.
        source_to_image: (N, 3, 3) float64 on the CPU, matrix from pixels of the source file to pixels of the image;
            None if all are the identity.
    """

    images: Tensor
    targets: dict[str, Tensor]
    index: Tensor
    position: Tensor
    source_to_image: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Tensor | slice) -> "Batch":
        """Return the examples at `rows`, a slice or indices on the CPU."""
        device_rows = rows if isinstance(rows, slice) else rows.to(self.images.device)
        return Batch(
            self.images[device_rows],
            {name: target[device_rows] for name, target in self.targets.items()},
            self.index[rows],
            self.position[rows],
            None if self.source_to_image is None else self.source_to_image[rows],
        )

    def same_target(self, first: int, second: int) -> bool:
        """Return True if two examples have equal targets."""
        return all(torch.equal(target[first], target[second]) for target in self.targets.values())

    @property
    def truth(self) -> dict[str, Tensor]:
        """The ground truth for a task: `targets`, and `source_to_image` if the batch has it."""
        if self.source_to_image is None:
            return self.targets
        return {**self.targets, "source_to_image": self.source_to_image}


def concat_batches(batches: Sequence[Batch]) -> Batch:
    """Concatenate batches with the same targets; all or none must have `source_to_image`."""
    if len(batches) == 1:
        return batches[0]
    matrices = [batch.source_to_image for batch in batches if batch.source_to_image is not None]
    return Batch(
        torch.cat([batch.images for batch in batches]),
        {name: torch.cat([batch.targets[name] for batch in batches]) for name in batches[0].targets},
        torch.cat([batch.index for batch in batches]),
        torch.cat([batch.position for batch in batches]),
        torch.cat(matrices) if matrices else None,
    )


def flip_permutation(keypoints: tuple[str, ...], partners: Mapping[str, str]) -> tuple[int, ...]:
    """Return the partner index of each keypoint, from pairs of names (in either direction, each pair once)."""
    index = {name: i for i, name in enumerate(keypoints)}
    result = list(range(len(keypoints)))
    for first, second in partners.items():
        left, right = str(first), str(second)  # YAML reads 36 as a number
        for name in (left, right):
            if name not in index:
                raise UserError(f"data.flip_pairs: {name!r} is not a keypoint{suggest(name, keypoints)}")
        for name, partner in ((left, right), (right, left)):
            current = result[index[name]]
            if current not in (index[name], index[partner]):
                raise UserError(f"data.flip_pairs: {name!r} has two partners, {keypoints[current]!r} and {partner!r}")
            result[index[name]] = index[partner]
    return tuple(result)


def infer_flip_pairs(keypoints: tuple[str, ...]) -> tuple[int, ...] | None:
    """Infer left/right pairs from the keypoint names; None if no name contains a side.

    A name contains a side if it has the word left or right, or begins or ends with l or r. Words end at non-letters and
    before capitals: `left_eye`, `eyeLeft`, `left-eye2`. `lefteye` and `eyeleft` count only if the partner exists.
    """
    pairs: dict[str, str] = {}
    for name in keypoints:
        other, certain = _other_side(name)
        if other in keypoints:
            pairs[name] = str(other)
        elif other is not None and certain:
            raise UserError(f"data.flip_pairs: {name!r} has no partner; add {name}: {other} or rename the point")
    return flip_permutation(keypoints, pairs) if pairs else None


_SIDES = [("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"), ("l", "r"), ("L", "R")]
_OPPOSITE = dict(_SIDES) | {right: left for left, right in _SIDES}
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
    """Result of one check.

    Attributes:
        name: name of the check.
        evidence: the numbers behind the verdict.
        cause: likely cause of a WARN or FAIL.
        remedy: what to do next.
        keys: config keys concerned.
    """

    name: str
    verdict: Verdict
    evidence: str = ""
    cause: str = ""
    remedy: str = ""
    keys: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return asdict(self)
