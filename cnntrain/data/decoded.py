"""Images decoded once and kept in a file, for runs to come: mapped into memory, so that a set may be larger than it."""

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnntrain.data.decode import BadFile
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.parallel import MANY, decode_into
from cnntrain.data.resident import decoded_bytes, lazy_images, read_all
from cnntrain.data.source import default_root
from cnntrain.data.spans import span_of
from cnntrain.errors import MachineError, UserError

log = logging.getLogger("cnntrain")
FORMAT = 2  # of the files; another one makes them anew
SHARE_OF_DISK = 0.5  # of what is free
MATRIX = 3 * 3 * 8  # bytes


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
        present = sum(path.stat().st_size for path in map(_file, lazy) if path.exists())
        return wanted - present <= room
    return False


def keep_decoded(splits: dict[str, Examples]) -> dict[str, Examples]:
    """The same examples with images and masks mapped from files, which are made where they are missing.

    A file is named by what it holds (paths, sizes and times of change of the files, decoder, boxes), so one out of
    date is not found; it appears whole or not at all, and several processes may ask for it at once.

    Raises:
        UserError: names all the files that can't be used; or a decoder does not tell what it does.
        MachineError: the disk is full.
    """
    for lazy in lazy_images(splits):
        if not is_dataclass(lazy.decoder):
            kind = type(lazy.decoder).__name__
            raise UserError(
                f"data.store=disk: {kind} is no dataclass, so nothing tells one from another; take host"
            )
    kept = read_all(splits, _keep)
    size = sum(map(decoded_bytes, splits.values())) / 2**20
    log.info("data: decoded images are kept in %s (%.0f MiB); `cnntrain clean` removes them", folder(), size)
    return kept


def _keep(lazy: LazyImages, bad: list[BadFile]) -> tuple[Tensor, Tensor]:
    """uint8 (N, ...) and float64 (N, 3, 3), mapped from their file; black where a file can't be used."""
    target = _file(lazy)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        with _alone(target.with_suffix(".lock")):
            if not target.exists():  # another process may have made it meanwhile
                _make(lazy, target, bad)
    if not target.exists():  # there are files that can't be used, and all will be refused
        nothing = torch.zeros(1)
        return nothing.byte().expand(lazy.shape), nothing.double().expand(len(lazy), 3, 3)
    return _map(target, lazy.shape, "c")


def _make(lazy: LazyImages, target: Path, bad: list[BadFile]) -> None:
    aside = target.with_suffix(".part")  # whoever made one that is left behind is gone: we have the lock
    try:
        with aside.open("wb") as file:
            _reserve(file.fileno(), len(lazy) * MATRIX + int(np.prod(lazy.shape)), target)
        images, matrices = _map(aside, lazy.shape, "r+")
        found = decode_into(images, matrices, lazy, f"decoding {len(lazy):,} files, this once")
        if found:
            bad += found
            return
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _reserve(file: int, size: int, target: Path) -> None:
    """Have so many bytes of room: a disk that is full would kill whoever writes to what is mapped."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.truncate(file, size)
    except OSError as error:
        raise MachineError(
            f"data.store=disk: {target.parent} has no room for {size / 2**20:.0f} MiB of decoded images "
            f"({error.strerror}); make room, set XDG_CACHE_HOME to another disk, or take data.store=stream"
        ) from error


def _map(path: Path, shape: tuple[int, ...], mode: str) -> tuple[Tensor, Tensor]:
    """Pixels and matrices of a file; `c`: what is written to them stays in this process."""
    matrices = np.memmap(path, np.float64, mode, 0, (shape[0], 3, 3))  # pyright: ignore[reportCallIssue, reportArgumentType]
    pixels = np.memmap(path, np.uint8, mode, shape[0] * MATRIX, shape)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return torch.from_numpy(pixels), torch.from_numpy(matrices)


def _file(lazy: LazyImages) -> Path:
    """Named by all that decides what is in it."""
    from PIL import __version__ as pillow
    from simplejpeg import __version__ as simplejpeg

    digest = hashlib.sha256(f"{FORMAT} {pillow} {simplejpeg} {lazy.decoder!r} {lazy.shape}".encode())
    if lazy.boxes is not None:
        digest.update(lazy.boxes.double().contiguous().numpy().tobytes())
    about = lru_cache(4096)(_about)  # of a shard once
    absolute = lru_cache(4096)(os.path.abspath)  # of a folder once
    for path in lazy.paths:
        size, changed = about(span_of(path).file)
        parent, name = os.path.split(path)
        digest.update(f"{absolute(parent)}/{name}\0{size} {changed}\n".encode(errors="surrogateescape"))
    return folder() / f"{digest.hexdigest()[:32]}.u8"


def _about(file: str) -> tuple[int, int]:
    """Bytes, and the time of the last change in ns; -1 where decoding will say what is wrong with it."""
    try:
        found = os.stat(file)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


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
