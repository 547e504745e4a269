"""Load a data source: split, limit, decode and measure it."""

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cnntrain.config.schema import DataSettings
from cnntrain.data.cache import cache_images, scan_files
from cnntrain.data.decoder import ImageDecoder, MaskDecoder, apply_affine
from cnntrain.data.examples import Examples, LazyImages, Source, check_examples, evenly_spaced
from cnntrain.data.files import SPLIT_NAMES, SPLITS, ByteRange, byte_range, file_stamps, unique_split_names
from cnntrain.data.parallel import read_sizes, thread_map
from cnntrain.data.splits import check_groups, limit_rows, split_train_val
from cnntrain.data.statistics import measure_statistics, warn_of_unused_bits, with_bit_depth
from cnntrain.errors import UserError, suggest
from cnntrain.memory import without_collector
from cnntrain.types import DataSpec

HASHED_FILES = 200  # whose headers or first bytes are read
MAX_BYTES_PER_FILE = 1 << 20
HASHED_IMAGES = 64
RESOLUTION_QUANTILE = 0.9  # the resolution of the files limits the magnification; ignores a few large images
MIN_MAGNIFICATION = 1.02  # smallest magnification per side that is worth the memory
log = logging.getLogger("cnntrain")


@dataclass
class DataSplits:
    """The splits of a dataset."""

    spec: DataSpec  # including mean and std
    train: Examples
    val: Examples  # select the best checkpoint
    test: Examples | None  # used once after training; None if the dataset has none
    fingerprint: str  # of all splits, before val was split off (see `fingerprint`)
    has_own_val: bool = False  # True if the dataset has its own val split; False if it was split off from train


def load_data(source: Source, settings: DataSettings | None = None, magnification: float = 1.0) -> DataSplits:
    """Load a data source and split off validation examples.

    Args:
        settings: the keys of `data` that are common to all sources; None: their defaults.
        magnification: of the random crops; above 1, training images have a higher resolution (see
            `use_high_resolution`).

    Raises:
        UserError: the data are missing or invalid; lists all bad files.
    """
    settings = settings or DataSettings()
    seed = settings.split_seed
    with without_collector():
        splits = _check_splits(source.load())
    spec = source.spec()
    for name, examples in splits.items():
        examples = check_examples(name, examples, spec)
        if name == "train":
            _warn_of_empty_classes(examples, spec)
        rows = limit_rows(len(examples), settings.limit, seed, name)
        splits[name] = examples if rows is None else examples.subset(rows)
    check_groups({name: examples.groups for name, examples in splits.items()})
    data_fingerprint = fingerprint(splits)

    has_own_val = "val" in splits
    if not has_own_val:
        train = splits["train"]
        with without_collector():
            train_rows, val_rows = split_train_val(train, settings.val_fraction, settings.folds, settings.fold, seed)
        splits = {**splits, "train": train.subset(train_rows), "val": train.subset(val_rows)}
    elif settings.folds is not None:
        raise UserError(
            "data.folds: this dataset has its own val split, which folds would ignore; set data.folds=null, or move "
            "its examples into train"
        )
    if magnification > 1:
        splits["train"] = use_high_resolution(splits["train"], magnification)
    if settings.bits is not None:
        splits = with_bit_depth(splits, settings.bits)
    else:
        warn_of_unused_bits(splits["train"])
    train_files = splits["train"].images
    splits = cache_images(splits, settings.cache)
    scan_files(splits, settings.scan)
    if spec.mean is None or spec.std is None:
        files = train_files if isinstance(train_files, LazyImages) else None
        spec = spec.with_statistics(*measure_statistics(splits["train"], seed, files))
    return DataSplits(spec, splits["train"], splits["val"], splits.get("test"), data_fingerprint, has_own_val)


def _check_splits(splits: Any) -> dict[str, Examples]:
    """Validate the return value of a source's `load()` and use the standard split names as keys."""
    if not isinstance(splits, Mapping) or not all(isinstance(each, Examples) for each in splits.values()):
        raise UserError(
            'data: load() must return a dictionary of Examples with "train", and optionally "val" and "test"'
        )
    if unknown := [name for name in splits if name not in SPLIT_NAMES]:
        near = suggest(str(unknown[0]), list(SPLIT_NAMES))
        raise UserError(
            f"data: load() returned the unknown split {unknown[0]!r}; the splits are {', '.join(SPLITS)}{near}"
        )
    names = unique_split_names(splits, "data: the result of load()")
    if "train" not in names:
        raise UserError('data: load() returned no "train"')
    for split, name in names.items():
        if len(splits[name]) == 0:
            raise UserError(f"data: the {split} split has no examples")
    return {split: splits[name] for split, name in names.items()}


def _warn_of_empty_classes(train: Examples, spec: DataSpec) -> None:
    """Warn about classes without a training image, for example if labels start at 1."""
    if "label" not in train.targets or not spec.classes:
        return
    counts = torch.bincount(train.targets["label"], minlength=len(spec.classes)).tolist()
    absent = [name for name, count in zip(spec.classes, counts, strict=True) if not count]
    if absent:
        shown = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
        log.warning("data: no training images for %d of the %d classes: %s", len(absent), len(counts), shown)


