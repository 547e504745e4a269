"""Safe file access inside run folders: open regular files only and never follow symbolic links.

A run folder may come from an untrusted source. A link inside it could make the program read, truncate or overwrite a
file elsewhere, and opening a FIFO would block forever. Links on the path to a run folder (`outputs` on another disk)
and links inside data folders are allowed. `root` is the folder below which no link is followed; it defaults to the
file's parent folder. Files are replaced atomically: a reader sees either the old file or the new one.

A path that is a link, lies below one, or is of another kind than expected raises `UserError`. Operations that fail
raise `OSError` with the path as its `filename`.
"""

import contextlib
import csv
import io
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cnntrain.errors import UserError

MAX_TEXT_BYTES = 8 * 2**20  # parsing can take up to 100 times the file's size in memory
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_HINT = "links inside a run folder are not followed; put the file itself there, or choose another run folder"


def run_folder_of(path: Path) -> Path:
    """Return the run folder that contains a checkpoint or figure."""
    return path.parent.parent if path.parent.name in ("checkpoints", "figures") else path.parent


def is_regular(path: Path, root: Path | None = None) -> bool:
    """Return True if `path` is a regular file and no link lies between `root` and it."""
    return _has_kind(path, root, stat.S_ISREG)


def is_folder(path: Path, root: Path | None = None) -> bool:
    """Return True if `path` is a folder and no link lies between `root` and it."""
    return _has_kind(path, root, stat.S_ISDIR)


def exists(path: Path) -> bool:
    """Return True if the path exists; a broken link counts as existing."""
    return os.path.lexists(path)


def open_read(path: Path, root: Path | None = None) -> IO[bytes]:
    """Open a regular file for reading."""
    return _with_name(path, _open(path, root, os.O_RDONLY), "rb")


