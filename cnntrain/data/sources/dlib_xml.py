"""Points in dlib's XML files, in which iBUG's 300-W comes too."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cnntrain.data.csv_table import ErrorList, in_order, is_file, read_annotations
from cnntrain.data.resize import Resize
from cnntrain.data.source import given_folder
from cnntrain.data.sources.keypoint_base import KeypointAnnotation, KeypointSource
from cnntrain.errors import UserError

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element


class DlibXml(KeypointSource):
    """`<image file=...><box top= left= width= height=><part name= x= y=/>`; one example per box.

    Boxes with `ignore='1'` are left out; a part that a box lacks is not labeled there.

    Args:
        root: folder that the other paths count from; images count from their XML file's folder.
        train, val, test: the XML files; null where there is none.
        size, channels, crop, crop_margin, resize, keypoint_set, flip_pairs: as for `KeypointSource`.
    """

    def __init__(
        self,
        root: str | None,
        train: str = "labels_ibug_300W_train.xml",
        val: str | None = None,
        test: str | None = "labels_ibug_300W_test.xml",
        size: int | list[int] = 96,
        channels: int = 3,
        crop: str = "box",
        crop_margin: float = 0.2,
        resize: Resize = "letterbox",
        keypoint_set: str | None = None,
        flip_pairs: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(size, channels, crop, crop_margin, resize, keypoint_set, flip_pairs)
        self.root = given_folder(root, "dlib's XML files")
        self.files = {
            split: self.root / file
            for split, file in (("train", train), ("val", val), ("test", test))
            if file
        }

    def read(self) -> tuple[tuple[str, ...], list[KeypointAnnotation], tuple[tuple[int, int], ...]]:
        trees = {split: _parse(file) for split, file in self.files.items()}
        found = {part.get("name", "") for tree in trees.values() for part in tree.iter("part")}
        if not found or "" in found:
            raise UserError(
                f"data: {self.files['train']}: expected <part name=... x=... y=.../> inside every <box>"
            )
        names = in_order(found)
        objects: list[KeypointAnnotation] = []
        for split, file in self.files.items():
            objects += _objects(file, trees[split], split, {name: i for i, name in enumerate(names)})
        return names, objects, ()


def _parse(file: Path) -> "Element":
    from xml.etree import ElementTree

    try:
        content = read_annotations(file)
        if b"<!ENTITY" in content:  # entities can unfold to gigabytes; dlib writes none
            raise UserError(f"data: {file}: has entity declarations, which no annotation needs")
        return ElementTree.fromstring(content)
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"data: {file}: can't be read as XML ({error})") from error


def _objects(file: Path, tree: "Element", split: str, place: dict[str, int]) -> list[KeypointAnnotation]:
    complaints = ErrorList(file)
    objects = []
    for image in tree.iter("image"):
        name = image.get("file", "")
        if not name or not is_file(file.parent / name):
            complaints.add(f"image {name!r}", f"no such file in {file.parent}")
            continue
        for number, box in enumerate(image.iter("box")):
            where = f"image {name!r} box {number + 1}"
            left, top, width, height = (_number(box, key) for key in ("left", "top", "width", "height"))
            points = torch.zeros(len(place), 2, dtype=torch.float64)
            labeled = torch.zeros(len(place), dtype=torch.bool)
            sound = not any(map(math.isnan, (left, top, width, height)))
            for part in box.iter("part"):
                row = place[part.get("name", "")]
                points[row, 0], points[row, 1] = _number(part, "x"), _number(part, "y")
                sound = sound and bool(points[row].isfinite().all()) and not labeled[row]
                labeled[row] = True
            if not sound:
                complaints.add(
                    where, "expected numbers left, top, width, height, and x, y once for each part"
                )
            elif box.get("ignore") != "1" and labeled.any():
                edges = (left, top, left + width, top + height)
                example = f"{split}/{name}:{number + 1}"
                path = str(file.parent / name)
                objects.append(KeypointAnnotation(path, example, points, labeled, edges, split, path))
    complaints.raise_if_any()
    return objects


def _number(element: "Element", key: str) -> float:
    """The attribute as a number, NaN when it isn't one."""
    try:
        value = float(element.get(key, "nan"))
    except ValueError:
        return math.nan
    return value if abs(value) <= 1e6 else math.nan
