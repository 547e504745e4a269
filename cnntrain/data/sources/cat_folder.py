"""The CAT data set: photographs, each with a `.cat` file of nine points beside it."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from cnntrain.data.files import files_below, split_folders, train_and_other_folders
from cnntrain.data.image_reader import BadFile, refuse
from cnntrain.data.resize import Resize
from cnntrain.data.source import given_folder
from cnntrain.data.sources.keypoint_base import KeypointAnnotation, KeypointSource
from cnntrain.data.sources.schemes import CAT9

LAYOUT = "images, each with a .cat file, optionally in train/, val/ and test/"
logger = logging.getLogger("cnntrain")


class CatFolder(KeypointSource):
    """`IMAGE.jpg` with `IMAGE.jpg.cat`, which says `9 x y x y ...`, in folders of any depth.

    Folders `train/`, `val/` (or `valid/`, `validation/`) and `test/` in `root` are splits. Without them, all images are
    training images.
    Left and right are the cat's own: the first eye in a file, on the left of the picture, is `right_eye`.
    Images without a `.cat` file are left out (the original download has one).

    Args:
        root: the folder.
        size, channels, crop, crop_margin, resize, flip_pairs: as for `KeypointSource`.
    """

    def __init__(
        self,
        root: str | None,
        size: int | list[int] = 96,
        channels: int = 3,
        crop: str = "points",
        crop_margin: float = 0.2,
        resize: Resize = "letterbox",
        flip_pairs: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(size, channels, crop, crop_margin, resize, "cat9", flip_pairs)
        self.root = given_folder(root, LAYOUT)

    def read(self) -> tuple[tuple[str, ...], list[KeypointAnnotation], tuple[tuple[int, int], ...]]:
        bad: list[BadFile] = []
        objects: list[KeypointAnnotation] = []
        count = without = 0
        folders = split_folders(self.root) and train_and_other_folders(self.root, LAYOUT)
        for split, folder in (folders or {"train": self.root}).items():
            files = files_below(folder, bad)
            count += len(files)
            notes = {file for file in files if file.endswith(".cat")}
            images = [file for file in files if file not in notes]
            without += sum(f"{image}.cat" not in notes for image in images)
            for orphan in sorted(notes - {f"{image}.cat" for image in images}):
                bad.append(BadFile(orphan, "has no image beside it"))
            for image in images:
                if f"{image}.cat" in notes and (points := _read_points(f"{image}.cat", bad)) is not None:
                    name = str(Path(image).relative_to(self.root))
                    labeled = torch.ones(len(points), dtype=torch.bool)
                    objects.append(KeypointAnnotation(image, name, points, labeled, split=split))
        refuse(bad, count, self.root)
        if without:
            logger.warning("data: %d images have no .cat file beside them and are left out", without)
        return CAT9.names, objects, CAT9.skeleton


def _read_points(file: str, bad: list[BadFile]) -> torch.Tensor | None:
    """(9, 2) float64."""
    try:
        numbers = [int(word) for word in Path(file).read_text("ascii").split()]
    except (OSError, ValueError):
        numbers = []
    if len(numbers) != 19 or numbers[0] != 9 or max(map(abs, numbers)) > 10**6:
        bad.append(BadFile(file, "expected '9' and then 18 whole numbers x y"))
        return None
    return torch.tensor(numbers[1:], dtype=torch.float64).view(9, 2)
