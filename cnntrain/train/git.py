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

from cnntrain.errors import UserError
from cnntrain.io import safe_files as files

MOST_FILES = 50_000  # tracked files to compare with the index
MOST_BYTES = 2**28  # total size of the files to hash
LARGEST_REFS_BYTES = 2**26
_OBJECT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
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
    said = files.read_text(path, largest=4096)
    return (root / said.removeprefix("gitdir:").strip()) if said.startswith("gitdir:") else None


def _head(git: Path) -> str | None:
    said = files.read_text(git / "HEAD", largest=4096).strip()
    if _OBJECT.fullmatch(said):
        return said
    ref = said.removeprefix("ref:").strip()
    if not _REF.fullmatch(ref) or ".." in ref:
        return None
    common = git
    if files.is_regular(git / "commondir"):
        common = git / files.read_text(git / "commondir", largest=4096).strip()
    for place in (git, common):
        if files.is_regular(place / ref, place):
            said = files.read_text(place / ref, place, largest=4096).strip()
            return said if _OBJECT.fullmatch(said) else None
    if files.is_regular(common / "packed-refs"):
        for line in files.read_text(common / "packed-refs", largest=LARGEST_REFS_BYTES).splitlines():
            name, _, known = line.partition(" ")
            if known == ref and _OBJECT.fullmatch(name):
                return name
    return None


def _is_dirty(root: Path, index: Path, hash_bytes: int) -> bool | None:
    """Return True if a file in the index is missing, unmerged, has another size, or a new time and other content."""
    left = MOST_BYTES
    try:
        for path, mode, size, mtime, name, merged in _entries(
            files.read_bytes(index, largest=MOST_BYTES), hash_bytes
        ):
            if not merged:
                return True
            place = os.path.join(os.fsencode(root), path)
            try:
                now = os.lstat(place)
            except FileNotFoundError:
                return True
            if stat.S_IFMT(mode) == 0o160000:  # a submodule
                continue
            if stat.S_IFMT(now.st_mode) != stat.S_IFMT(mode) or now.st_size & 0xFFFFFFFF != size:
                return True
            if (int(now.st_mtime), now.st_mtime_ns % 10**9) == mtime or not stat.S_ISREG(mode):
                continue
            left -= size
            if left < 0:
                return None
            if _blob(Path(os.fsdecode(place)), len(name)) != name:
                return True
    except (OSError, UserError, ValueError, struct.error, IndexError):
        return None
    return False


def _blob(path: Path, length: int) -> bytes:
    """Return git's object hash for the file's content."""
    content = files.read_bytes(path, largest=MOST_BYTES)
    kind = hashlib.sha1 if length == 20 else hashlib.sha256
    return kind(b"blob %d\0" % len(content) + content, usedforsecurity=False).digest()


def _entries(index: bytes, hash_bytes: int) -> Iterator[tuple[bytes, int, int, tuple[int, int], bytes, bool]]:
    """Yield path, mode, size, (seconds, nanoseconds), object hash, and whether it is merged, of each file in an index.

    Args:
        index: the index file's content.
        hash_bytes: 20 in a SHA-1 repository, 32 in a SHA-256 repository.

    Raises:
        ValueError, struct.error, IndexError: not an index, an unknown version, or too many files.
    """
    magic, version, count = struct.unpack_from(">4sII", index)
    if magic != b"DIRC" or version not in (2, 3, 4) or count > MOST_FILES:
        raise ValueError("not an index, or an index with too many files")
    place, before = 12, b""
    for _ in range(count):
        start = place
        fields = struct.unpack_from(f">10I{hash_bytes}sH", index, place)
        mtime, mode, size, name, flags = fields[2:4], fields[6], fields[9], fields[10], fields[11]
        place += 42 + hash_bytes + (2 if version >= 3 and flags & 0x4000 else 0)
        assumed = flags & 0x8000  # --assume-unchanged
        if version >= 3 and flags & 0x4000:
            assumed |= struct.unpack_from(">H", index, place - 2)[0] & 0x4000  # --skip-worktree
        kept = 0
        if version == 4:  # the path is prefix-compressed against the previous one
            strip, place = _varint(index, place)
            kept = len(before) - strip
            if kept < 0:
                raise ValueError("invalid prefix length of a compressed path")
        end = index.index(b"\0", place)
        path = before[:kept] + index[place:end]
        place = end + 1 if version == 4 else start + (end - start + 8) // 8 * 8
        before = path
        if b".." in path.split(b"/") or path.startswith(b"/"):
            raise ValueError("a path outside the folder")
        if not assumed:
            yield (
                path,
                mode,
                size,
                (mtime[0], mtime[1]),
                name,
                not flags & 0x3000,
            )  # stages above 0 are unmerged


def _varint(index: bytes, place: int) -> tuple[int, int]:
    """Decode git's variable-length integer; return it and the offset after it."""
    byte = index[place]
    value = byte & 0x7F
    while byte & 0x80:
        place += 1
        byte = index[place]
        value = ((value + 1) << 7) | (byte & 0x7F)
    return value, place + 1
