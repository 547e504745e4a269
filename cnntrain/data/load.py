"""From a source to three honest splits, with the facts complete."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cnntrain.data import cache as resident
from cnntrain.data.bits import warn_of_unused_bits, with_bits
from cnntrain.data.content import content_hash
from cnntrain.data.decoded import keep_decoded, worth_keeping
from cnntrain.data.examples import Examples, LazyImages, check_examples
from cnntrain.data.files import SPLIT_NAMES, SPLITS, one_name_each
from cnntrain.data.finer import on_finer_canvas
from cnntrain.data.scan import Scan, scan
from cnntrain.data.source import Source
from cnntrain.data.splits import check_groups_apart, limit_rows, split_train_val
from cnntrain.data.statistics import measure
from cnntrain.errors import UserError, suggest
from cnntrain.memory import without_collector
from cnntrain.types import DataSpec

logger = logging.getLogger("cnntrain")


@dataclass
class Data:
    """What a run trains, chooses and tests on.

    Attributes:
        spec: the facts, mean and std included.
        train, val: never None; `val` decides which checkpoint is best.
        test: used once, at the end; None where the data set has none.
        fingerprint: 'count-hash-hash' of all splits before val was split off: a hash of names and targets, and a hash
            of a sample of the images.
        own_val: val is the data set's own, not held out of train.
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
    cache: str = "auto",
    how: Scan = "headers",
    magnification: float = 1.0,
    bits: int | None = None,
) -> Data:
    """Load, limit, split, decode if they fit, and measure mean and std on train where the source states none.

    Args:
        val_fraction, folds, fold, split_seed: see `split_train_val`; a val split of the source's own wins.
        limit: at most so many examples of each split that the source has.
        cache: 'none' leaves images in their files; 'disk' keeps them decoded in a file of their own, 'auto' does
            where there are many and the disk has room, and else decodes what fits into half of the free memory.
        how: how much of the files that stay on disk is looked at now; the rest is refused when it is met.
        magnification: the pipeline's; above 1, training images have a higher resolution (see `on_finer_canvas`).
        bits: number of bits in use in 16-bit files; None: 16, with a warning if 12 are enough.

    Raises:
        UserError: the data can't be had, or are not as they should be; all faulty files in one message.
    """
    with without_collector():
        splits = source.load()
    splits = _checked_splits(splits)
    for name in splits:
        if len(splits[name]) == 0:
            raise UserError(f"data: the {name} split has no examples")
    facts = source.spec()
    for name, examples in splits.items():
        examples = check_examples(name, examples, facts)
        if name == "train":
            _tell_of_classes_without_examples(examples, facts)
        rows = limit_rows(len(examples), limit, split_seed, name)
        splits[name] = examples if rows is None else examples.subset(rows)
    check_groups_apart({name: examples.groups for name, examples in splits.items()})
    fingerprint = _fingerprint(splits)

    own_val = "val" in splits
    if not own_val:
        pool = splits["train"]
        with without_collector():
            train_rows, val_rows = split_train_val(pool, val_fraction, folds, fold, split_seed)
        splits = {**splits, "train": pool.subset(train_rows), "val": pool.subset(val_rows)}
    elif folds is not None:
        raise UserError(
            "data.folds: this data set has a val split of its own, which folds would leave out; "
            "set data.folds=null, or move its examples into train"
        )
    if magnification > 1:
        splits["train"] = on_finer_canvas(splits["train"], magnification)
    if bits is not None:
        splits = with_bits(splits, bits)
    else:
        warn_of_unused_bits(splits["train"])
    files = splits["train"].images
    if cache == "disk" or (cache == "auto" and worth_keeping(splits)):
        splits = keep_decoded(splits)
    elif cache == "none" or (cache == "auto" and not resident.fits_in_host_memory(splits)):
        scan(splits, how)
        needed = sum(map(resident.decoded_bytes, splits.values())) / 2**20
        logger.info(
            "data: images are made ready as they are needed (in memory they would take %.0f MiB)", needed
        )
    else:
        splits = resident.decode(splits)
    spec = source.spec()
    if spec.mean is None or spec.std is None:
        source_files = files if isinstance(files, LazyImages) else None
        spec = spec.with_statistics(*measure(splits["train"], split_seed, source_files))
    return Data(spec, splits["train"], splits["val"], splits.get("test"), fingerprint, own_val)


def _tell_of_classes_without_examples(train: Examples, facts: DataSpec) -> None:
    """Warn about classes without a training image, for example if labels start at 1."""
    if "label" not in train.targets or not facts.classes:
        return
    counts = torch.bincount(train.targets["label"], minlength=len(facts.classes)).tolist()
    absent = [name for name, count in zip(facts.classes, counts, strict=True) if not count]
    if absent:
        shown = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
        logger.warning(
            "data: no training images for %d of the %d classes: %s", len(absent), len(counts), shown
        )


def _checked_splits(splits: Any) -> dict[str, Examples]:
    """Validate the return value of a source's `load()` and use the standard split names as keys.

    Raises:
        UserError: the value is not a dictionary of examples, has no train split, or has an unknown split.
    """
    if not isinstance(splits, Mapping) or not all(isinstance(each, Examples) for each in splits.values()):
        raise UserError(
            'data: load() must return a dictionary of Examples with "train", and optionally "val" and "test"'
        )
    if unknown := [name for name in splits if name not in SPLIT_NAMES]:
        near = suggest(str(unknown[0]), list(SPLIT_NAMES))
        raise UserError(
            f"data: load() returned {unknown[0]!r}, which is no split; the splits are {', '.join(SPLITS)}{near}"
        )
    names = one_name_each(splits, "data: the result of load()")
    if "train" not in names:
        raise UserError('data: load() returned no "train"')
    return {split: splits[name] for split, name in names.items()}


def number_as(known: DataSpec, data: Data) -> None:
    """Give labels the numbers that `known`, of a checkpoint, has for their names: another folder may hold fewer.

    Raises:
        UserError: names that it does not know, or points and classes of pixels that are not quite the same.
    """
    now, before = (spec.classes or spec.keypoints for spec in (data.spec, known))
    if now == before:
        return
    new = [name for name in now if name not in before]
    if new or known.keypoints or known.per_pixel or not known.classes:
        what = (
            f"{', '.join(map(repr, new[:8]))} not known to it"
            if new
            else "not all of them, or in another order"
        )
        raise UserError(
            f"data: other names than the checkpoint was trained on ({what}); it knows {', '.join(before[:20])}"
        )
    numbers = torch.tensor([before.index(name) for name in now])
    for examples in filter(None, (data.train, data.val, data.test)):
        examples.targets = {**examples.targets, "label": numbers[examples.targets["label"]]}


def read_fingerprint(source: Source) -> str:
    """Compute the fingerprint of a source's data without decoding images.

    Raises:
        UserError: the data cannot be loaded.
    """
    with without_collector():
        return _fingerprint(source.load())


def _fingerprint(splits: dict[str, Examples]) -> str:
    import hashlib

    parts = " ".join(f"{name}:{splits[name].fingerprint()}" for name in sorted(splits))
    content = " ".join(content_hash(splits[name]) for name in sorted(splits))
    hashes = [hashlib.sha256(each.encode()).hexdigest()[:16] for each in (parts, content)]
    return "-".join([str(sum(map(len, splits.values()))), *hashes])
