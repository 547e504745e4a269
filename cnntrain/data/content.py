"""Content hash of images and masks, to detect on resume that a data set has changed."""

import hashlib
import os
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.parallel import in_threads
from cnntrain.data.spans import ByteRange, span_of

SAMPLED_FILES = 200
LARGEST_PART = 1 << 20  # bytes read per file
SAMPLED_IMAGES = 64


def content_hash(examples: Examples) -> str:
    """Return a hash (16 hex digits) of the images and masks; equal on every machine with the same files.

    For files, the hash covers the size of every file and up to 1 MiB of 200 evenly spaced files. For images in memory,
    it covers the mean of each quadrant of 64 images, rounded to whole gray levels because machines may round
    differently.
    """
    digest = hashlib.sha256()
    masks = {name: target for name, target in examples.targets.items() if name == "mask"}
    for _, images in [("", examples.images), *sorted({**examples.lazy_targets, **masks}.items())]:
        digest.update(_of_files(images.paths) if isinstance(images, LazyImages) else _of_pixels(images))
    return digest.hexdigest()[:16]


def _of_files(paths: list[str]) -> bytes:
    size_of = lru_cache(4096)(_size)
    sizes = [size_of(span.file) if span.size is None else span.size for span in map(span_of, paths)]
    digest = hashlib.sha256(str(sizes).encode())
    for part in in_threads(_read, [span_of(paths[row]) for row in _rows(len(paths), SAMPLED_FILES)]):
        digest.update(part)
    return digest.digest()


def _of_pixels(images: Tensor) -> bytes:
    sample = images[_rows(len(images), SAMPLED_IMAGES)].cpu().double()
    sample = sample.unsqueeze(1) if sample.ndim == 3 else sample
    return F.adaptive_avg_pool2d(sample, 2).round().to(torch.uint8).numpy().tobytes()


def _rows(count: int, wanted: int) -> list[int]:
    return torch.linspace(0, count - 1, min(count, wanted), dtype=torch.float64).round().long().tolist()


def _size(file: str) -> int:
    """Return the file size in bytes; -1 on an error, which decoding reports."""
    try:
        return os.stat(file).st_size
    except OSError:
        return -1


def _read(span: ByteRange) -> bytes:
    if span.size is None and not os.path.isfile(span.file):  # opening a FIFO would block forever
        return b""
    try:
        with open(span.file, "rb") as file:
            length = LARGEST_PART if span.size is None else min(span.size, LARGEST_PART)
            return os.pread(file.fileno(), length, span.offset or 0)
    except OSError:
        return b""


def same_examples(before: str, now: str) -> bool:
    """Return True if two fingerprints have the same count, names and targets."""
    return before.split("-")[:2] == now.split("-")[:2]


def same_data(before: str, now: str) -> bool:
    """Return True if two fingerprints are of the same data; older fingerprints have no hash of the images."""
    return before.split("-") == now.split("-")[: len(before.split("-"))]
