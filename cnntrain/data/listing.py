"""Finding the image files below a folder."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from cnntrain.data.decode import BadFile

IGNORED = {"thumbs.db", "desktop.ini", "__macosx"}  # left behind by file managers and archivers


def is_ignored(name: str) -> bool:
    """Hidden files and folders, `.ipynb_checkpoints` among them."""
    return name.startswith(".") or name.lower() in IGNORED


def folders_in(folder: Path) -> list[str]:
    """Names of the folders directly below, sorted."""
    return sorted(e.name for e in os.scandir(folder) if os.path.isdir(e.path) and not is_ignored(e.name))


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
