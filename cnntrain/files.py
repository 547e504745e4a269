"""Open files inside a run folder, which a stranger may have filled: regular files only, no link is followed.

A run folder may itself be reached through links (`outputs` on another disk), and data folders may contain them. What
lies inside a run folder may not: a link there would let a stranger's folder read, empty or overwrite a file elsewhere,
and opening a FIFO would wait forever. `root` is the folder from which on no link is followed, by default the file's
own folder. Files are replaced, never written in place: a reader sees the old file or the new one.
"""

import contextlib
import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from cnntrain.errors import UserError

LARGEST_TEXT_BYTES = 8 * 2**20  # parsed, text takes up to a hundred times its size in memory
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_HINT = "links inside a run folder are not followed; put the file itself there, or choose another run folder"


def run_folder_of(path: Path) -> Path:
    """The run folder that a checkpoint or figure lies in."""
    return path.parent.parent if path.parent.name in ("checkpoints", "figures") else path.parent


def is_regular(path: Path, root: Path | None = None) -> bool:
    """Whether `path` is a regular file that is reached from `root` without a link."""
    return _has_kind(path, root, stat.S_ISREG)


def is_folder(path: Path, root: Path | None = None) -> bool:
    """Whether `path` is a folder that is reached from `root` without a link."""
    return _has_kind(path, root, stat.S_ISDIR)


def exists(path: Path) -> bool:
    """Whether anything has this name, a link to nothing included."""
    return os.path.lexists(path)


def open_read(path: Path, root: Path | None = None) -> IO[bytes]:
    """A regular file, open for reading.

    Raises:
        UserError: it is a link, or no regular file.
        OSError: it is missing, or can't be read.
    """
    return _named(path, _open(path, root, os.O_RDONLY), "rb")


def read_bytes(path: Path, root: Path | None = None, largest: int = LARGEST_TEXT_BYTES) -> bytes:
    """The content of a regular file of at most `largest` bytes.

    Raises:
        UserError: it is a link, no regular file, or too large.
        OSError: it is missing, or can't be read.
    """
    with open_read(path, root) as file:
        if os.fstat(file.fileno()).st_size > largest:
            raise UserError(f"{path}: is larger than {largest:,} bytes, which no such file is")
        return file.read()


def read_text(path: Path, root: Path | None = None, largest: int = LARGEST_TEXT_BYTES) -> str:
    """The content of a regular UTF-8 text file.

    Raises:
        UserError: see `read_bytes`; or it is not UTF-8.
        OSError: it is missing, or can't be read.
    """
    content = read_bytes(path, root, largest)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: is not UTF-8 text; use another file") from error


def read_json(path: Path, remedy: str, root: Path | None = None) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        remedy: what to do where the file is damaged; ends the message.

    Raises:
        UserError: see `read_text`; or it is empty, cut off or no JSON object.
        OSError: it is missing, or can't be read.
    """
    text = read_text(path, root)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = "is empty" if not text.strip() else f"is damaged ({error})"
        raise UserError(f"{path}: {problem}; {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; {remedy}")
    return content


def write_whole(path: Path, content: bytes | memoryview, root: Path | None = None, sync: bool = True) -> None:
    """Write a file aside, sync it to the disk, then put it in place: `path` is the old file or the new one, whole.

    Args:
        sync: whether it must survive a power failure; without it, a kill of the process does no harm either.

    Raises:
        UserError: a folder on the way is a link.
        OSError: the file can't be written; no temporary is left.
    """
    with replacing(path, root, sync) as file:
        file.write(content)


def write_text(path: Path, text: str, root: Path | None = None, sync: bool = True) -> None:
    """`write_whole` with text in UTF-8; bytes of file names that are not UTF-8 are escaped."""
    write_whole(path, text.encode("utf-8", "backslashreplace"), root, sync)


@contextlib.contextmanager
def replacing(path: Path, root: Path | None = None, sync: bool = True) -> Iterator[IO[bytes]]:
    """A new binary file that takes the place of `path` once the block ends without an error.

    Args:
        sync: see `write_whole`.

    Raises:
        UserError: a folder on the way is a link.
        OSError: the file can't be written; no temporary is left.
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
def replacing_text(path: Path, root: Path | None = None, sync: bool = True) -> Iterator[IO[str]]:
    """`replacing` for UTF-8 text with its line ends as written, as the csv module wants it."""
    with replacing(path, root, sync) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", errors="backslashreplace")
        yield text
        text.detach()  # flushes; `file` stays open


