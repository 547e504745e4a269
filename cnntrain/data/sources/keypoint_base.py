"""Base class of keypoint sources (crop, resize, validity of points), and published keypoint sets."""

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from cnntrain.data.decoder import (
    Box,
    Resize,
    apply_affine,
    box_around_points,
    expand_box,
    make_decoder,
    match_aspect,
)
from cnntrain.data.examples import Examples, LazyImages, Source
from cnntrain.data.files import SPLITS, BadFile, raise_if_bad
from cnntrain.data.parallel import read_sizes
from cnntrain.errors import UserError, suggest
from cnntrain.types import DataSpec, flip_permutation, infer_flip_pairs

CROPS = ("none", "points", "box")
Skeleton = tuple[tuple[int, int], ...]  # pairs of keypoint indices
log = logging.getLogger("cnntrain")


@dataclass
class KeypointAnnotation:
    """Annotation of one object (a face, a person) in an image."""

    path: str  # the image file
    name: str  # of the example, for messages and reports
    points: Tensor  # (K, 2) float64, (x, y) in source pixels at pixel centers; arbitrary where not labeled
    labeled: Tensor  # (K,) bool
    box: Box | None = None  # in source pixels from the edge, if the file has one
    split: str = "train"
    group: str | None = None  # examples of a group are never split; None: the image is the group


@dataclass
class KeypointSource(Source):
    """Base class of images with K named keypoints; subclasses read the annotation files."""

    _: KW_ONLY
    size: int | list[int] = 96  # target size in pixels, one number for a square or [height, width]
    channels: int = 3
    # 'points' crops the bounding box of the object's points, 'box' the annotated box (both extended to the target's
    # aspect ratio), 'none' keeps the whole image, resized by `resize`
    crop: str = "points"
    crop_margin: float = 0.2  # added on each side of the box, as a share of its longer side
    resize: Resize = "letterbox"  # for `crop='none'`
    keypoint_set: str | None = None  # names of the points in the file's order; None: the file's names
    flip_pairs: Mapping[str, str] | None = None  # by name; None: those of the keypoint set, or inferred from the names

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            near = suggest(str(self.crop), CROPS)
            raise UserError(f"data.crop: {self.crop!r} is not one of {', '.join(CROPS)}{near}")
        if not 0 <= self.crop_margin <= 10:
            raise UserError(f"data.crop_margin: must be from 0 to 10, got {self.crop_margin!r}")
        if self.keypoint_set and self.keypoint_set not in KEYPOINT_SETS:
            near = suggest(self.keypoint_set, list(KEYPOINT_SETS))
            known = ", ".join(KEYPOINT_SETS)
            raise UserError(f"data.keypoint_set: {self.keypoint_set!r} is not one of {known}{near}")
        self.decoder = make_decoder(self.size, self.channels, self.resize)
        self.published = KEYPOINT_SETS[self.keypoint_set] if self.keypoint_set else None

    @abstractmethod
    def read(self) -> tuple[tuple[str, ...], list[KeypointAnnotation], Skeleton]:
        """Return the names of the points, the objects, and the skeleton (may be empty) of the annotation files."""

    @cached_property
    def annotations(self) -> tuple[tuple[str, ...], list[KeypointAnnotation], Skeleton]:
        names, objects, skeleton = self.read()
        for name in names:
            if not name or not name.isprintable() or names.count(name) > 1:
                problem = "is listed twice" if names.count(name) > 1 else "is not a valid name"
                raise UserError(f"data: the keypoint {name!r} {problem}; names must be printable and unique")
        if self.published is not None:
            if len(self.published.names) != len(names):
                raise UserError(
                    f"data.keypoint_set: has {len(self.published.names)} points, but the files have {len(names)}"
                )
            names, skeleton = self.published.names, self.published.skeleton
        if not objects:
            raise UserError("data: the annotation files contain no objects")
        return names, objects, skeleton

    def spec(self) -> DataSpec:
        names, _, skeleton = self.annotations
        declared = self.flip_pairs
        if declared is None and self.published is not None:
            declared = self.published.flip_pairs
        pairs = infer_flip_pairs(names) if declared is None else flip_permutation(names, declared)
        d = self.decoder
        return DataSpec(d.channels, d.height, d.width, keypoints=names, flip_pairs=pairs, skeleton=skeleton)

    def load(self) -> dict[str, Examples]:
        _, objects, _ = self.annotations
        paths = {item.path for item in objects}
        sizes, bad = read_sizes(paths)
        objects = [item for item in objects if item.path in sizes]
        _warn_of_points_outside(objects, sizes)
        splits: dict[str, Examples] = {}
        for split in SPLITS:
            members = [item for item in objects if item.split == split]
            if members:
                splits[split] = self._examples(members, sizes, bad)
        raise_if_bad(bad, len(paths))
        if "train" not in splits:
            raise UserError("data: the annotation files have no examples for train")
        return splits

    def _examples(
        self, objects: list[KeypointAnnotation], sizes: dict[str, tuple[int, int]], bad: list[BadFile]
    ) -> Examples:
        height, width = self.decoder.target_size
        boxes: list[Box | None] = []
        matrices, points, valid = [], [], []
        for item in objects:
            is_valid = points_inside(item.points, sizes[item.path]) & item.labeled
            box = self._crop_box(item, is_valid, bad)
            matrix = self.decoder.placement(sizes[item.path], box).matrix()
            transformed = apply_affine(item.points, matrix)
            is_valid &= points_inside(transformed, (width, height))
            boxes.append(box)
            matrices.append(matrix)
            points.append(torch.where(is_valid[:, None], transformed, 0.0))
            valid.append(is_valid)
        targets = {"points": torch.stack(points).float(), "valid": torch.stack(valid)}
        if any(item.box for item in objects):
            targets["box_size"] = torch.tensor([_box_size(item.box) for item in objects], dtype=torch.float32)
        crops = None if self.crop == "none" else torch.tensor(boxes, dtype=torch.float64)
        return Examples(
            LazyImages([item.path for item in objects], self.decoder, crops),
            targets,
            [item.name for item in objects],
            [item.group or item.path for item in objects],
            torch.stack(matrices),
        )

    def _crop_box(self, item: KeypointAnnotation, valid: Tensor, bad: list[BadFile]) -> Box | None:
        """Return the crop with the target's aspect ratio; None for the whole image."""
        if self.crop == "none":
            return None
        if self.crop == "points" and valid.any():
            return match_aspect(box_around_points(item.points[valid], self.crop_margin), self.decoder.target_size)
        if self.crop == "box" and item.box is not None and _box_size(item.box) != (0.0, 0.0):
            return expand_box(item.box, self.crop_margin, self.decoder.target_size)
        missing = "labeled point inside it" if self.crop == "points" else "box"
        others = " or ".join(crop for crop in CROPS if crop != self.crop)
        bad.append(BadFile(item.path, f"has no {missing}; set data.crop={others}"))
        return 0.0, 0.0, 1.0, 1.0


