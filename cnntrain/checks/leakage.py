"""Is what judges the network kept from it? Images of validation and test that are among the training images too."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cnntrain.checks.context import CheckContext, failed, join_names, passed, warned
from cnntrain.data.parallel import thread_map
from cnntrain.types import Finding

MOST_READ = 3_000  # images of a split that are read where they stay on disk
CHUNK = 4_096
AT_ONCE = 256  # images that are read together
EXACT_SHARE = 0.01  # of a split that may be in train as well before it is a FAIL
NEAR_SHARE = 0.02  # of near duplicates before it is a WARN
NEAR = 0.985  # correlation of the pixels of near duplicates
NEAR_MIRRORED = 0.99  # of mirrored ones
NEAR_EDGES = 0.85  # and of their edges
FLIPPED_BITS = 4  # of the 64 of a hash, between near duplicates
MOST_COMPARED = 1_000_000_000  # hashes with hashes, of a split: 10 s on one core
CANDIDATES = 32  # nearest by their hashes, of each image, whose pixels are compared
AT_ONCE_BYTES = 1 << 23  # of images that are compared together


def leakage(context: CheckContext) -> Finding:
    """No image of val or test stands in train, neither the same bits nor nearly (other size of file, other quality).

    Near duplicates, mirrored ones too, are found by a difference hash (64 signs between neighbors of the image at
    9x8) of which at most 4 differ, and confirmed by the correlation of their pixels and of their edges.
    """
    train, looked = _images(context, "train")
    exact_of, train_hashes = _index(exact_hashes(train)), difference_hashes(train)
    notes, verdict, pairs = [], "PASS", []
    for split in ("val", "test"):
        if split not in context.loaders:
            continue
        images, rows = _images(context, split)
        same: list[tuple[int, int]] = []
        for i, value in enumerate(exact_hashes(images)):
            twins = [k for k in exact_of.get(int(value), []) if torch.equal(images[i], train[k])]
            same += [(i, twins[0])] if twins else []
        exact = {i for i, _ in same}
        rest = torch.tensor([i for i in range(len(images)) if i not in exact], dtype=torch.int64)
        if len(rest) > (most := max(1, MOST_COMPARED // len(train))):
            rest = rest[torch.linspace(0, len(rest) - 1, most).long()]
        found = near_duplicates(images[rest], train, train_hashes)
        alike = [(int(rest[i]), k) for i, k in found.items()]
        notes.append(f"{split}: {len(same)} of {len(images)} in train, {len(alike)} more nearly")
        names, trained = context.loaders[split].examples.names, context.loaders["train"].examples.names
        pairs += [f"{names[int(rows[i])]} = {trained[int(looked[k])]}" for i, k in [*same, *alike]]
        if len(same) > EXACT_SHARE * len(images):
            verdict = "FAIL"
        elif verdict == "PASS" and (same or len(alike) > NEAR_SHARE * len(images)):
            verdict = "WARN"
    evidence = "; ".join(notes)
    if verdict == "PASS":
        return passed(evidence)
    cause = f"what judges the network has been learned: {join_names(pairs, 2)}"
    remedy = "take the copies out of one split; `group` keeps what belongs together on one side"
    return (failed if verdict == "FAIL" else warned)(evidence, cause, remedy, "data")


def near_duplicates(images: Tensor, train: Tensor, train_hashes: np.ndarray) -> dict[int, int]:
    """The row of a near duplicate among `train`, for each row of `images` that has one; mirrored ones too.

    Args:
        images, train: uint8 (M, C, H, W) and (N, C, H, W).
        train_hashes: (N,) uint64, the difference hashes of `train`.
    """
    found: dict[int, int] = {}
    if not len(images):
        return found
    several = max(1, AT_ONCE_BYTES // images[0].numel())
    small_train = thumbnails(train)
    # Things that are symmetric look like mirrored ones of their kind: more is asked of those.
    for shown, least in ((images, NEAR), (images.flip(-1), NEAR_MIRRORED)):
        pairs, small = near_hashes(difference_hashes(shown), train_hashes), thumbnails(shown)
        like = [
            (small[part[:, 0]] * small_train[part[:, 1]]).sum(1).numpy() > least - 0.01
            for part in np.array_split(pairs, -(-len(pairs) // CHUNK) or 1)
        ]
        pairs = pairs[np.concatenate(like)]
        for part in np.array_split(pairs, -(-len(pairs) // several) or 1):
            left, right = shown[part[:, 0]], train[part[:, 1]]
            alike = (correlation(left, right) > least) & (correlation(edges(left), edges(right)) > NEAR_EDGES)
            for i, k in part[alike.numpy()].tolist():
                found.setdefault(i, k)
    return found


def thumbnails(images: Tensor) -> Tensor:
    """(N, 256) float32: gray at 16x16, less its mean, of length 1; the product of two is their correlation."""
    parts = [
        F.adaptive_avg_pool2d(part.float().mean(1, keepdim=True), 16).flatten(1)
        for part in images.split(CHUNK)
    ]
    return F.normalize(torch.cat([part - part.mean(1, keepdim=True) for part in parts]), dim=1)


def near_hashes(hashes: np.ndarray, train_hashes: np.ndarray) -> np.ndarray:
    """(P, 2) int64: pairs of rows whose hashes differ in at most `FLIPPED_BITS` bits, at most `CANDIDATES` a row.

    Every pair is compared, 16 rows with 16,384 at a time: 60,000 with 10,000 take a few seconds.
    """
    if not len(train_hashes):
        return np.zeros((0, 2), np.int64)

    def look(start: int) -> np.ndarray:
        rows, columns, distances = [], [], []
        for first in range(0, len(train_hashes), 16_384):
            apart = np.bitwise_count(
                hashes[start : start + 16, None] ^ train_hashes[None, first : first + 16_384]
            )
            row, column = np.nonzero(apart <= FLIPPED_BITS)
            rows.append(row)
            columns.append(column + first)
            distances.append(apart[row, column])
        row, column, apart = np.concatenate(rows), np.concatenate(columns), np.concatenate(distances)
        order = np.lexsort((column, apart, row))
        row, column = row[order], column[order]
        place = np.arange(len(row)) - np.searchsorted(row, row)  # of the pair among its row's
        near = place < CANDIDATES
        return np.stack([row[near] + start, column[near]], 1)

    return np.concatenate([np.zeros((0, 2), np.int64), *thread_map(look, range(0, len(hashes), 16))])


def _images(context: CheckContext, split: str) -> tuple[Tensor, Tensor]:
    """uint8 (M, C, H, W) on the CPU and their rows: all that are held in memory, some of those on disk."""
    loader = context.loaders[split]
    images = loader.examples.images
    if isinstance(images, Tensor) and tuple(images.shape[-2:]) == context.spec.image_size:
        return images.cpu(), torch.arange(len(images))
    most = len(loader) if isinstance(images, Tensor) else MOST_READ
    rows = torch.linspace(0, len(loader) - 1, min(most, len(loader))).round().long()
    # Those that random crops are cut from are on a finer canvas than the others.
    parts = [context.pipeline.resize(batch).images for batch in loader.batches(rows, AT_ONCE)]
    return torch.cat(
        [part.round().to(torch.uint8).cpu() if part.is_floating_point() else part.cpu() for part in parts]
    ), rows


def exact_hashes(images: Tensor) -> np.ndarray:
    """(N,) uint64: a weighted sum of the bytes modulo 2**64; equal for equal images."""
    flat = images.flatten(1)
    weights = np.random.default_rng(0).integers(1, 2**63, flat.shape[1], dtype=np.uint64) | np.uint64(1)
    parts = [part.numpy().astype(np.uint64) @ weights for part in flat.split(CHUNK)]
    return np.concatenate(parts)


def difference_hashes(images: Tensor) -> np.ndarray:
    """(N,) uint64: whether each of 8x8 places is brighter than its right neighbor."""
    powers = (np.uint64(1) << np.arange(64, dtype=np.uint64)).astype(np.uint64)
    parts = []
    for part in images.split(CHUNK):
        small = F.interpolate(part.float().mean(1, keepdim=True), (8, 9), mode="area")
        signs = (
            (small.diff(dim=3) < -1.0).flatten(1).numpy().astype(np.uint64)
        )  # a gray level: noise is no sign
        parts.append(signs @ powers)
    return np.concatenate(parts)


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """(P,) float32, of the values of each pair of (P, ...); 1 for the same picture, brighter or darker."""
    a, b = one.flatten(1).float(), other.flatten(1).float()
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-9)


def edges(images: Tensor) -> Tensor:
    """Differences to the right and to the lower neighbors, (N, ...) float32.

    Pictures of one kind (trousers on black) may correlate as copies do; where their edges lie tells them apart.
    """
    values = images.float()
    return torch.cat([values.diff(dim=3).flatten(1), values.diff(dim=2).flatten(1)], 1)


def _index(hashes: np.ndarray) -> dict[int, list[int]]:
    places: dict[int, list[int]] = {}
    for row, value in enumerate(hashes.tolist()):
        places.setdefault(value, []).append(row)
    return places
