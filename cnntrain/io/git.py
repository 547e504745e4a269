"""Read the git commit of a working directory from git's files, without running git.

`git status` executes programs named in the repository's config (core.fsmonitor, filters, hooks), and a run may be
started in an untrusted folder. Formats: gitrepository-layout(5) and gitformat-index(5).
"""

import hashlib
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cnntrain.errors import UserError
from cnntrain.io import safe_files as files

MAX_FILES = 50_000  # tracked files to compare with the index
MAX_BYTES = 2**28  # total size of the files to hash
MAX_LINK_BYTES = 4096  # of files that contain one path or hash
MAX_REFS_BYTES = 2**26
SUBMODULE = 0o160000  # file type in the index
_HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_REF = re.compile(r"refs/[A-Za-z0-9][\w.+@/-]*")


@dataclass(frozen=True)
class Commit:
    """A checked-out git commit.

    Attributes:
        name: the commit's hash.
        dirty: whether a tracked file differs from the index; None if unknown. Untracked files and staged changes are
            ignored.
    """

    name: str
    dirty: bool | None


def find_commit(folder: Path) -> Commit | None:
    """Return the commit checked out in the repository that contains `folder`; None if there is none."""
    try:
        for root in (folder := folder.resolve(), *folder.parents):
            if (git := _git_folder(root)) is not None:
                name = _head(git)
                return Commit(name, _is_dirty(root, git / "index", len(name) // 2)) if name else None
    except (OSError, UserError, ValueError, struct.error, IndexError, OverflowError):
        pass
    return None


def _git_folder(root: Path) -> Path | None:
    """Return `root/.git`, or the folder that a `.git` file points to (worktrees, submodules)."""
    path = root / ".git"
    if path.is_dir():
        return path
    if not files.is_regular(path):
        return None
    text = files.read_text(path, max_bytes=MAX_LINK_BYTES)
    return (root / text.removeprefix("gitdir:").strip()) if text.startswith("gitdir:") else None


def _head(git: Path) -> str | None:
    """Return the hash of the checked-out commit; None before the first commit."""
    head = files.read_text(git / "HEAD", max_bytes=MAX_LINK_BYTES).strip()
    if _HASH.fullmatch(head):  # a detached HEAD
        return head
    ref = head.removeprefix("ref:").strip()
    if not _REF.fullmatch(ref) or ".." in ref:
        return None
    common = git
    if files.is_regular(git / "commondir"):
        common = git / files.read_text(git / "commondir", max_bytes=MAX_LINK_BYTES).strip()
    for folder in (git, common):
        if files.is_regular(folder / ref, folder):
            name = files.read_text(folder / ref, folder, max_bytes=MAX_LINK_BYTES).strip()
            return name if _HASH.fullmatch(name) else None
    if files.is_regular(common / "packed-refs"):
        for line in files.read_text(common / "packed-refs", max_bytes=MAX_REFS_BYTES).splitlines():
            name, _, packed_ref = line.partition(" ")
            if packed_ref == ref and _HASH.fullmatch(name):
                return name
    return None


def _is_dirty(root: Path, index: Path, hash_bytes: int) -> bool | None:
    """Return True if a file in the index is missing, unmerged, has another size, or a new time and other content."""
    bytes_left = MAX_BYTES
    try:
        for entry in _entries(files.read_bytes(index, max_bytes=MAX_BYTES), hash_bytes):
            path = os.path.join(os.fsencode(root), entry.path)
            if not entry.merged or not os.path.lexists(path):
                return True
            if stat.S_IFMT(entry.mode) == SUBMODULE:
                continue
            found = os.lstat(path)
            if stat.S_IFMT(found.st_mode) != stat.S_IFMT(entry.mode) or found.st_size & 0xFFFFFFFF != entry.size:
                return True
            if divmod(found.st_mtime_ns, 10**9) == entry.mtime or not stat.S_ISREG(entry.mode):
                continue
            bytes_left -= entry.size
            if bytes_left < 0:
                return None
            content = files.read_bytes(Path(os.fsdecode(path)), max_bytes=MAX_BYTES)
            algorithm = "sha1" if hash_bytes == 20 else "sha256"
            if (
                hashlib.new(algorithm, b"blob %d\0" % len(content) + content, usedforsecurity=False).digest()
                != entry.hash
            ):
                return True
    except (OSError, UserError, ValueError, struct.error, IndexError):
        return None
    return False


class _Entry(NamedTuple):
    """A file in git's index; `mtime` is (seconds, nanoseconds)."""

    path: bytes
    mode: int
    size: int
    mtime: tuple[int, int]
    hash: bytes
    merged: bool


def _entries(index: bytes, hash_bytes: int) -> Iterator[_Entry]:
    """Yield the files in an index, without those that git was told to ignore.

    Args:
        index: the index file's content.
        hash_bytes: 20 in a SHA-1 repository, 32 in a SHA-256 repository.

    Raises:
        ValueError, struct.error, IndexError: not an index, an unknown version, or too many files.
    """
    magic, version, count = struct.unpack_from(">4sII", index)
    if magic != b"DIRC" or version not in (2, 3, 4) or count > MAX_FILES:
        raise ValueError("not an index, or an index with too many files")
    offset, path = 12, b""
    for _ in range(count):
        start = offset
        _, _, seconds, nanoseconds, _, _, mode, _, _, size, digest, flags = struct.unpack_from(
            f">10I{hash_bytes}sH", index, offset
        )
        offset += 42 + hash_bytes
        ignored = flags & 0x8000  # --assume-unchanged
        if version >= 3 and flags & 0x4000:  # extended flags follow
            ignored |= struct.unpack_from(">H", index, offset)[0] & 0x4000  # --skip-worktree
            offset += 2
        prefix = b""
        if version == 4:  # the path is prefix-compressed against the previous one
            strip, offset = _read_varint(index, offset)
            if strip > len(path):
                raise ValueError("invalid prefix length of a compressed path")
            prefix = path[: len(path) - strip]
        end = index.index(b"\0", offset)
        path = prefix + index[offset:end]
        offset = end + 1 if version == 4 else start + (end - start + 8) // 8 * 8
        if b".." in path.split(b"/") or path.startswith(b"/"):
            raise ValueError("a path outside the folder")
        if not ignored:
            yield _Entry(path, mode, size, (seconds, nanoseconds), digest, merged=not flags & 0x3000)  # stage 0


def _read_varint(index: bytes, offset: int) -> tuple[int, int]:
    """Decode git's variable-length integer; return it and the offset after it."""
    value = index[offset] & 0x7F
    while index[offset] & 0x80:
        offset += 1
        value = ((value + 1) << 7) | (index[offset] & 0x7F)
    return value, offset + 1
