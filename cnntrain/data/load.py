"""Load a data source: split, limit, decode and measure it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cnntrain.data.cache import CacheMode, cache_images
from cnntrain.data.examples import Examples, LazyImages, Source, check_examples
from cnntrain.data.files import SPLIT_NAMES, SPLITS, unique_split_names
from cnntrain.data.fingerprint import fingerprint
from cnntrain.data.high_resolution import use_high_resolution
from cnntrain.data.scan import ScanMode, scan_files
from cnntrain.data.splits import check_groups, limit_rows, split_train_val
from cnntrain.data.statistics import measure_statistics, set_bits, warn_of_unused_bits
from cnntrain.errors import UserError, suggest
from cnntrain.memory import without_collector
from cnntrain.types import DataSpec

logger = logging.getLogger("cnntrain")


@dataclass
class Data:
    """The splits of a data set.

    Attributes:
        spec: metadata, including mean and std.
        train: training examples.
        val: validation examples, which select the best checkpoint.
        test: test examples, used once after training; None if the data set has none.
        fingerprint: of all splits, before val was split off (see `fingerprint`).
        own_val: True if the data set has its own val split; False if it was split off from train.
    """

    spec: DataSpec
    train: Examples
    val: Examples
    test: Examples | None
    fingerprint: str
    own_val: bool = False


def load_data(
    source: Source,
    val_fraction: float = 0.1,
    folds: int | None = None,
    fold: int = 0,
    split_seed: int = 0,
    limit: int | None = None,
    cache: CacheMode = "auto",
    scan: ScanMode = "headers",
    magnification: float = 1.0,
    bits: int | None = None,
) -> Data:
    """Load a data source and split off validation examples.

    Args:
        val_fraction, folds, fold, split_seed: see `split_train_val`; ignored if the source has its own val split.
        limit: maximum number of examples per split of the source.
        cache: see `cache_images`.
        scan: see `scan_files`, for images that stay on disk; bad files that it misses are reported in training.
        magnification: of the random crops; above 1, training images have a higher resolution (see
            `use_high_resolution`).
        bits: number of bits in use in 16-bit files; None: 16, with a warning if 12 are enough.

    Raises:
        UserError: the data are missing or invalid; lists all bad files.
    """
    with without_collector():
        splits = _check_splits(source.load())
    spec = source.spec()
    for name, examples in splits.items():
        examples = check_examples(name, examples, spec)
        if name == "train":
            _warn_of_empty_classes(examples, spec)
        rows = limit_rows(len(examples), limit, split_seed, name)
        splits[name] = examples if rows is None else examples.subset(rows)
    check_groups({name: examples.groups for name, examples in splits.items()})
    data_fingerprint = fingerprint(splits)

    own_val = "val" in splits
    if not own_val:
        train = splits["train"]
        with without_collector():
            train_rows, val_rows = split_train_val(train, val_fraction, folds, fold, split_seed)
        splits = {**splits, "train": train.subset(train_rows), "val": train.subset(val_rows)}
    elif folds is not None:
        raise UserError(
            "data.folds: this data set has its own val split, which folds would ignore; set data.folds=null, or move "
            "its examples into train"
        )
    if magnification > 1:
        splits["train"] = use_high_resolution(splits["train"], magnification)
    if bits is not None:
        splits = set_bits(splits, bits)
    else:
        warn_of_unused_bits(splits["train"])
    train_files = splits["train"].images
    splits = cache_images(splits, cache)
    scan_files(splits, scan)
    if spec.mean is None or spec.std is None:
        files = train_files if isinstance(train_files, LazyImages) else None
        spec = spec.with_statistics(*measure_statistics(splits["train"], split_seed, files))
    return Data(spec, splits["train"], splits["val"], splits.get("test"), data_fingerprint, own_val)


def _check_splits(splits: Any) -> dict[str, Examples]:
    """Validate the return value of a source's `load()` and use the standard split names as keys.

    Raises:
        UserError: the value is not a dictionary of examples, has no train split, or has an unknown or empty split.
    """
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
        logger.warning("data: no training images for %d of the %d classes: %s", len(absent), len(counts), shown)


def align_labels(data: Data, checkpoint_spec: DataSpec) -> None:
    """Convert labels to the class indices of a checkpoint, by class name; the data may have fewer classes.

    Raises:
        UserError: the checkpoint lacks a class, or has other keypoints or classes of pixels.
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