def read_bytes(path: Path, root: Path | None = None, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Return the content of a regular file; raise `UserError` if it has more than `max_bytes` bytes."""
    with open_read(path, root) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise UserError(f"{path}: the file is larger than the limit of {max_bytes:,} bytes")
        return file.read()


def read_text(path: Path, root: Path | None = None, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the content of a regular UTF-8 text file; raise `UserError` if it is not valid."""
    content = read_bytes(path, root, max_bytes)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: is not UTF-8 text; use another file") from error


def read_json(path: Path, remedy: str, root: Path | None = None) -> dict[str, Any]:
    """Return the object in a JSON file; raise `UserError`, with this remedy, if the file is damaged."""
    text = read_text(path, root)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = "is empty" if not text.strip() else f"is damaged ({error})"
        raise UserError(f"{path}: {problem}; {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object; {remedy}")
    return content


def write_atomic(path: Path, content: bytes | memoryview, root: Path | None = None, sync: bool = True) -> None:
    """Write a file with `open_atomic`."""
    with open_atomic(path, root, sync) as file:
        file.write(content)


def write_text(path: Path, text: str, root: Path | None = None, sync: bool = True) -> None:
    """Write text with `open_atomic`, encoded in UTF-8; bytes that are not valid UTF-8 (in file names) are escaped."""
    write_atomic(path, text.encode("utf-8", "backslashreplace"), root, sync)


@contextlib.contextmanager
def open_atomic(path: Path, root: Path | None = None, sync: bool = True) -> Iterator[IO[bytes]]:
    """Yield a temporary binary file that replaces `path` when the block ends without an error; else it is removed.

    Args:
        sync: call fsync so that the file survives a power failure. Killing the process is safe without it too.
    """
    with _parent(path, root) as (folder, name):
        temporary = f".{name}.{os.getpid()}.tmp"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS
            with open(os.open(temporary, flags, 0o666, dir_fd=folder), "wb") as file:
                yield file
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            if sync:
                os.fsync(folder)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            if isinstance(error, OSError) and error.filename in (None, name, temporary):
                error.filename, error.filename2 = str(path), None
            raise


@contextlib.contextmanager
def open_atomic_text(path: Path, root: Path | None = None, sync: bool = True) -> Iterator[IO[str]]:
    """Variant of `open_atomic` for UTF-8 text; line endings are not translated, as the csv module requires."""
    with open_atomic(path, root, sync) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", errors="backslashreplace")
        yield text
        text.detach()  # flushes; `file` stays open


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a CSV file with the union of their columns."""
    with open_atomic_text(path, sync=False) as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def open_append(path: Path, root: Path | None = None) -> IO[bytes]:
    """Open a regular file without other hard links for appending; create it if it is missing."""
    descriptor = _open(path, root, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise UserError(f"{path}: has another hard link; {_HINT}")
    return _with_name(path, descriptor, "ab")


def open_append_text(path: Path, root: Path | None = None) -> io.TextIOWrapper:
    """Variant of `open_append` for UTF-8 text, line buffered."""
    file = open_append(path, root)
    return io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def open_new(path: Path, root: Path | None = None) -> IO[bytes]:
    """Create a file and open it for writing; raise `FileExistsError` if it exists already."""
    return _with_name(path, _open(path, root, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")


def open_lock(path: Path, root: Path | None = None) -> IO[bytes]:
    """Open a file for `fcntl.flock` without changing its content; create it if it is missing."""
    return open(_open(path, root, os.O_RDWR | os.O_CREAT), "r+b", buffering=0)


def make_folder(path: Path, root: Path | None = None) -> None:
    """Create a folder and its missing parents below `root`."""
    with _parent(path, root, make=True) as (folder, name):
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=folder)
        os.close(_open_folder(folder, name, path))


def remove(path: Path, root: Path | None = None) -> None:
    """Delete a file or link (never the link's target); do nothing if it is missing."""
    with _parent(path, root) as (folder, name), contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


@contextlib.contextmanager
def _parent(path: Path, root: Path | None, make: bool = False) -> Iterator[tuple[int, str]]:
    """Yield a descriptor of the parent folder of `path`, and the file's name."""
    root = path.parent if root is None else root
    *folders, name = path.relative_to(root).parts
    if ".." in folders or name == "..":
        raise UserError(f"{path}: lies outside {root}")
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        folder = root
        for each in folders:
            folder = folder / each
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(each, dir_fd=descriptor)
            inner = _open_folder(descriptor, each, folder)
            os.close(descriptor)
            descriptor = inner
        yield descriptor, name
    finally:
        os.close(descriptor)


def _open_folder(folder: int, name: str, path: Path) -> int:
    """Open the folder `name` inside `folder`; return its descriptor."""
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        mode = _mode(folder, name)
        if stat.S_ISLNK(mode):
            raise UserError(f"{path}: is a link; {_HINT}") from error
        if mode and not stat.S_ISDIR(mode):
            raise UserError(f"{path}: must be a folder; remove this file, or choose another run folder") from error
        error.filename = str(path)
        raise


def _open(path: Path, root: Path | None, flags: int) -> int:
    with _parent(path, root) as (folder, name):
        try:
            descriptor = os.open(name, flags | _FLAGS, 0o666, dir_fd=folder)
        except OSError as error:
            mode = _mode(folder, name)
            if mode and not stat.S_ISREG(mode):
                raise _not_regular(path, mode) from error
            error.filename = str(path)
            raise
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return descriptor
        os.close(descriptor)
        raise _not_regular(path, mode)


def _with_name(path: Path, descriptor: int, mode: str) -> IO[bytes]:
    """Return a file object for an open descriptor, with `name` set."""
    return open(path, mode, opener=lambda *_: descriptor)


def _not_regular(path: Path, mode: int) -> UserError:
    if stat.S_ISLNK(mode):
        return UserError(f"{path}: is a link; {_HINT}")
    kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO" if stat.S_ISFIFO(mode) else "not a regular file"
    return UserError(f"{path}: must be a regular file, but is {kind}; remove it, or choose another run folder")


def _mode(folder: int, name: str) -> int:
    """Return the `st_mode` of this name without following a link; 0 if nothing has the name."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except OSError:
        return 0


def _has_kind(path: Path, root: Path | None, kind: Callable[[int], bool]) -> bool:
    try:
        with _parent(path, root) as (folder, name):
            return kind(_mode(folder, name))
    except (OSError, UserError):
        return False
