"""Images decoded once and kept in a file, for runs to come: mapped into memory, so that a set may be larger than it."""

import fcntl
import hashlib
import logging
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnntrain.data.cache import decoded_bytes, lazy_images, read_all
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.image_reader import BadFile
from cnntrain.data.parallel import MANY, decode_into, in_threads
from cnntrain.data.source import default_root
from cnntrain.data.spans import span_of
from cnntrain.errors import MachineError, UserError

log = logging.getLogger("cnntrain")
FORMAT = 3  # file format version; files of another version are rebuilt
SHARE_OF_DISK = 0.5  # of what is free
MATRIX = 3 * 3 * 8  # bytes
CHUNK = 1 << 26  # bytes per checksum


def folder() -> Path:
    """Where decoded images are kept; `cnntrain clean` removes it."""
    return default_root() / "decoded"


def worth_keeping(splits: dict[str, Examples]) -> bool:
    """Whether there are many files to decode, and room for what they become."""
    lazy = lazy_images(splits)
    ours = all(
        type(images.decoder).__module__.startswith("cnntrain.") for images in lazy
    )  # others' code may change
    if not ours or sum(map(len, lazy)) < MANY:
        return False
    wanted = sum(map(decoded_bytes, splits.values()))
    with suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        room = SHARE_OF_DISK * shutil.disk_usage(folder()).free
        if wanted <= room:
            return True
        present = sum(path.stat().st_size for path, _ in map(_identify, lazy) if path.exists())
        return wanted - present <= room
    return False


def keep_decoded(splits: dict[str, Examples]) -> dict[str, Examples]:
    """The same examples with images and masks mapped from files, which are made where they are missing.

    The name of a cache file is a hash of its inputs (paths, sizes and modification times of the image files, decoder,
    boxes), so an outdated cache file is never used. Cache files are written atomically, and several processes may use
    them at the same time. Checksums detect corruption, and image files that changed without a new size or time.

    Raises:
        UserError: names all the files that can't be used; or a decoder does not tell what it does.
        MachineError: the disk is full.
    """
    for lazy in lazy_images(splits):
        if not is_dataclass(lazy.decoder):
            kind = type(lazy.decoder).__name__
            raise UserError(
                f"data.cache=disk: {kind} is no dataclass, so nothing tells one from another; take data.cache=ram"
            )
    kept = read_all(splits, _keep)
    size = sum(map(decoded_bytes, splits.values())) / 2**20
    log.info("data: decoded images are kept in %s (%.0f MiB); `cnntrain clean` removes them", folder(), size)
    return kept


def _keep(lazy: LazyImages, bad: list[BadFile]) -> tuple[Tensor, Tensor]:
    """uint8 (N, ...) and float64 (N, 3, 3), mapped from their file; black where a file can't be used."""
    target, changed = _identify(lazy)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not _is_current(target, lazy, changed):
        with _alone(target.with_suffix(".lock")):
            # Another process may have written or confirmed it in the meantime.
            if not _is_current(target, lazy, changed) and not _confirm(target, lazy, changed):
                _make(lazy, target, changed, bad)
    if bad or not target.exists():  # some files are unusable, so all will be rejected
        nothing = torch.zeros(1)
        return nothing.byte().expand(lazy.shape), nothing.double().expand(len(lazy), 3, 3)
    parts = _map(target, lazy, "c")
    return torch.from_numpy(parts.pixels), torch.from_numpy(parts.matrices)


class Parts(NamedTuple):
    """Memory-mapped parts of a cache file of decoded images, in the order of the file.

    Attributes:
        changed: (N,) int64, ctime of each image file in ns; unlike mtime, it cannot be set.
        matrices: (N, 3, 3) float64.
        sources: (N,) uint32, CRC-32 of each image file.
        pixels: uint8, of the images' shape.
        sums: (chunks,) uint32, CRC-32 of each 64 MiB chunk of the parts between `changed` and `sums`.
    """

    changed: np.ndarray
    matrices: np.ndarray
    sources: np.ndarray
    pixels: np.ndarray
    sums: np.ndarray


def _layout(lazy: LazyImages) -> list[tuple[type, tuple[int, ...]]]:
    count = len(lazy)
    summed = count * (MATRIX + 4) + math.prod(lazy.shape)
    chunks = -(-summed // CHUNK)
    return [(np.int64, (count,)), (np.float64, (count, 3, 3)), (np.uint32, (count,)), (np.uint8, lazy.shape),
            (np.uint32, (chunks,))]  # fmt: skip


def _size(lazy: LazyImages) -> int:
    """Return the size of the whole file in bytes."""
    return sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in _layout(lazy))


def _map(path: Path, lazy: LazyImages, mode: Literal["c", "r+"]) -> Parts:
    """Map the parts of a cache file; in mode "c" (copy-on-write), writes stay in this process."""
    whole, parts, start = np.memmap(path, np.uint8, mode), [], 0
    for kind, shape in _layout(lazy):
        stop = start + np.dtype(kind).itemsize * math.prod(shape)
        parts.append(np.ndarray(shape, kind, whole, start))
        start = stop
    return Parts(*parts)


