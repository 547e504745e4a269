"""Finding the image files below a folder."""

import os
import stat
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from cnntrain.data.image_reader import BadFile
from cnntrain.errors import UserError, suggest

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SPLITS = ("train", "val", "test")
IMAGE_ENDINGS = frozenset(["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"])
RUN_FILES = {"run.json", "sweep.json"}  # these files mark a run folder; its figures are not data
IGNORED = {"thumbs.db", "desktop.ini", "__macosx"}  # left behind by file managers and archivers


def is_ignored(name: str) -> bool:
    """Hidden files and folders, `.ipynb_checkpoints` among them."""
    return name.startswith(".") or name.lower() in IGNORED


def folders_in(folder: Path) -> list[str]:
    """Names of the folders directly below, sorted."""
    return sorted(e.name for e in os.scandir(folder) if os.path.isdir(e.path) and not is_ignored(e.name))


def split_folders(root: Path) -> dict[str, Path]:
    """Return the split folders of `root`: `train`, `val` (or `valid`, `validation`) and `test`.

    Raises:
        UserError: two folders are the same split.
    """
    names = one_name_each(folders_in(root), f"data.root: {root}")
    return {split: root / name for split, name in names.items()}


def train_and_other_folders(root: Path, layout: str) -> dict[str, Path]:
    """Return the split folders of `root`; require `train/` and reject other folders with images.

    Args:
        layout: description of the expected layout, for messages.

    Raises:
        UserError: `train/` is missing, there is another folder with images, or two folders are the same split.
    """
    found = split_folders(root)
    if "train" not in found:
        names = folders_in(root)
        there = f"its folders are {', '.join(names[:6])}" if names else "it has no folders"
        remedy = "; move them into train/; validation data will be split off" if names and not found else ""
        raise UserError(f"data.root: {root} has no train/ ({there}{remedy}); it must have {layout}")
    refuse_other_folders(root, IMAGE_ENDINGS)
    return found


def refuse_other_folders(root: Path, endings: Collection[str]) -> None:
    """Reject folders of `root` that contain examples but are not a split: these would be ignored silently.

    Args:
        endings: lowercase file name extensions of examples.

    Raises:
        UserError: names the first such folder.
    """
    for name in folders_in(root):
        if name not in SPLIT_NAMES and (example := first_file(root / name, endings)):
            raise UserError(
                f"data.root: {root / name} is no split, but contains {os.path.relpath(example, root)}; the splits are "
                f"train, val (or valid, or validation) and test{suggest(name.lower(), list(SPLIT_NAMES))}; "
                f"rename the folder, or move it out of {root}"
            )


def one_name_each(names: Iterable[str], where: str) -> dict[str, str]:
    """Return the name used for each split; ignore names that are not a split.

    Raises:
        UserError: two names mean the same split.
    """
    found: dict[str, str] = {}
    for name in names:
        split = SPLIT_NAMES.get(name)
        if split is None:
            continue
        if split in found:
            raise UserError(
                f"{where} has both {found[split]!r} and {name!r}, which mean the same split; keep one of them"
            )
        found[split] = name
    return {split: found[split] for split in SPLITS if split in found}


def first_file(folder: Path, endings: Collection[str]) -> str | None:
    """Return a file below the folder whose name has one of the endings; None if there is none.

    Links are not followed, and run folders are skipped.
    """
    for parent, folders, files in os.walk(folder):
        if RUN_FILES.intersection(files):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        for name in sorted(files):
            if ends_with(name, endings) and not is_ignored(name):
                return os.path.join(parent, name)
    return None


def ends_with(name: str, endings: Collection[str]) -> bool:
    """Return True if the file name has one of the (lowercase) endings, ignoring case."""
    return name.rpartition(".")[2].lower() in endings


def files_below(folder: Path, bad: list[BadFile]) -> list[str]:
    """Paths of all files at any depth, sorted; links that lead back and special files go to `bad`."""
    found: list[str] = []
    _walk(str(folder), {os.path.realpath(folder)}, found, bad)
    return sorted(found)


def seen_from(folder: Path, paths: Sequence[str]) -> list[str]:
    """The paths without the folder, which they all begin with."""
    start = len(str(folder / "_")) - 1
    return [path[start:] for path in paths]


def _walk(folder: str, above: set[str], found: list[str], bad: list[BadFile]) -> None:
    for entry in os.scandir(folder):
        if is_ignored(entry.name):
            continue
        if entry.is_file(
            follow_symlinks=False
        ):  # the folder says so itself: the many files cost no call each
            found.append(entry.path)
        elif os.path.isdir(entry.path):  # False for a link to itself, where the entry would raise
            real = os.path.realpath(entry.path)
            if real in above or os.path.realpath(folder).startswith(real.rstrip(os.sep) + os.sep):
                bad.append(BadFile(entry.path, "is a link that leads back to a folder above it"))
            else:
                _walk(entry.path, above | {real}, found, bad)
        elif not os.path.exists(entry.path):
            bad.append(BadFile(entry.path, "is a link to nothing, or to itself"))
        elif not stat.S_ISREG(entry.stat().st_mode):  # a FIFO or a device would wait for ever
            bad.append(BadFile(entry.path, "is no regular file"))
        else:
            found.append(entry.path)
