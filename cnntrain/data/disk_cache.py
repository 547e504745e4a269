"""Cache files of decoded images. They are memory-mapped, so a dataset may be larger than the RAM.

The name of a cache file is a hash of its inputs (paths, sizes and modification times of the image files, decoder,
boxes), so an outdated cache file is never used. Cache files are written atomically, and several processes may use
them at the same time. Checksums detect corruption, and image files that changed without a new size or time.
"""

import fcntl
import hashlib
import logging
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnntrain.data.examples import LazyImages
from cnntrain.data.files import BadFile, byte_range, cache_folder, file_stamps
from cnntrain.data.parallel import decode_into, thread_map
from cnntrain.errors import MachineError

FORMAT_VERSION = 3  # files of another version are rebuilt
MAX_SHARE_OF_DISK = 0.5  # of the free space
CHUNK_BYTES = 1 << 26  # per checksum
log = logging.getLogger("cnntrain")


class Parts(NamedTuple):
    """Memory-mapped parts of a cache file, in the order of the file; all checksums are CRC-32."""

    ctimes: np.ndarray  # (N,) int64, ctime of each image file in ns; unlike mtime, it cannot be set
    matrices: np.ndarray  # (N, 3, 3) float64, from source to target pixels
    file_checksums: np.ndarray  # (N,) uint32, of each image file
    pixels: np.ndarray  # uint8, of the shape of the images
    chunk_checksums: np.ndarray  # uint32, of each 64 MiB chunk of the three parts before it


def folder() -> Path:
    """Return the folder of the cache files; `cnntrain clean` removes it."""
    return cache_folder() / "decoded"


def has_room(lazy: Sequence[LazyImages], needed: int) -> bool:
    """Return True if `needed` bytes, minus those of existing cache files, are at most half of the free space."""
    with suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        available = MAX_SHARE_OF_DISK * shutil.disk_usage(folder()).free
        if needed <= available:
            return True
        paths = [CacheFile(images).path for images in lazy]
        return needed - sum(path.stat().st_size for path in paths if path.exists()) <= available
    return False


def load_or_decode(lazy: LazyImages, bad: list[BadFile]) -> tuple[Tensor, Tensor]:
    """Return uint8 (N, ...) and float64 (N, 3, 3), mapped from the cache file, which is created if it is missing.

    Bad files are added to `bad`; zeros are returned in that case.
    """
    cache = CacheFile(lazy)
    cache.path.parent.mkdir(parents=True, exist_ok=True)
    if not cache.is_current():
        with _exclusive_lock(cache.path.with_suffix(".lock")):
            # Another process may have written or confirmed the file in the meantime.
            if not cache.is_current() and not cache.confirm():
                cache.create(bad)
    if bad or not cache.path.exists():
        zero = torch.zeros(1)
        return zero.byte().expand(lazy.shape), zero.double().expand(len(lazy), 3, 3)
    parts = cache.map_parts(cache.path, "c")
    return torch.from_numpy(parts.pixels), torch.from_numpy(parts.matrices)