def use_high_resolution(examples: Examples, magnification: float) -> Examples:
    """Return the examples decoded at ceil(`magnification` * size), so that random crops keep detail.

    The resolution of the files limits the magnification. Points and masks are transformed as well. Images in memory or
    from another decoder are returned unchanged.
    """
    lazy = examples.images
    if not isinstance(lazy, LazyImages) or type(lazy.decoder) is not ImageDecoder or not len(lazy):
        return examples
    if not all(type(masks.decoder) is MaskDecoder for masks in examples.lazy_targets.values()):
        return examples
    low = lazy.decoder
    factor = min(magnification, _file_resolution(lazy, low))
    if factor < MIN_MAGNIFICATION:
        return examples
    size = {name: math.ceil(round(factor * getattr(low, name), 6)) for name in ("height", "width")}
    high = replace(low, **size)
    masks = {}
    for name, target in examples.lazy_targets.items():
        assert isinstance(target.decoder, MaskDecoder)
        masks[name] = replace(target, decoder=replace(target.decoder, **size))
    result = replace(examples, images=replace(lazy, decoder=high), lazy_targets=masks)
    if examples.source_to_image is not None:
        sizes, bad = read_sizes(lazy.paths if lazy.boxes is None else [])  # boxes determine the placement
        if bad:
            return examples  # decoding reports the unreadable files
        placements = (high.placement(sizes.get(path, (1, 1)), lazy.box(row)) for row, path in enumerate(lazy.paths))
        result.source_to_image = torch.stack([placement.matrix() for placement in placements])
        if "points" in examples.targets:
            scaling = result.source_to_image @ torch.linalg.inv(examples.source_to_image)
            points = apply_affine(examples.targets["points"], scaling).float()
            points = torch.where(examples.targets["valid"][..., None], points, 0.0)
            result.targets = {**examples.targets, "points": points}
    before, after = (each.decoded_bytes() / 2**20 for each in (examples, result))
    log.info(
        "data: training images are decoded at %d x %d px so that random crops are not upsampled (%.0f MiB instead of "
        "%.0f); validation images at %d x %d",
        *(high.width, high.height, after, before, low.width, low.height),
    )
    return result


def _file_resolution(lazy: LazyImages, decoder: ImageDecoder) -> float:
    """Estimate the ratio of file pixels to target pixels per side, from the headers of a sample of files."""
    rows = evenly_spaced(len(lazy), HASHED_FILES)
    sizes, _ = read_sizes(lazy.paths[row] for row in rows)  # decoding reports bad files
    ratios = []
    for row in rows:
        if size := sizes.get(lazy.paths[row]):
            placement = decoder.placement(size, lazy.box(row))
            left, top, right, bottom = placement.box
            ratios.append(max((right - left) / placement.width, (bottom - top) / placement.height))
    ratios.sort()
    return ratios[int(RESOLUTION_QUANTILE * (len(ratios) - 1))] if ratios else 1.0


def align_labels(data: DataSplits, checkpoint_spec: DataSpec) -> None:
    """Convert labels to the class indices of a checkpoint, by class name; the data may have fewer classes.

    A checkpoint that lacks a class, or has other keypoints or classes of pixels, is rejected.
    """
    names, expected = (spec.classes or spec.keypoints for spec in (data.spec, checkpoint_spec))
    if names == expected:
        return
    new = [name for name in names if name not in expected]
    if new or checkpoint_spec.keypoints or checkpoint_spec.per_pixel or not checkpoint_spec.classes:
        problem = f"it lacks {', '.join(map(repr, new[:8]))}" if new else "some are missing, or in another order"
        raise UserError(
            f"data: the names differ from those of the checkpoint ({problem}); it has {', '.join(expected[:20])}"
        )
    index = torch.tensor([expected.index(name) for name in names])
    for examples in filter(None, (data.train, data.val, data.test)):
        examples.targets = {**examples.targets, "label": index[examples.targets["label"]]}


def fingerprint(splits: dict[str, Examples]) -> str:
    """Return 'count-hash-hash': the number of examples, a hash of names and targets, and a hash of the images."""
    labels = " ".join(f"{name}:{splits[name].fingerprint()}" for name in sorted(splits))
    content = " ".join(content_hash(splits[name]) for name in sorted(splits))
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in (labels, content)]
    return "-".join([str(sum(map(len, splits.values()))), *hashes])


def read_fingerprint(source: Source) -> str:
    """Compute the fingerprint of a source's data without decoding images."""
    with without_collector():
        splits = _check_splits(source.load())
    spec = source.spec()
    return fingerprint({name: check_examples(name, examples, spec) for name, examples in splits.items()})


def same_examples(before: str, now: str) -> bool:
    """Return True if two fingerprints have the same count, names and targets."""
    return before.split("-")[:2] == now.split("-")[:2]


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
    for content in thread_map(_read_start, [sources[row] for row in evenly_spaced(len(paths), HASHED_FILES)]):
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
    sample = images[evenly_spaced(len(images), HASHED_IMAGES)].cpu().double()
    sample = sample.unsqueeze(1) if sample.ndim == 3 else sample
    return F.adaptive_avg_pool2d(sample, 2).round().to(torch.uint8).numpy().tobytes()
