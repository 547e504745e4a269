"""Fingerprints of data sets, to detect on resume that the data have changed."""

import hashlib

import torch
from torch import Tensor
from torch.nn import functional as F

from cnntrain.data.examples import Examples, LazyImages, Source, evenly_spaced
from cnntrain.data.files import ByteRange, byte_range, file_stamps
from cnntrain.data.parallel import thread_map
from cnntrain.memory import without_collector

SAMPLED_FILES = 200
MAX_BYTES_PER_FILE = 1 << 20
SAMPLED_IMAGES = 64


def fingerprint(splits: dict[str, Examples]) -> str:
    """Return 'count-hash-hash': the number of examples, a hash of names and targets, and a hash of the images."""
    labels = " ".join(f"{name}:{splits[name].fingerprint()}" for name in sorted(splits))
    content = " ".join(content_hash(splits[name]) for name in sorted(splits))
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in (labels, content)]
    return "-".join([str(sum(map(len, splits.values()))), *hashes])


def read_fingerprint(source: Source) -> str:
    """Compute the fingerprint of a source's data without decoding images."""
    with without_collector():
        return fingerprint(source.load())


def same_examples(before: str, now: str) -> bool:
    """Return True if two fingerprints have the same count, names and targets."""
    return before.split("-")[:2] == now.split("-")[:2]


def same_data(before: str, now: str) -> bool:
    """Return True if two fingerprints are of the same data; older fingerprints have no hash of the images."""
    return before.split("-") == now.split("-")[: len(before.split("-"))]


def content_hash(examples: Examples) -> str:
    """Return a hash (16 hex digits) of the images and masks; equal on every machine with the same files.

    For files, the hash covers the size of every file and up to 1 MiB of 200 evenly spaced files. For images in memory,
    it covers the mean of each quadrant of 64 images, rounded to whole gray levels because machines may round
    differently.
    """
    digest = hashlib.sha256()
    masks = {name: target for name, target in examples.targets.items() if name == "mask"}
    for _, images in [("", examples.images), *sorted({**examples.lazy_targets, **masks}.items())]:
        digest.update(_hash_files(images.paths) if isinstance(images, LazyImages) else _summarize(images))
    return digest.hexdigest()[:16]


def _hash_files(paths: list[str]) -> bytes:
    sources = [byte_range(path) for path in paths]
    sizes = [stamp.size if s.size is None else s.size for s, stamp in zip(sources, file_stamps(paths), strict=True)]
    digest = hashlib.sha256(str(sizes).encode())
    for content in thread_map(_read_start, [sources[row] for row in evenly_spaced(len(paths), SAMPLED_FILES)]):
        digest.update(content)
    return digest.digest()


def _read_start(source: ByteRange) -> bytes:
    """Return up to 1 MiB; nothing on an error, which decoding reports."""
    try:
        size = MAX_BYTES_PER_FILE if source.size is None else min(source.size, MAX_BYTES_PER_FILE)
        return source._replace(size=size).read()
    except OSError:
        return b""


def _summarize(images: Tensor) -> bytes:
    sample = images[evenly_spaced(len(images), SAMPLED_IMAGES)].cpu().double()
    sample = sample.unsqueeze(1) if sample.ndim == 3 else sample
    return F.adaptive_avg_pool2d(sample, 2).round().to(torch.uint8).numpy().tobytes()