def _make(lazy: LazyImages, target: Path, changed: np.ndarray, bad: list[BadFile]) -> None:
    aside = target.with_suffix(".part")  # whoever made one that is left behind is gone: we have the lock
    try:
        with aside.open("wb") as file:
            _reserve(file.fileno(), _size(lazy), target)
        parts = _map(aside, lazy, "r+")
        images, matrices = torch.from_numpy(parts.pixels), torch.from_numpy(parts.matrices)

        def note(row: int) -> None:
            parts.sources[row] = _sum_of_file(lazy.paths[row])

        found = decode_into(images, matrices, lazy, f"decoding {len(lazy):,} files (only once)", note)
        if found:
            bad += found
            return
        parts.changed[:] = changed
        parts.sums[:] = _sums(aside, lazy)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _is_current(target: Path, lazy: LazyImages, changed: np.ndarray) -> bool:
    """Return True if the cache file is intact and no image file has changed since it was written or confirmed."""
    if not target.exists() or target.stat().st_size != _size(lazy):
        return False
    parts = _map(target, lazy, "c")
    return np.array_equal(parts.changed, changed) and np.array_equal(parts.sums, _sums(target, lazy))


def _confirm(target: Path, lazy: LazyImages, changed: np.ndarray) -> bool:
    """Return True if image files with a new ctime (for example, after a copy) still have the same bytes.

    The new ctimes are then stored. Size and modification time are equal, but they can be set to any value, so the bytes
    are compared by checksum.
    """
    if not target.exists():
        return False
    if target.stat().st_size != _size(lazy):
        log.warning("data: %s is truncated or damaged; its images are decoded again", target)
        return False
    parts = _map(target, lazy, "r+")
    if not np.array_equal(parts.sums, _sums(target, lazy)):
        log.warning("data: %s is damaged (its checksum is wrong); its images are decoded again", target)
        return False
    rows = np.flatnonzero(parts.changed != changed).tolist()
    sums = in_threads(lambda row: _sum_of_file(lazy.paths[row]), rows, f"reading {len(rows):,} files again")
    if other := [row for row, value in zip(rows, sums, strict=True) if value != parts.sources[row]]:
        first = lazy.paths[other[0]]
        log.info("data: %d image files have changed (first %s); all are decoded again", len(other), first)
        return False
    parts.changed[:] = changed
    return True


def _sums(path: Path, lazy: LazyImages) -> list[int]:
    """Return the CRC-32 of each chunk: about 3 GB/s per core, of data that will be read soon anyway."""
    content = np.memmap(path, np.uint8, "r").data
    chunks, first = math.prod(_layout(lazy)[-1][1]), 8 * len(lazy)
    end = len(content) - 4 * chunks

    def one(chunk: int) -> int:
        start = first + chunk * CHUNK
        return zlib.crc32(content[start : min(start + CHUNK, end)])

    return in_threads(one, range(chunks))


def _sum_of_file(path: str) -> int:
    """Return the CRC-32 of an image file's bytes; 0 on a read error, which decoding reports."""
    span = span_of(path)
    try:
        with open(span.file, "rb") as file:
            if span.size is None:
                return zlib.crc32(file.read())
            return zlib.crc32(os.pread(file.fileno(), span.size, span.offset or 0))
    except OSError:
        return 0


def _reserve(file: int, size: int, target: Path) -> None:
    """Have so many bytes of room: a disk that is full would kill whoever writes to what is mapped."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.truncate(file, size)
    except OSError as error:
        raise MachineError(
            f"data.cache=disk: {target.parent} has no room for {size / 2**20:.0f} MiB of decoded images "
            f"({error.strerror}); make room, set XDG_CACHE_HOME to another disk, or take data.cache=none"
        ) from error


def _identify(lazy: LazyImages) -> tuple[Path, np.ndarray]:
    """Return the path of the cache file (a hash of all inputs), and the (N,) int64 ctimes of the image files in ns."""
    from PIL import __version__ as pillow
    from simplejpeg import __version__ as simplejpeg

    digest = hashlib.sha256(f"{FORMAT} {pillow} {simplejpeg} {lazy.decoder!r} {lazy.shape}".encode())
    if lazy.boxes is not None:
        digest.update(lazy.boxes.double().contiguous().numpy().tobytes())
    about = lru_cache(4096)(_about)  # of a shard once
    absolute = lru_cache(4096)(os.path.abspath)  # of a folder once
    changes = np.zeros(len(lazy), np.int64)
    for row, path in enumerate(lazy.paths):
        size, modified, changes[row] = about(span_of(path).file)
        parent, name = os.path.split(path)
        digest.update(f"{absolute(parent)}/{name}\0{size} {modified}\n".encode(errors="surrogateescape"))
    return folder() / f"{digest.hexdigest()[:32]}.u8", changes


def _about(file: str) -> tuple[int, int, int]:
    """Return size in bytes, mtime and ctime in ns; -1 on an error, which decoding reports."""
    try:
        found = os.stat(file)
    except OSError:
        return -1, -1, -1
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process makes the same file."""
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(lock, file.fileno()):
                continue  # who held it before has removed it, and others may hold another one now
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
