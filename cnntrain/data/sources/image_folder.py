"""Images in one folder per class."""

import os
from functools import cached_property
from pathlib import Path

import torch

from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.files import (
    IMAGE_ENDINGS,
    ends_with,
    files_below,
    folders_in,
    is_ignored,
    seen_from,
    train_and_other_folders,
)
from cnntrain.data.image_reader import BadFile, Decoder, refuse
from cnntrain.data.resize import Resize, canvas_size
from cnntrain.data.source import Source, given_folder
from cnntrain.errors import UserError, suggest
from cnntrain.types import DataSpec

LAYOUT = "train/CLASS/IMAGE, and optionally val/ (or valid/, validation/) and test/ with the same layout"


class ClassifiedFiles(Source):
    """Images in files, each of one of the `classes`.

    Args:
        size, channels, resize: as for `ImageFolder`.
        hflip_ok: a mirrored image means the same.
    """

    classes: tuple[str, ...] | cached_property[tuple[str, ...]]

    def __init__(self, size: int | list[int], channels: int, resize: Resize, hflip_ok: bool) -> None:
        self.decoder = make_decoder(size, channels, resize)
        self.hflip_ok = hflip_ok

    def spec(self) -> DataSpec:
        d = self.decoder
        return DataSpec(d.channels, d.height, d.width, self.classes, hflip_ok=self.hflip_ok)


class ImageFolder(ClassifiedFiles):
    """Images in `root/train/<class>/...`, and optionally `val/` (or `valid/`, `validation/`) and `test/`.

    The classes are the class folders of train, sorted by name.

    Args:
        root: the folder that has `train/`.
        size: canvas in pixels, one number for a square or [height, width].
        channels: 1 or 3.
        resize: letterbox (all of the image, borders), short_side (cut to the canvas) or stretch.
    """

    def __init__(
        self,
        root: str | None,
        size: int | list[int] = 64,
        channels: int = 3,
        resize: Resize = "short_side",
        hflip_ok: bool = True,
    ) -> None:
        self.root = given_folder(root, LAYOUT)
        super().__init__(size, channels, resize, hflip_ok)

    @cached_property
    def folders(self) -> dict[str, Path]:
        """Return the folder of each split."""
        return train_and_other_folders(self.root, LAYOUT)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        classes = tuple(folders_in(self.folders["train"]))
        if len(classes) < 2:
            raise UserError(
                f"data.root: {self.root / 'train'} has {len(classes)} class folder(s); at least 2 are needed"
            )
        return classes

    def load(self) -> dict[str, Examples]:
        classes, bad, splits, count = self.classes, [], {}, 0
        for split, folder in self.folders.items():
            paths, labels = self._list(folder, classes, bad)
            count += len(paths)
            if outside := _images_directly_in(folder):
                count += len(outside)
                shown = f"{len(outside)} image(s) outside the class folders, for example {outside[0]}"
                bad.append(
                    BadFile(folder, f"has {shown}; move them into a class folder, or out of {self.root}")
                )
            elif not paths:
                bad.append(BadFile(folder, "has no images"))
            targets = {"label": torch.tensor(labels, dtype=torch.int64)}
            splits[split] = Examples(LazyImages(paths, self.decoder), targets, seen_from(self.root, paths))
        refuse(bad, count + len(bad), self.root)
        return splits

    def _list(
        self, folder: Path, classes: tuple[str, ...], bad: list[BadFile]
    ) -> tuple[list[str], list[int]]:
        """Paths and labels of one split."""
        paths: list[str] = []
        labels: list[int] = []
        for name in folders_in(folder):
            if name not in classes:
                bad.append(BadFile(folder / name, f"is a class that train lacks{suggest(name, classes)}"))
                continue
            found = files_below(folder / name, bad)
            if not found and folder.name == "train":
                bad.append(BadFile(folder / name, "is a class without images"))
            paths += found
            labels += [classes.index(name)] * len(found)
        return paths, labels


def _images_directly_in(folder: Path) -> list[str]:
    """Return the sorted names of image files that are outside the class folders."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if ends_with(entry.name, IMAGE_ENDINGS) and entry.is_file()]
    return sorted(name for name in names if not is_ignored(name))


def make_decoder(size: int | list[int], channels: int, resize: Resize) -> Decoder:
    """The decoder that `data.size`, `data.channels` and `data.resize` ask for.

    Raises:
        UserError: one of them is out of range.
    """
    if channels not in (1, 3):
        raise UserError(f"data.channels: must be 1 or 3, got {channels!r}")
    if resize not in ("letterbox", "short_side", "stretch"):
        raise UserError(f"data.resize: {resize!r} is not one of letterbox, short_side, stretch"
                        + suggest(str(resize), ["letterbox", "short_side", "stretch"]))  # fmt: skip
    try:
        height, width = canvas_size(size)
    except (ValueError, TypeError) as error:
        raise UserError(f"data.{error}") from error
    return Decoder(height, width, channels, resize)
