"""Check that validation and test images do not occur among the training images, exactly or nearly."""

import hashlib

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cnntrain.checks.context import CheckContext, evenly_spaced, failed, join_names, passed, warned
from cnntrain.data.parallel import thread_map
from cnntrain.types import Finding

MAX_STREAMED = 3_000  # images per split that are read if they are not cached
READ_BATCH = 256
CHUNK = 4_096
FAIL_EXACT_SHARE = 0.01  # of a split that also occurs in train
WARN_NEAR_SHARE = 0.02  # of near duplicates
MIN_CORRELATION = 0.985  # of the pixels of near duplicates
MIN_CORRELATION_FLIPPED = 0.99  # of horizontally flipped ones, because symmetric objects resemble their mirror image
MIN_EDGE_CORRELATION = 0.85
MAX_HASH_DISTANCE = 4  # differing bits, of 64
MAX_COMPARISONS = 1_000_000_000  # of hashes, per split; about 10 s on one core
CANDIDATES = 32  # training images per image, with the closest hashes, whose pixels are compared
PIXEL_BYTES = 1 << 23  # of images compared at once


def leakage(context: CheckContext) -> Finding:
    """Check that no image of val or test occurs in train, not even in another file size or quality.

    Candidates for near duplicates, also flipped ones, are pairs whose difference hashes (signs of 64 differences
    between neighboring pixels of the image at 9x8) differ in at most 4 bits. The correlations of their pixels and of
    their edges confirm them.
    """
    train, train_names = _images(context, "train")
    train_hashes, rows_by_content = difference_hashes(train), dict[bytes, int]()
    for k, image in enumerate(train):
        rows_by_content.setdefault(_digest(image), k)
    parts, pairs, is_bad, is_suspicious = [], [], False, False
    for split in context.loaders:
        if split == "train":
            continue
        images, names = _images(context, split)
        digests = [_digest(image) for image in images]
        exact = {i: rows_by_content[digest] for i, digest in enumerate(digests) if digest in rows_by_content}
        others = torch.tensor([i for i in range(len(images)) if i not in exact], dtype=torch.int64)
        if len(others) > (most := max(1, MAX_COMPARISONS // len(train))):
            others = others[torch.linspace(0, len(others) - 1, most).long()]
        near = near_duplicates(images[others], train, train_hashes)
        near = {int(others[i]): k for i, k in near.items()}
        parts.append(f"{split}: {len(exact)} of {len(images)} images are in train, {len(near)} more nearly")
        pairs += [f"{names[i]} = {train_names[k]}" for i, k in (exact | near).items()]
        is_bad |= len(exact) > FAIL_EXACT_SHARE * len(images)
        is_suspicious |= bool(exact) or len(near) > WARN_NEAR_SHARE * len(images)
    evidence = "; ".join(parts)
    if not is_suspicious:
        return passed(evidence)
    cause = f"evaluation images are also training images: {join_names(pairs, 2)}"
    remedy = "remove the copies from one split; data.group keeps related images in the same split"
    return (failed if is_bad else warned)(evidence, cause, remedy, "data")


def _digest(image: Tensor) -> bytes:
    return hashlib.sha1(image.numpy().tobytes(), usedforsecurity=False).digest()


def near_duplicates(images: Tensor, train: Tensor, train_hashes: np.ndarray) -> dict[int, int]:
    """Return, for each image with a near duplicate in `train` (flipped ones included), the row of that duplicate.

    Args:
        images, train: uint8 (M, C, H, W) and (N, C, H, W).
        train_hashes: (N,) uint64, difference hashes of `train`.
    """
    duplicates: dict[int, int] = {}
    if not len(images):
        return duplicates
    pairs_at_once = max(1, PIXEL_BYTES // images[0].numel())
    train_thumbnails = thumbnails(train)
    for variant, minimum in ((images, MIN_CORRELATION), (images.flip(-1), MIN_CORRELATION_FLIPPED)):
        small, pairs = thumbnails(variant), torch.from_numpy(near_hashes(difference_hashes(variant), train_hashes))
        similar = [(small[part[:, 0]] * train_thumbnails[part[:, 1]]).sum(1) for part in pairs.split(CHUNK)]
        for part in pairs[torch.cat(similar) > minimum - 0.01].split(pairs_at_once):
            left, right = variant[part[:, 0]], train[part[:, 1]]
            confirmed = correlation(left, right) > minimum
            confirmed &= correlation(edges(left), edges(right)) > MIN_EDGE_CORRELATION
            for i, k in part[confirmed].tolist():
                duplicates.setdefault(i, k)
    return duplicates


def thumbnails(images: Tensor) -> Tensor:
    """Return gray 16x16 thumbnails (N, 256) with mean 0 and norm 1, whose dot products are their correlations."""
    parts = [F.adaptive_avg_pool2d(part.float().mean(1, keepdim=True), 16).flatten(1) for part in images.split(CHUNK)]
    return F.normalize(torch.cat([part - part.mean(1, keepdim=True) for part in parts]), dim=1)


def near_hashes(hashes: np.ndarray, train_hashes: np.ndarray) -> np.ndarray:
    """Return (P, 2) int64 pairs of rows whose hashes differ in at most `MAX_HASH_DISTANCE` bits.

    At most `CANDIDATES` per row, the nearest first. Compares all pairs: 60,000 with 10,000 hashes take a few seconds.
    """

    def nearest(row: int) -> np.ndarray:
        distances = np.bitwise_count(hashes[row] ^ train_hashes)
        close = np.flatnonzero(distances <= MAX_HASH_DISTANCE)
        close = close[np.argsort(distances[close], kind="stable")[:CANDIDATES]]
        return np.stack([np.full_like(close, row), close], 1)

    return np.concatenate([np.zeros((0, 2), np.int64), *thread_map(nearest, range(len(hashes)))])


def _images(context: CheckContext, split: str) -> tuple[Tensor, list[str]]:
    """Return images, uint8 (M, C, H, W) on the CPU, and their names: all cached images, or some that are streamed."""
    loader, names = context.loaders[split], context.loaders[split].examples.names
    images = loader.examples.images
    if isinstance(images, Tensor) and tuple(images.shape[-2:]) == context.spec.image_size:
        return images.cpu(), list(names)
    rows = evenly_spaced(len(loader), len(loader) if isinstance(images, Tensor) else MAX_STREAMED)
    # Images for random crops are larger than those of the other splits.
    parts = [context.pipeline.resize(batch).images for batch in loader.batches(rows, READ_BATCH)]
    parts = [part.round().to(torch.uint8) if part.is_floating_point() else part for part in parts]
    return torch.cat([part.cpu() for part in parts]), [names[int(i)] for i in rows]


def difference_hashes(images: Tensor) -> np.ndarray:
    """Return (N,) uint64: for each of 8x8 cells, whether it is brighter than its right neighbor."""
    powers = (np.uint64(1) << np.arange(64, dtype=np.uint64)).astype(np.uint64)
    parts = []
    for part in images.split(CHUNK):
        small = F.interpolate(part.float().mean(1, keepdim=True), (8, 9), mode="area")
        brighter = small.diff(dim=3) < -1.0  # by more than a gray level, to be robust to noise
        parts.append(brighter.flatten(1).numpy().astype(np.uint64) @ powers)
    return np.concatenate(parts)


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Return the Pearson correlation (P,) of each pair of (P, ...), which ignores brightness and contrast."""
    a, b = one.flatten(1).float(), other.flatten(1).float()
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-9)


def edges(images: Tensor) -> Tensor:
    """Return differences to the right and lower neighbors, (N, ...) float32.

    Different images of the same kind (trousers on black) may correlate like copies, but their edges do not.
    """
    values = images.float()
    return torch.cat([values.diff(dim=3).flatten(1), values.diff(dim=2).flatten(1)], 1)