def _box_size(box: Box | None) -> tuple[float, float]:
    """Return width and height of an annotated box; (0, 0) for an empty box or none."""
    left, top, right, bottom = box or (0.0, 0.0, 0.0, 0.0)
    return (0.0, 0.0) if right <= left or bottom <= top else (right - left, bottom - top)


def points_inside(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (K,) bool: which points (K, 2) are inside an image of (width, height) pixels."""
    limit = torch.tensor(size, dtype=points.dtype) - 0.5
    return ((points >= -0.5) & (points <= limit)).all(-1)


def _warn_of_points_outside(objects: list[KeypointAnnotation], sizes: dict[str, tuple[int, int]]) -> None:
    labeled = sum(int(item.labeled.sum()) for item in objects)
    outside = [int((item.labeled & ~points_inside(item.points, sizes[item.path])).sum()) for item in objects]
    if any(outside):
        first = next(item.name for item, count in zip(objects, outside, strict=True) if count)
        log.warning(
            "data: %d of %d labeled points are outside their image and are ignored (first in %s)",
            *(sum(outside), labeled, first),
        )


@dataclass(frozen=True)
class KeypointSet:
    """Names of K keypoints in the order of the annotation files."""

    names: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...] = ()  # names to connect in plots
    flip_pairs: Mapping[str, str] | None = None  # left/right pairs by name; None: inferred from the names

    @property
    def skeleton(self) -> Skeleton:
        index = {name: i for i, name in enumerate(self.names)}
        return tuple((index[a], index[b]) for line in self.lines for a, b in pairwise(line))


def _numbered(name: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{name}_{number}" for number in numbers)


# Sagonas et al., 300 Faces in-the-Wild, 2013. "right" is the person's own right, on the left of the image. Points are
# numbered from the outside to the inside on both sides, so the names of a pair differ only in the side.
_IBUG_JAW = (*_numbered("right_jaw", *range(1, 9)), "chin", *_numbered("left_jaw", *range(8, 0, -1)))
_IBUG_RIGHT_BROW = _numbered("right_brow", 1, 2, 3, 4, 5)
_IBUG_LEFT_BROW = _numbered("left_brow", 5, 4, 3, 2, 1)
_IBUG_BRIDGE = _numbered("nose_bridge", 1, 2, 3, 4)
_IBUG_NOSTRILS = (*_numbered("right_nostril", 1, 2), "nose_base", *_numbered("left_nostril", 2, 1))
_IBUG_RIGHT_EYE = _numbered("right_eye", 1, 2, 3, 4, 5, 6)
_IBUG_LEFT_EYE = _numbered("left_eye", 4, 3, 2, 1, 6, 5)
_IBUG_UPPER_MOUTH = (*_numbered("right_mouth", 1, 2, 3), "mouth_top", *_numbered("left_mouth", 3, 2, 1))
_IBUG_LOWER_MOUTH = (*_numbered("left_mouth", 5, 4), "mouth_bottom", *_numbered("right_mouth", 4, 5))
_IBUG_UPPER_LIPS = (*_numbered("right_lip", 1, 2), "lip_top", *_numbered("left_lip", 2, 1))
_IBUG_LOWER_LIPS = ("left_lip_3", "lip_bottom", "right_lip_3")
_IBUG_OPEN_LINES = (_IBUG_JAW, _IBUG_RIGHT_BROW, _IBUG_LEFT_BROW, _IBUG_BRIDGE, _IBUG_NOSTRILS)
_IBUG_MOUTHS = (_IBUG_UPPER_MOUTH + _IBUG_LOWER_MOUTH, _IBUG_UPPER_LIPS + _IBUG_LOWER_LIPS)
_IBUG_RINGS = (_IBUG_RIGHT_EYE, _IBUG_LEFT_EYE, *_IBUG_MOUTHS)
IBUG68 = KeypointSet(
    tuple(name for line in (*_IBUG_OPEN_LINES, *_IBUG_RINGS) for name in line),
    (*_IBUG_OPEN_LINES, *((*ring, ring[0]) for ring in _IBUG_RINGS)),
)

# Lin et al., Microsoft COCO, 2014: the order of person_keypoints_*.json.
COCO17 = KeypointSet(
    tuple(
        "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist "
        "right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle".split()
    ),
    (
        ("left_ear", "left_eye", "nose", "right_eye", "right_ear"),
        ("left_wrist", "left_elbow", "left_shoulder", "right_shoulder", "right_elbow", "right_wrist"),
        ("left_shoulder", "left_hip", "right_hip", "right_shoulder"),
        ("left_hip", "left_knee", "left_ankle"),
        ("right_hip", "right_knee", "right_ankle"),
    ),
)

# Zhang, Sun, Tang, Cat Head Detection, ECCV 2008. "right" is the cat's own right, on the left of the image, as in the
# other sets. The files list the eye and the ear on the left of the image first; the dataset's description calls these
# left (in 00000001_000.jpg the first eye is at x = 175, the second at 239). The points of both ears run from left to
# right in the image: root, tip, root. So the outer root of the right ear, 1, is the partner of the left ear's, 3.
CAT9 = KeypointSet(
    ("right_eye", "left_eye", "mouth", *_numbered("right_ear", 1, 2, 3), *_numbered("left_ear", 1, 2, 3)),
    (
        ("right_eye", "mouth", "left_eye", "right_eye"),
        _numbered("right_ear", 1, 2, 3),
        _numbered("left_ear", 1, 2, 3),
    ),
    {"right_eye": "left_eye", "right_ear_1": "left_ear_3", "right_ear_2": "left_ear_2", "right_ear_3": "left_ear_1"},
)

KEYPOINT_SETS = {"ibug68": IBUG68, "coco17": COCO17, "cat9": CAT9}
