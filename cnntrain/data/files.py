"""Data files: reading, listing folders, files inside tar archives, unusable files, and downloads.

Functions of this module raise `UserError` for folders and files that are missing or invalid.
"""

import logging
import os
import re
import stat
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from cnntrain.errors import UserError, suggest

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SPLITS = ("train", "val", "test")
IMAGE_EXTENSIONS = frozenset(["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"])
RUN_FILES = {"run.json", "sweep.json"}  # these files mark a run folder; its figures are not data
IGNORED = {"thumbs.db", "desktop.ini", "__macosx"}  # created by file managers and archivers
SHOWN_FILES = 20  # in an error message
log = logging.getLogger("cnntrain")


class BadFile(Exception):
    """A file that cannot be used, and the reason. Collect them and report all with `raise_if_bad`."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)
        self.path, self.reason = str(path), reason


def raise_if_bad(bad: Iterable[BadFile], total: int, root: str | Path | None = None, advice: str = "") -> None:
    """Raise one `UserError` that lists the bad files, each once; do nothing if there are none.

    Args:
        total: number of files, good and bad.
        root: folder that the names are shown relative to.
        advice: a remedy for several files, appended on a separate line.
    """
    ordered = sorted({file.path: file for file in bad}.values(), key=lambda file: file.path)
    if not ordered:
        return
    where = f" under {root}" if root else ""
    lines = [f"data: {len(ordered)} of {total} files{where} cannot be used; repair or remove them:"]
    for file in ordered[:SHOWN_FILES]:
        lines.append(f"  {os.path.relpath(file.path, root) if root else file.path}: {file.reason}")
    if len(ordered) > SHOWN_FILES:
        lines.append(f"  ... and {len(ordered) - SHOWN_FILES} more")
    raise UserError("\n".join([*lines, advice] if advice else lines))


class ByteRange(NamedTuple):
    """The bytes of one image: a whole file, or `size` bytes from `offset` in an archive."""

    file: str
    offset: int | None = None
    size: int | None = None

    def read(self, max_bytes: int | None = None, prefix: bytes = b"") -> bytes:
        """Return the bytes, or nothing if they do not start with `prefix`.

        Raises:
            OSError: the file is not regular, or there are more than `max_bytes`.
        """
        status = os.stat(self.file)
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would block forever
            raise OSError("not a regular file")
        size = status.st_size if self.size is None else self.size
        if max_bytes is not None and size > max_bytes:
            raise OSError(f"more than {max_bytes} bytes")
        descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.pread(descriptor, min(size, len(prefix)), self.offset or 0) != prefix:
                return b""
            return os.pread(descriptor, size, self.offset or 0)
        finally:
            os.close(descriptor)


class FileStamp(NamedTuple):
    """Size in bytes, mtime and ctime in ns of a file; -1 if it cannot be read, which decoding reports."""

    size: int
    mtime: int
    ctime: int


def file_stamps(paths: Iterable[str]) -> list[FileStamp]:
    """Return the stamps of files; of an archive for its members (one system call per archive)."""
    stamp = lru_cache(4096)(_file_stamp)
    return [stamp(byte_range(path).file) for path in paths]


def _file_stamp(file: str) -> FileStamp:
    try:
        status = os.stat(file)
    except OSError:
        return FileStamp(-1, -1, -1)
    return FileStamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


_MEMBER = re.compile(r"(.+?\.tar)//(.+)::(\d+)\+(\d+)", re.DOTALL)  # a pathlib.Path never contains //


def member_path(archive: str | Path, name: str, offset: int, size: int) -> str:
    """Return the path of an uncompressed archive member, ARCHIVE//NAME::OFFSET+SIZE, for use instead of a file path."""
    return f"{archive}//{name}::{offset}+{size}"


def byte_range(path: str) -> ByteRange:
    """Return the location of the bytes of a file, or of an archive member (see `member_path`)."""
    member = _MEMBER.fullmatch(path) if "//" in path else None
    return ByteRange(member[1], int(member[3]), int(member[4])) if member else ByteRange(path)


def cache_folder() -> Path:
    """Return the folder for downloads and caches: `~/.cache/cnntrain`, or `$XDG_CACHE_HOME/cnntrain`."""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "cnntrain"
    try:
        return Path.home() / ".cache" / "cnntrain"
    except RuntimeError as error:  # no HOME, and the user id has no entry in passwd, as in some containers
        raise UserError(
            "no home folder for downloads and caches (HOME is not set and the user has no passwd entry); set HOME or "
            "XDG_CACHE_HOME to a folder, or give data.root"
        ) from error


def dataset_root(root: str | None) -> Path:
    """Return `data.root`, or the folder for downloads if it is not set."""
    return Path(root).expanduser() if root else cache_folder()


def require_root(root: str | None, expected: str) -> Path:
    """Return `data.root` as an existing folder; `expected` is its required content, for the message."""
    if root is None:
        raise UserError(f"data.root: missing; give the folder that has {expected}, as data.root=PATH")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data.root: {folder.absolute()} {problem}; it must have {expected}")
    return folder


