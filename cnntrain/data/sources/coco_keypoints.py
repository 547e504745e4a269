"""Keypoints in COCO's JSON format."""

import json
import math
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from cnntrain.data.csv_table import ErrorList
from cnntrain.data.decoder import Box
from cnntrain.data.files import ByteRange, is_file, require_root
from cnntrain.data.sources.keypoint_base import KeypointAnnotation, KeypointSource, Skeleton
from cnntrain.errors import UserError


@dataclass
class CocoKeypoints(KeypointSource):
    """COCO's person_keypoints files, or others in that format; one example per annotated object.

    Crowds and objects without a labeled point are ignored. All objects of an image are in the same split.
    """

    root: str | None  # the other paths are relative to it
    train: str = "annotations/person_keypoints_train2017.json"
    val: str | None = "annotations/person_keypoints_val2017.json"
    test: str | None = None
    train_images: str = "train2017"  # folders that the `file_name`s are relative to
    val_images: str = "val2017"
    test_images: str = "test2017"
    _: KW_ONLY
    crop: str = "box"

    def __post_init__(self) -> None:
        super().__post_init__()
        folder = require_root(self.root, "COCO's annotation files and images")
        paths = {
            "train": (self.train, self.train_images),
            "val": (self.val, self.val_images),
            "test": (self.test, self.test_images),
        }
        self.files = {
            split: (folder / file, folder / images) for split, (file, images) in paths.items() if file is not None
        }

    def read(self) -> tuple[tuple[str, ...], list[KeypointAnnotation], Skeleton]:
        objects: list[KeypointAnnotation] = []
        names, skeleton = (), ()
        for split, (file, images) in self.files.items():
            annotations = CocoFile(file, images, split)
            if not names:
                names, skeleton = annotations.names, annotations.skeleton()
            elif names != annotations.names:
                raise UserError(f"data: {file}: its keypoints differ from those of the train file")
            objects += annotations.objects()
        return names, objects, skeleton


class CocoFile:
    """One annotation file; errors list all bad annotations."""

    def __init__(self, file: Path, images: Path, split: str) -> None:
        self.file, self.images, self.split = file, images, split
        self.errors = ErrorList(file)
        try:
            content = json.loads(ByteRange(str(file)).read())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"data: {file}: cannot be read as JSON ({error})") from error
        self.content: dict[str, Any] = content if isinstance(content, dict) else {}
        for key in ("images", "annotations", "categories"):
            rows = self.content.get(key)
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise UserError(f"data: {file}: expected an object with a list of objects {key!r}")
        found = [category for category in self.content["categories"] if category.get("keypoints")]
        names = found[0]["keypoints"] if len(found) == 1 else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"data: {file}: expected one category with a list of names 'keypoints', found {len(found)}")
        self.category, self.names = found[0], tuple(names)

    def skeleton(self) -> Skeleton:
        """Return pairs of point indices (1-based in the file). Invalid pairs are ignored: they are only for drawing."""
        pairs = self.category.get("skeleton")
        numbers = range(1, len(self.names) + 1)
        return tuple(
            (pair[0] - 1, pair[1] - 1)
            for pair in (pairs if isinstance(pairs, list) else ())
            if isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n in numbers for n in pair)
        )

    def objects(self) -> list[KeypointAnnotation]:
        file_names = self._file_names()
        exists: dict[str, bool] = {}
        objects = []
        for row in self.content["annotations"]:
            if row.get("category_id") != self.category.get("id") or row.get("iscrowd"):
                continue
            where = f"annotation {row.get('id')!r}"
            points = self._points(row, where)
            if points is None or not points[:, 2].any():
                continue  # objects without labeled points are not used
            box = self._box(row, where)
            image = row.get("image_id")
            name = file_names.get(image) if _is_id(image) else None
            if name is None:
                self.errors.add(where, f"no image has the id {image!r}")
                continue
            if name not in exists:
                exists[name] = is_file(self.images / name)
                if not exists[name]:
                    self.errors.add(where, f"no file {name!r} in {self.images}")
            path, example = str(self.images / name), f"{self.split}/{name}:{row.get('id')}"
            objects.append(KeypointAnnotation(path, example, points[:, :2], points[:, 2] > 0, box, self.split))
        self.errors.raise_if_any()
        return objects

    def _file_names(self) -> dict[float | str, str]:
        """Return the file name of each image by id; report images that are not in COCO format."""
        names: dict[float | str, str] = {}
        for row, image in enumerate(self.content["images"]):
            where, number, name = f"image {row} of the list", image.get("id"), image.get("file_name")
            if not _is_id(number) or not isinstance(name, str):
                problem = f"id must be a number or a string, and file_name a string; got {number!r} and {name!r}"
                self.errors.add(where, problem[:200])
            elif names.setdefault(number, name) != name:
                self.errors.add(where, f"duplicate id {number!r}")
        return names

    def _points(self, row: dict[str, Any], where: str) -> torch.Tensor | None:
        """Return (K, 3): x, y and 0 (not labeled), 1 (labeled, but occluded) or 2; None for invalid values."""
        values: Any = row.get("keypoints")
        count = 3 * len(self.names)
        if not _are_numbers(values, count) or not all(v in (0, 1, 2) for v in values[2::3]):
            self.errors.add(where, f"keypoints must be {count} numbers x, y, v with v of 0, 1, 2")
            return None
        return torch.tensor(values, dtype=torch.float64).view(-1, 3)

    def _box(self, row: dict[str, Any], where: str) -> Box | None:
        values = row.get("bbox")
        if values is None:
            return None
        if not _are_numbers(values, 4) or values[2] < 0 or values[3] < 0:
            self.errors.add(where, f"bbox must be left, top, width, height in pixels, got {str(values)[:80]}")
            return None
        return values[0], values[1], values[0] + values[2], values[1] + values[3]


def _is_id(value: Any) -> TypeGuard[float | str]:
    return isinstance(value, float | int | str) and not isinstance(value, bool)


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= 1e6 for v in values)
        and all(math.isfinite(v) for v in values)
    )