class CacheFile:
    """The cache file of images or masks, which may not exist yet; its name is a hash of all inputs."""

    def __init__(self, lazy: LazyImages) -> None:
        self.lazy = lazy
        stamps = file_stamps(lazy.paths)
        self.ctimes = np.array([stamp.ctime for stamp in stamps], np.int64)
        digest = hashlib.sha256(_identify_decoder(lazy).encode())
        if lazy.boxes is not None:
            digest.update(lazy.boxes.double().contiguous().numpy().tobytes())
        absolute = lru_cache(4096)(os.path.abspath)  # one call per folder
        for path, stamp in zip(lazy.paths, stamps, strict=True):
            parent, name = os.path.split(path)
            line = f"{absolute(parent)}/{name}\0{stamp.size} {stamp.mtime}\n"
            digest.update(line.encode(errors="surrogateescape"))
        self.path = folder() / f"{digest.hexdigest()[:32]}.u8"
        count = len(lazy)
        self.chunks = -(-(count * (9 * 8 + 4) + math.prod(lazy.shape)) // CHUNK_BYTES)
        shapes = ((count,), (count, 3, 3), (count,), lazy.shape, (self.chunks,))
        kinds = (np.int64, np.float64, np.uint32, np.uint8, np.uint32)
        self.layout = list(zip(map(np.dtype, kinds), shapes, strict=True))
        self.size = sum(kind.itemsize * math.prod(shape) for kind, shape in self.layout)

    def map_parts(self, path: Path, mode: Literal["c", "r+"]) -> Parts:
        """Map a complete or partial cache file; in mode "c" (copy-on-write), writes stay in this process."""
        content, parts, start = np.memmap(path, np.uint8, mode), [], 0
        for kind, shape in self.layout:
            parts.append(np.ndarray(shape, kind, content, start))
            start += kind.itemsize * math.prod(shape)
        return Parts(*parts)

    def is_current(self) -> bool:
        """Return True if the file is intact and no image file has changed since it was written or confirmed."""
        if not self.path.exists() or self.path.stat().st_size != self.size:
            return False
        return np.array_equal(self.map_parts(self.path, "c").ctimes, self.ctimes) and self.is_intact()

    def is_intact(self) -> bool:
        stored = self.map_parts(self.path, "c").chunk_checksums
        return np.array_equal(stored, self.compute_checksums(self.path))

    def confirm(self) -> bool:
        """Return True if image files with a new ctime (for example, after a copy) still have the same bytes.

        The new ctimes are then stored. Size and modification time are equal, but they can be set to any value, so the
        bytes are compared by checksum.
        """
        if not self.path.exists():
            return False
        if self.path.stat().st_size != self.size or not self.is_intact():
            log.warning("data: %s is damaged (wrong size or checksum); its images are decoded again", self.path)
            return False
        parts, paths = self.map_parts(self.path, "r+"), self.lazy.paths
        rows = np.flatnonzero(parts.ctimes != self.ctimes).tolist()
        description = f"verifying the checksums of {len(rows):,} files"
        checksums = thread_map(lambda row: _file_checksum(paths[row]), rows, description)
        changed = [row for row, value in zip(rows, checksums, strict=True) if value != parts.file_checksums[row]]
        if changed:
            first = paths[changed[0]]
            log.info("data: %d image files have changed (first %s); all are decoded again", len(changed), first)
            return False
        parts.ctimes[:] = self.ctimes
        return True

    def create(self, bad: list[BadFile]) -> None:
        """Decode all images into the file; on bad files, add them to `bad` and create nothing."""
        # A leftover is from a dead process, because this process holds the lock.
        temporary = self.path.with_suffix(".part")
        try:
            with temporary.open("wb") as file:
                _reserve(file.fileno(), self.size, self.path)
            parts = self.map_parts(temporary, "r+")
            images, matrices = torch.from_numpy(parts.pixels), torch.from_numpy(parts.matrices)

            def store_checksum(row: int) -> None:
                parts.file_checksums[row] = _file_checksum(self.lazy.paths[row])

            description = f"decoding {len(self.lazy):,} files (only once)"
            if found := decode_into(images, matrices, self.lazy, description, store_checksum):
                bad += found
                return
            parts.ctimes[:] = self.ctimes
            parts.chunk_checksums[:] = self.compute_checksums(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def compute_checksums(self, path: Path) -> list[int]:
        """Return the CRC-32 of each chunk: about 3 GB/s per core, of data that will be read soon anyway."""
        content = np.memmap(path, np.uint8, "r").data
        start, end = 8 * len(self.lazy), self.size - 4 * self.chunks

        def checksum(chunk: int) -> int:
            first = start + chunk * CHUNK_BYTES
            return zlib.crc32(content[first : min(first + CHUNK_BYTES, end)])

        return thread_map(checksum, range(self.chunks))


def _identify_decoder(lazy: LazyImages) -> str:
    from PIL import __version__ as pillow
    from simplejpeg import __version__ as simplejpeg

    return f"{FORMAT_VERSION} {pillow} {simplejpeg} {lazy.decoder!r} {lazy.shape}"


def _file_checksum(path: str) -> int:
    """Return the CRC-32 of an image file's bytes; 0 on a read error, which decoding reports."""
    try:
        return zlib.crc32(byte_range(path).read())
    except OSError:
        return 0


def _reserve(file: int, size: int, path: Path) -> None:
    """Allocate disk space: on a full disk, a write to a mapped file would kill the process."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.truncate(file, size)
    except OSError as error:
        raise MachineError(
            f"data.cache=disk: {path.parent} has no room for {size / 2**20:.0f} MiB of decoded images "
            f"({error.strerror}); free some space, set XDG_CACHE_HOME to another disk, or set data.cache=none"
        ) from error


@contextmanager
def _exclusive_lock(lock: Path) -> Iterator[None]:
    """Wait until no other process creates the same cache file."""
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                is_same = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
            except FileNotFoundError:
                is_same = False
            if not is_same:
                continue  # the previous owner removed the file; another process may hold a new one
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
