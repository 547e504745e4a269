"""Keypoints in dlib's XML format, which iBUG 300-W uses."""

import math
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cnntrain.data.csv_table import ErrorList, parse_number, sort_labels
from cnntrain.data.files import ByteRange, is_file, require_root
from cnntrain.data.sources.keypoint_base import KeypointAnnotation, KeypointSource, Skeleton
from cnntrain.errors import UserError

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element


@dataclass
class DlibXml(KeypointSource):
    """`<image file=...><box top= left= width= height=><part name= x= y=/>`; one example per box.

    Boxes with `ignore='1'` are ignored. Parts that are missing in a box are not labeled.
    """

    root: str | None  # the XML files are relative to it, and images to the folder of their XML file
    train: str = "labels_ibug_300W_train.xml"
    val: str | None = None
    test: str | None = "labels_ibug_300W_test.xml"
    _: KW_ONLY
    crop: str = "box"

    def __post_init__(self) -> None:
        super().__post_init__()
        folder = require_root(self.root, "dlib's XML files")
        files = {"train": self.train, "val": self.val, "test": self.test}
        self.files = {split: folder / file for split, file in files.items() if file}

    def read(self) -> tuple[tuple[str, ...], list[KeypointAnnotation], Skeleton]:
        trees = {split: _parse(file) for split, file in self.files.items()}
        found = {part.get("name", "") for tree in trees.values() for part in tree.iter("part")}
        if not found or "" in found:
            raise UserError(f"data: {self.files['train']}: expected <part name=... x=... y=.../> inside every <box>")
        names = sort_labels(found)
        index = {name: i for i, name in enumerate(names)}
        return names, [o for split, file in self.files.items() for o in _objects(file, trees[split], split, index)], ()


def _parse(file: Path) -> "Element":
    from xml.etree import ElementTree

    try:
        content = ByteRange(str(file)).read()
        if b"<!ENTITY" in content:  # entities can expand to gigabytes; dlib writes none
            raise UserError(f"data: {file}: has entity declarations, which are not allowed")
        return ElementTree.fromstring(content)
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"data: {file}: cannot be read as XML ({error})") from error


def _objects(file: Path, tree: "Element", split: str, part_index: dict[str, int]) -> list[KeypointAnnotation]:
    errors = ErrorList(file)
    objects = []
    for image in tree.iter("image"):
        name = image.get("file", "")
        if not name or not is_file(file.parent / name):
            errors.add(f"image {name!r}", f"no such file in {file.parent}")
            continue
        for number, box in enumerate(image.iter("box")):
            where = f"image {name!r} box {number + 1}"
            left, top, width, height = (_number(box, key) for key in ("left", "top", "width", "height"))
            points = torch.zeros(len(part_index), 2, dtype=torch.float64)
            labeled = torch.zeros(len(part_index), dtype=torch.bool)
            is_valid = not any(map(math.isnan, (left, top, width, height)))
            for part in box.iter("part"):
                row = part_index[part.get("name", "")]
                points[row, 0], points[row, 1] = _number(part, "x"), _number(part, "y")
                is_valid = is_valid and bool(points[row].isfinite().all()) and not labeled[row]
                labeled[row] = True
            if not is_valid:
                errors.add(where, "expected numbers left, top, width, height, and x, y once for each part")
            elif box.get("ignore") != "1" and labeled.any():
                edges = (left, top, left + width, top + height)
                example = f"{split}/{name}:{number + 1}"
                path = str(file.parent / name)
                objects.append(KeypointAnnotation(path, example, points, labeled, edges, split))
    errors.raise_if_any()
    return objects


def _number(element: "Element", key: str) -> float:
    return parse_number(element.get(key, ""))
