"""What all sources of images with named points share: the crop, the matrices, what is valid, the facts."""

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cnntrain.data.boxes import frame
from cnntrain.data.cache import read_sizes
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.image_reader import BadFile, refuse
from cnntrain.data.resize import Box, Resize, box_around, move, place, widen
from cnntrain.data.source import Source
from cnntrain.data.sources.image_folder import make_decoder
from cnntrain.data.sources.schemes import find_scheme
from cnntrain.errors import UserError, suggest
from cnntrain.types import DataSpec, flip_permutation, infer_flip_pairs

CROPS = ("none", "points", "box")
logger = logging.getLogger("cnntrain")


@dataclass
class KeypointAnnotation:
    """One object (a face, a person) in one image, as its annotation file says.

    Attributes:
        path: the image.
        name: what a person calls it.
        points: (K, 2) float64, x and y in source pixels at pixel centers; anything where not labeled.
        labeled: (K,) bool.
        box: left, top, right, bottom in source pixels from the edge, where the file gives one.
        split: train, val or test.
        group: examples of a group never part; None: the image itself.
    """

    path: str
    name: str
    points: Tensor
    labeled: Tensor
    box: Box | None = None
    split: str = "train"
    group: str | None = None


class KeypointSource(Source):
    """Images with K named points; subclasses read the files.

    Args:
        size: canvas in pixels, one number for a square or [height, width].
        channels: 1 or 3.
        crop: 'points' cuts out the box of the object's own points, 'box' the one that the file gives (both
            widened to the canvas's aspect), 'none' shows the whole image by `resize`.
        crop_margin: added on each side of the box, as a share of its longer side.
        resize: letterbox, short_side or stretch, for `crop='none'`.
        keypoint_set: published names for the points, in the file's order; null: the file's own.
        flip_pairs: partners by name, {left_eye: right_eye}; null: the keypoint set's, or
            inferred from names that say left and right.
    """

    def __init__(
        self,
        size: int | list[int] = 96,
        channels: int = 3,
        crop: str = "points",
        crop_margin: float = 0.2,
        resize: Resize = "letterbox",
        keypoint_set: str | None = None,
        flip_pairs: Mapping[str, str] | None = None,
    ) -> None:
        if crop not in CROPS:
            raise UserError(
                f"data.crop: {crop!r} is not one of {', '.join(CROPS)}{suggest(str(crop), CROPS)}"
            )
        if not 0 <= crop_margin <= 10:
            raise UserError(f"data.crop_margin: must be from 0 to 10, got {crop_margin!r}")
        self.decoder = make_decoder(size, channels, resize)
        self.crop, self.crop_margin = crop, crop_margin
        self.keypoint_set = find_scheme(keypoint_set) if keypoint_set else None
        self.flip_pairs = flip_pairs

    @abstractmethod
    def read(self) -> tuple[tuple[str, ...], list[KeypointAnnotation], tuple[tuple[int, int], ...]]:
        """Names of the points, the objects, and the skeleton (may be empty), from the annotation files."""

    @cached_property
    def annotations(self) -> tuple[tuple[str, ...], list[KeypointAnnotation], tuple[tuple[int, int], ...]]:
        names, objects, skeleton = self.read()
        for name in names:
            if not name or not name.isprintable() or names.count(name) > 1:
                fault = "is listed twice" if names.count(name) > 1 else "is not a valid name"
                raise UserError(f"data: the keypoint {name!r} {fault}; names must be printable and unique")
        if self.keypoint_set is not None:
            if len(self.keypoint_set.names) != len(names):
                raise UserError(
                    f"data.keypoint_set: has {len(self.keypoint_set.names)} points, the files have {len(names)}"
                )
            names, skeleton = self.keypoint_set.names, self.keypoint_set.skeleton
        if not objects:
            raise UserError("data: the annotation files name no object")
        return names, objects, skeleton

    def spec(self) -> DataSpec:
        names, _, skeleton = self.annotations
        declared = self.flip_pairs
        if declared is None and self.keypoint_set is not None:
            declared = self.keypoint_set.flip_pairs
        mirror = infer_flip_pairs(names) if declared is None else flip_permutation(names, declared)
        d = self.decoder
        return DataSpec(d.channels, d.height, d.width, keypoints=names, flip_pairs=mirror, skeleton=skeleton)

    def load(self) -> dict[str, Examples]:
        _, objects, _ = self.annotations
        paths = sorted({one.path for one in objects})
        sizes, bad = read_sizes(paths)
        size_of = dict(zip(paths, sizes, strict=True))
        broken = {one.path for one in bad}
        _log_outside(objects, size_of)
        splits: dict[str, Examples] = {}
        for split in ("train", "val", "test"):
            members = [one for one in objects if one.split == split and one.path not in broken]
            if members:
                splits[split] = self._examples(members, size_of, bad)
        refuse(bad, len(paths))
        if "train" not in splits:
            raise UserError("data: the annotation files have no examples for train")
        return splits

    def _examples(
        self, objects: list[KeypointAnnotation], sizes: dict[str, tuple[int, int]], bad: list[BadFile]
    ) -> Examples:
        canvas = (self.decoder.height, self.decoder.width)
        boxes: list[Box | None] = []
        matrices, points, valid = [], [], []
        for one in objects:
            seen = inside(one.points, sizes[one.path]) & one.labeled
            box = self._box(one, seen, bad)
            matrix = place(*sizes[one.path], canvas, self.decoder.resize, box).matrix()
            moved = move(one.points, matrix)
            seen &= inside(moved, (canvas[1], canvas[0]))
            boxes.append(box)
            matrices.append(matrix)
            points.append(torch.where(seen[:, None], moved, 0.0))
            valid.append(seen)
        cut = None if self.crop == "none" else torch.tensor(boxes, dtype=torch.float64)
        groups = [one.group or one.path for one in objects]
        targets = {"points": torch.stack(points).float(), "valid": torch.stack(valid)}
        if any(one.box for one in objects):
            targets["box_size"] = torch.tensor([_size(one.box) for one in objects], dtype=torch.float32)
        return Examples(
            LazyImages([one.path for one in objects], self.decoder, cut),
            targets,
            [one.name for one in objects],
            groups,
            torch.stack(matrices),
        )

    def _box(self, one: KeypointAnnotation, seen: Tensor, bad: list[BadFile]) -> Box | None:
        """What to cut out, of the canvas's aspect; None for the whole image."""
        if self.crop == "none":
            return None
        canvas = (self.decoder.height, self.decoder.width)
        if self.crop == "points":
            if not seen.any():
                bad.append(BadFile(one.path, "has no labeled point inside it; set data.crop=none or box"))
                return 0.0, 0.0, 1.0, 1.0
            return widen(box_around(one.points[seen], self.crop_margin), canvas)
        if one.box is None or one.box[2] <= one.box[0] or one.box[3] <= one.box[1]:
            bad.append(BadFile(one.path, "has no box; set data.crop=points or none"))
            return 0.0, 0.0, 1.0, 1.0
        return frame(one.box, self.crop_margin, canvas)


def _size(box: Box | None) -> tuple[float, float]:
    """Return width and height of an annotated box; (0, 0) without a box."""
    if box is None or box[2] <= box[0] or box[3] <= box[1]:
        return 0.0, 0.0
    return box[2] - box[0], box[3] - box[1]


def inside(points: Tensor, size: tuple[int, int]) -> Tensor:
    """(K,) bool: which points (K, 2) lie on the pixels of an image of (width, height)."""
    limit = torch.tensor(size, dtype=points.dtype) - 0.5
    return ((points >= -0.5) & (points <= limit)).all(-1)


def _log_outside(objects: list[KeypointAnnotation], sizes: dict[str, tuple[int, int]]) -> None:
    labeled = sum(int(one.labeled.sum()) for one in objects)
    outside = [(one.labeled & ~inside(one.points, sizes[one.path])).sum().item() for one in objects]
    if any(outside):
        first = next(one.name for one, count in zip(objects, outside, strict=True) if count)
        logger.warning(
            "data: %d of %d labeled points lie outside their image and count as not valid (first in %s)",
            sum(outside), labeled, first,
        )  # fmt: skip
