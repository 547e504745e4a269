"""Is what judges the network kept from it? Images of validation and test that are among the training images too."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cnntrain.checks.bench import Bench
from cnntrain.checks.verdicts import failed, passed, some, warned
from cnntrain.findings import Finding

MOST_READ = 3_000  # images of a split that are read where they stay on disk
CHUNK = 4_096
AT_ONCE = 256  # images that are read together
EXACT_SHARE = 0.01  # of a split that may be in train as well before it is a FAIL
NEAR_SHARE = 0.02  # of near duplicates before it is a WARN
NEAR = 0.99  # correlation of the pixels of near duplicates


def leakage(bench: Bench) -> Finding:
    """No image of val or test stands in train, neither the same bits nor nearly (other size of file, other quality).

    Near duplicates are found by a difference hash (64 signs between neighbours of the image at 9x8) and confirmed by
    the correlation of their pixels.
    """
    train, looked = _images(bench, "train")
    exact_of, near_of = _index(exact_hashes(train)), _index(difference_hashes(train))
    notes, verdict, pairs = [], "PASS", []
    for split in ("val", "test"):
        if split not in bench.loaders:
            continue
        images, rows = _images(bench, split)
        same, alike = [], []
        hashes, differences = exact_hashes(images), difference_hashes(images)
        for i in range(len(images)):
            twins = [k for k in exact_of.get(int(hashes[i]), []) if torch.equal(images[i], train[k])]
            if twins:
                same.append((i, twins[0]))
                continue
            candidates = near_of.get(int(differences[i]), [])[:8]
            alike += [(i, k) for k in candidates if correlation(images[i], train[k]) > NEAR][:1]
        notes.append(f"{split}: {len(same)} of {len(images)} in train, {len(alike)} more nearly")
        names, trained = bench.loaders[split].examples.names, bench.loaders["train"].examples.names
        pairs += [f"{names[int(rows[i])]} = {trained[int(looked[k])]}" for i, k in [*same, *alike]]
        if len(same) > EXACT_SHARE * len(images):
            verdict = "FAIL"
        elif verdict == "PASS" and (same or len(alike) > NEAR_SHARE * len(images)):
            verdict = "WARN"
    evidence = "; ".join(notes)
    if verdict == "PASS":
        return passed(evidence)
    cause = f"what judges the network has been learned: {some(pairs, 2)}"
    remedy = "take the copies out of one split; `group` keeps what belongs together on one side"
    return (failed if verdict == "FAIL" else warned)(evidence, cause, remedy, "data")


def _images(bench: Bench, split: str) -> tuple[Tensor, Tensor]:
    """uint8 (M, C, H, W) on the CPU and their rows: all that are held in memory, some of those on disk."""
    loader = bench.loaders[split]
    images = loader.examples.images
    if isinstance(images, Tensor) and tuple(images.shape[-2:]) == bench.spec.image_size:
        return images.cpu(), torch.arange(len(images))
    most = len(loader) if isinstance(images, Tensor) else MOST_READ
    rows = torch.linspace(0, len(loader) - 1, min(most, len(loader))).round().long()
    # Those that random crops are cut from are on a finer canvas than the others.
    parts = [bench.pipeline.on_canvas(batch).images for batch in loader.batches(rows, AT_ONCE)]
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
    """(N,) uint64: whether each of 8x8 places is brighter than its right neighbour."""
    powers = (np.uint64(1) << np.arange(64, dtype=np.uint64)).astype(np.uint64)
    parts = []
    for part in images.split(CHUNK):
        small = F.interpolate(part.float().mean(1, keepdim=True), (8, 9), mode="area")
        signs = (
            (small.diff(dim=3) < -1.0).flatten(1).numpy().astype(np.uint64)
        )  # a grey level: noise is no sign
        parts.append(signs @ powers)
    return np.concatenate(parts)


def correlation(one: Tensor, other: Tensor) -> float:
    """Of the pixels of two images; 1 for the same picture, brighter or darker."""
    a, b = one.flatten().double(), other.flatten().double()
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-9))


def _index(hashes: np.ndarray) -> dict[int, list[int]]:
    places: dict[int, list[int]] = {}
    for row, value in enumerate(hashes.tolist()):
        places.setdefault(value, []).append(row)
    return places
