"""Images in one folder per class."""

import os
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path

import torch

from cnntrain.data.decoder import Resize, make_decoder
from cnntrain.data.examples import Examples, LazyImages, Source
from cnntrain.data.files import (
    IMAGE_EXTENSIONS,
    BadFile,
    has_extension,
    is_ignored,
    list_files,
    list_folders,
    raise_if_bad,
    relative_names,
    require_root,
    require_split_folders,
)
from cnntrain.errors import UserError, suggest
from cnntrain.types import DataSpec

LAYOUT = "train/CLASS/IMAGE, and optionally val/ (or valid/, validation/) and test/ with the same layout"


@dataclass
class LabeledFiles(Source):
    """Base class of image files with one class label each."""

    _: KW_ONLY
    size: int | list[int] = 64  # target size in pixels, one number for a square or [height, width]
    channels: int = 3
    resize: Resize = "short_side"
    hflip_ok: bool = True  # whether a horizontally flipped image keeps its meaning

    def __post_init__(self) -> None:
        self.decoder = make_decoder(self.size, self.channels, self.resize)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Class names by index."""
        raise NotImplementedError

    def spec(self) -> DataSpec:
        d = self.decoder
        return DataSpec(d.channels, d.height, d.width, self.class_names, hflip_ok=self.hflip_ok)


@dataclass
class ImageFolder(LabeledFiles):
    """Images in `root/train/<class>/...`, and optionally `val/` (or `valid/`, `validation/`) and `test/`.

    The classes are the class folders of train, sorted by name.
    """

    root: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.folder = require_root(self.root, LAYOUT)

    @cached_property
    def folders(self) -> dict[str, Path]:
        """Return the folder of each split."""
        return require_split_folders(self.folder, LAYOUT)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        classes = tuple(list_folders(self.folders["train"]))
        if len(classes) < 2:
            raise UserError(
                f"data.root: {self.folder / 'train'} has {len(classes)} class folder(s); at least 2 are needed"
            )
        return classes

    def load(self) -> dict[str, Examples]:
        classes, bad, splits, count = self.class_names, [], {}, 0
        for split, folder in self.folders.items():
            paths, labels = self._list(folder, classes, bad)
            count += len(paths)
            if outside := _images_directly_in(folder):
                count += len(outside)
                shown = f"{len(outside)} image(s) outside the class folders, for example {outside[0]}"
                remedy = f"move them into a class folder, or out of {self.folder}"
                bad.append(BadFile(folder, f"has {shown}; {remedy}"))
            elif not paths:
                bad.append(BadFile(folder, "has no images"))
            targets = {"label": torch.tensor(labels, dtype=torch.int64)}
            splits[split] = Examples(LazyImages(paths, self.decoder), targets, relative_names(self.folder, paths))
        raise_if_bad(bad, count + len(bad), self.folder)
        return splits

    def _list(self, folder: Path, classes: tuple[str, ...], bad: list[BadFile]) -> tuple[list[str], list[int]]:
        """Return paths and labels of one split."""
        paths: list[str] = []
        labels: list[int] = []
        for name in list_folders(folder):
            if name not in classes:
                bad.append(BadFile(folder / name, f"is not a class of train{suggest(name, classes)}"))
                continue
            found = list_files(folder / name, bad)
            if not found and folder.name == "train":
                bad.append(BadFile(folder / name, "is a class without images"))
            paths += found
            labels += [classes.index(name)] * len(found)
        return paths, labels


def _images_directly_in(folder: Path) -> list[str]:
    """Return the sorted names of image files that are outside the class folders."""
    entries = [entry for entry in os.scandir(folder) if has_extension(entry.name, IMAGE_EXTENSIONS)]
    return sorted(entry.name for entry in entries if entry.is_file() and not is_ignored(entry.name))
