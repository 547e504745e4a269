"""The CAT dataset: photographs with nine points each, in `.cat` files."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cnntrain.data.files import (
    BadFile,
    find_split_folders,
    list_files,
    raise_if_bad,
    require_root,
    require_split_folders,
)
from cnntrain.data.sources.keypoint_base import CAT9, KeypointAnnotation, KeypointSource, Skeleton

LAYOUT = "images, each with a .cat file, optionally in train/, val/ and test/"
log = logging.getLogger("cnntrain")


@dataclass
class CatFolder(KeypointSource):
    """Images `IMAGE.jpg` with `IMAGE.jpg.cat`, which contains `9 x y x y ...`, in folders of any depth.

    Folders `train/`, `val/` (or `valid/`, `validation/`) and `test/` in `root` are splits. Without them, all images are
    training images. Images without a `.cat` file are ignored (the original download has one).
    Left and right are the cat's own: the first eye in a file, on the left of the image, is `right_eye`.
    """

    root: str | None
    keypoint_set: str | None = field(default="cat9", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.folder = require_root(self.root, LAYOUT)

    def read(self) -> tuple[tuple[str, ...], list[KeypointAnnotation], Skeleton]:
        bad: list[BadFile] = []
        objects: list[KeypointAnnotation] = []
        count = unlabeled = 0
        folders = find_split_folders(self.folder) and require_split_folders(self.folder, LAYOUT)
        for split, folder in (folders or {"train": self.folder}).items():
            files = list_files(folder, bad)
            count += len(files)
            annotations = {file for file in files if file.endswith(".cat")}
            images = [file for file in files if file not in annotations]
            bad += [BadFile(f, "has no image") for f in sorted(annotations - {f"{image}.cat" for image in images})]
            for image in images:
                if f"{image}.cat" not in annotations:
                    unlabeled += 1
                elif (points := _read_points(f"{image}.cat", bad)) is not None:
                    name = str(Path(image).relative_to(self.folder))
                    labeled = torch.ones(len(points), dtype=torch.bool)
                    objects.append(KeypointAnnotation(image, name, points, labeled, split=split))
        raise_if_bad(bad, count, self.folder)
        if unlabeled:
            log.warning("data: %d images have no .cat file and are ignored", unlabeled)
        return CAT9.names, objects, CAT9.skeleton


def _read_points(file: str, bad: list[BadFile]) -> torch.Tensor | None:
    """Return points (9, 2) float64; None for a bad file, which is added to `bad`."""
    try:
        numbers = [int(word) for word in Path(file).read_text("ascii").split()]
    except (OSError, ValueError):
        numbers = []
    if len(numbers) != 19 or numbers[0] != 9 or max(map(abs, numbers)) > 10**6:
        bad.append(BadFile(file, "must contain 9, followed by 18 integers x y"))
        return None
    return torch.tensor(numbers[1:], dtype=torch.float64).view(9, 2)