def open_append(path: Path, root: Path | None = None) -> IO[bytes]:
    """A regular file, open for appending; made where it is missing.

    Raises:
        UserError: it is a link, no regular file, or has a second name elsewhere (a hard link).
        OSError: it can't be opened.
    """
    descriptor = _open(path, root, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise UserError(f"{path}: is a hard link to a file that has another name too; {_HINT}")
    return _named(path, descriptor, "ab")


def open_append_text(path: Path, root: Path | None = None) -> io.TextIOWrapper:
    """`open_append` for UTF-8 text, handed on line by line."""
    file = open_append(path, root)
    return io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def open_new(path: Path, root: Path | None = None) -> IO[bytes]:
    """A file that was not there before, open for writing.

    Raises:
        FileExistsError: it is there.
        UserError: a folder on the way is a link.
        OSError: it can't be made.
    """
    return _named(path, _open(path, root, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")


def open_lock(path: Path, root: Path | None = None) -> IO[bytes]:
    """A file for `fcntl.flock`; made where it is missing, its content left alone.

    Raises:
        UserError: it is a link, or no regular file.
        OSError: it can't be opened.
    """
    return open(_open(path, root, os.O_RDWR | os.O_CREAT), "r+b", buffering=0)


def make_folder(path: Path, root: Path | None = None) -> None:
    """Make a folder and those on the way from `root`, where they are missing.

    Raises:
        UserError: one of them is a link or a file.
        OSError: it can't be made.
    """
    with _parent(path, root, make=True) as (folder, name):
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=folder)
        os.close(_enter(folder, name, path))


def remove(path: Path, root: Path | None = None) -> None:
    """Delete a file, or the link that has its name; nothing where there is none.

    Raises:
        UserError: a folder on the way is a link.
        OSError: it can't be deleted.
    """
    with _parent(path, root) as (folder, name), contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


@contextlib.contextmanager
def _parent(path: Path, root: Path | None, make: bool = False) -> Iterator[tuple[int, str]]:
    """A descriptor of the folder that holds `path`, and the file's name in it."""
    root = path.parent if root is None else root
    *folders, name = path.relative_to(root).parts
    if ".." in folders or name == "..":
        raise UserError(f"{path}: leaves {root}")
    here = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        reached = root
        for each in folders:
            reached = reached / each
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(each, dir_fd=here)
            inner = _enter(here, each, reached)
            os.close(here)
            here = inner
        yield here, name
    finally:
        os.close(here)


def _enter(folder: int, name: str, path: Path) -> int:
    """A descriptor of the folder `name` inside `folder`."""
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        mode = _mode(folder, name)
        if stat.S_ISLNK(mode):
            raise UserError(f"{path}: is a link; {_HINT}") from error
        if mode and not stat.S_ISDIR(mode):
            raise UserError(
                f"{path}: must be a folder; remove this file, or choose another run folder"
            ) from error
        error.filename = str(path)
        raise


def _open(path: Path, root: Path | None, flags: int) -> int:
    with _parent(path, root) as (folder, name):
        try:
            descriptor = os.open(name, flags | _FLAGS, 0o666, dir_fd=folder)
        except OSError as error:
            mode = _mode(folder, name)
            if mode and not stat.S_ISREG(mode):
                raise _irregular(path, mode) from error
            error.filename = str(path)
            raise
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return descriptor
        os.close(descriptor)
        raise _irregular(path, mode)


def _named(path: Path, descriptor: int, mode: str) -> IO[bytes]:
    """A file object of an open file, which knows its name."""
    return open(path, mode, opener=lambda *_: descriptor)


def _irregular(path: Path, mode: int) -> UserError:
    if stat.S_ISLNK(mode):
        return UserError(f"{path}: is a link; {_HINT}")
    kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO" if stat.S_ISFIFO(mode) else "no regular file"
    return UserError(
        f"{path}: is {kind}, and must be a regular file; remove it, or choose another run folder"
    )


def _mode(folder: int, name: str) -> int:
    """Type and permissions of what has this name, a link itself; 0 where there is nothing."""
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