def is_file(path: Path) -> bool:
    """Return True if the file exists; False for invalid names (too long, or with a null byte)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_ignored(name: str) -> bool:
    """Return True for hidden files and folders, and for files of file managers."""
    return name.startswith(".") or name.lower() in IGNORED


def has_extension(name: str, extensions: Collection[str]) -> bool:
    """Return True if the file name has one of the (lowercase) extensions, ignoring case."""
    return name.rpartition(".")[2].lower() in extensions


def list_folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders directly in `folder`."""
    return sorted(e.name for e in os.scandir(folder) if os.path.isdir(e.path) and not is_ignored(e.name))


def list_files(folder: Path, bad: list[BadFile]) -> list[str]:
    """Return the sorted paths of all files at any depth; links to a parent folder and special files go to `bad`."""
    found: list[str] = []
    _walk(str(folder), {os.path.realpath(folder)}, found, bad)
    return sorted(found)


def _walk(folder: str, parents: set[str], found: list[str], bad: list[BadFile]) -> None:
    for entry in os.scandir(folder):
        if is_ignored(entry.name):
            continue
        if entry.is_file(follow_symlinks=False):  # known from the folder, without a system call per file
            found.append(entry.path)
        elif os.path.isdir(entry.path):  # False for a link to itself, for which entry.is_dir() would raise
            real = os.path.realpath(entry.path)
            if real in parents or os.path.realpath(folder).startswith(real.rstrip(os.sep) + os.sep):
                bad.append(BadFile(entry.path, "is a link to one of its parent folders"))
            else:
                _walk(entry.path, parents | {real}, found, bad)
        elif not os.path.exists(entry.path):
            bad.append(BadFile(entry.path, "is a broken link"))
        elif not stat.S_ISREG(entry.stat().st_mode):  # reading a FIFO or a device may never end
            bad.append(BadFile(entry.path, "is not a regular file"))
        else:
            found.append(entry.path)


def relative_names(folder: Path, paths: Sequence[str]) -> list[str]:
    """Return the paths relative to `folder`, which all of them start with."""
    start = len(str(folder / "_")) - 1
    return [path[start:] for path in paths]


def common_folder(paths: Iterable[str]) -> str | None:
    """Return the folder that contains all paths; None if there are none."""
    folders = {os.path.dirname(path) for path in paths}
    return os.path.commonpath(folders) if folders else None


def first_file(folder: Path, extensions: Collection[str]) -> str | None:
    """Return a file below the folder that has one of the extensions; None if there is none.

    Links are not followed, and run folders are skipped.
    """
    for parent, folders, files in os.walk(folder):
        if RUN_FILES.intersection(files):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        for name in sorted(files):
            if has_extension(name, extensions) and not is_ignored(name):
                return os.path.join(parent, name)
    return None


def unique_split_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Return the name used for each split; reject two names of one split, ignore names that are not a split."""
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


def find_split_folders(root: Path) -> dict[str, Path]:
    """Return the split folders of `root`: `train`, `val` (or `valid`, `validation`) and `test`."""
    names = unique_split_names(list_folders(root), f"data.root: {root}")
    return {split: root / name for split, name in names.items()}


def require_split_folders(root: Path, layout: str) -> dict[str, Path]:
    """Return the split folders of `root`; require `train/` and reject other folders with images."""
    found = find_split_folders(root)
    if "train" not in found:
        names = list_folders(root)
        there = f"its folders are {', '.join(names[:6])}" if names else "it has no folders"
        remedy = "; move them into train/; validation data will be split off" if names and not found else ""
        raise UserError(f"data.root: {root} has no train/ ({there}{remedy}); it must have {layout}")
    reject_other_folders(root, IMAGE_EXTENSIONS)
    return found


def reject_other_folders(root: Path, extensions: Collection[str]) -> None:
    """Reject folders of `root` that are not a split but have files with these extensions, as they would be ignored."""
    for name in list_folders(root):
        if name not in SPLIT_NAMES and (example := first_file(root / name, extensions)):
            raise UserError(
                f"data.root: {root / name} is not a split, but contains {os.path.relpath(example, root)}; the splits "
                f"are train, val (or valid, or validation) and test{suggest(name.lower(), list(SPLIT_NAMES))}; "
                f"rename the folder, or move it out of {root}"
            )


def download(name: str, root: Path, looked_in: str, allowed: bool = True, **arguments: Any) -> Any:
    """Return torchvision's dataset `name` under `root`; download it if it is missing.

    Args:
        looked_in: where the files were searched, for the message.
        allowed: whether a download is allowed; False if only a checkpoint names the dataset.
        arguments: further arguments of the dataset's class.
    """
    import torchvision.datasets

    open_dataset = partial(getattr(torchvision.datasets, name), str(root), **arguments)
    try:
        try:
            return open_dataset(download=False)
        except (OSError, RuntimeError):  # it is missing or incomplete
            if not allowed:
                raise
        log.info("data: downloading %s to %s", name, root)
        root.mkdir(parents=True, exist_ok=True)
        return open_dataset(download=True)
    except (OSError, RuntimeError, EOFError, ValueError) as error:  # URLError is an OSError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if allowed:
            problem = f"was not found and could not be downloaded ({reason})"
            remedy = "give the folder that contains it with data.root=PATH; data=digits needs no download"
        else:
            problem = f"was not found, and a checkpoint cannot start a download ({reason})"
            remedy = "give data.root=PATH, a folder that contains it or that it should be downloaded to"
        raise UserError(f"data: {name} {problem}\n  looked in {looked_in}\n  {remedy}") from error
