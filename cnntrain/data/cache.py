"""Choose where decoded images are kept (GPU, RAM, disk, nowhere), and check the files of images that are not cached."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cnntrain.data import disk_cache
from cnntrain.data.examples import Decoder, Examples, LazyImages, lazy_images_of
from cnntrain.data.files import BadFile, cache_folder, common_folder, file_stamps, raise_if_bad
from cnntrain.data.image_reader import read_size
from cnntrain.data.parallel import MANY_FILES, decode_into, is_builtin, shared_zeros, try_map
from cnntrain.errors import UserError
from cnntrain.memory import free_host_bytes
from cnntrain.transfer import free_bytes

CacheMode = Literal["auto", "gpu", "ram", "disk", "none"]
ScanMode = Literal["full", "headers", "off"]
MAX_SHARE_OF_RAM = 0.5  # of the free memory; the network and its activations need the rest
MAX_SHARE_OF_GPU = 0.4  # of the free device memory
log = logging.getLogger("cnntrain")
Decode = Callable[[LazyImages, list[BadFile]], tuple[Tensor, Tensor]]


def cache_images(splits: dict[str, Examples], mode: CacheMode) -> dict[str, Examples]:
    """Decode all images and masks into RAM or a cache file; leave them in their files if `mode` is none.

    Args:
        mode: `auto` selects disk for many files if the disk has room for the decoded images, else ram if they fit, else
            none. With `gpu`, images are decoded into RAM here and moved to the GPU by the loader.

    Raises:
        UserError: lists all bad files.
        MachineError: a decoding process died, or the disk is full.
    """
    if mode == "disk" or (mode == "auto" and _prefer_disk(splits)):
        return cache_on_disk(splits)
    if mode == "none" or (mode == "auto" and not fits_in_ram(splits)):
        if lazy_images_of(splits):
            needed = _decoded_bytes(splits) / 2**20
            log.info("data: streaming images from disk (caching them would need %.0f MiB)", needed)
        return splits
    return decode_into_ram(splits)


def decode_into_ram(splits: dict[str, Examples]) -> dict[str, Examples]:
    """Decode all images and masks on all cores. Errors are those of `cache_images`."""

    def decode(lazy: LazyImages, bad: list[BadFile]) -> tuple[Tensor, Tensor]:
        images = shared_zeros(lazy.shape, torch.uint8)
        matrices = shared_zeros((len(lazy), 3, 3), torch.float64)
        bad += decode_into(images, matrices, lazy, f"decoding {len(lazy):,} files")
        return images, matrices

    return _decode_splits(splits, decode)


def cache_on_disk(splits: dict[str, Examples]) -> dict[str, Examples]:
    """Map all images and masks from cache files, which are created if they are missing (see `disk_cache`)."""
    for lazy in lazy_images_of(splits):
        if not is_dataclass(lazy.decoder):
            kind = type(lazy.decoder).__name__
            raise UserError(
                f"data.cache=disk: {kind} must be a dataclass, so that the cache can identify it; set data.cache=ram"
            )
    cached = _decode_splits(splits, disk_cache.load_or_decode)
    folder, size = disk_cache.folder(), _decoded_bytes(splits) / 2**20
    log.info("data: decoded images are cached in %s (%.0f MiB); `cnntrain clean` removes them", folder, size)
    return cached


def _decode_splits(splits: dict[str, Examples], decode: Decode) -> dict[str, Examples]:
    """Apply `decode` to all images and masks; it returns pixels and matrices, and adds bad files to a list."""
    bad: list[BadFile] = []
    decoded: dict[str, Examples] = {}
    for name, examples in splits.items():
        images, matrices = examples.images, examples.source_to_image
        if isinstance(images, LazyImages):
            images, computed = decode(images, bad)
            matrices = computed if matrices is None else matrices
        masks = {target: decode(lazy, bad)[0] for target, lazy in examples.lazy_targets.items()}
        targets = {**examples.targets, **masks}
        decoded[name] = replace(examples, images=images, source_to_image=matrices, targets=targets, lazy_targets={})
    if bad:
        paths = {path for lazy in lazy_images_of(splits) for path in lazy.paths}
        raise_if_bad(bad, len(paths), common_folder(paths))
    return decoded


def _prefer_disk(splits: dict[str, Examples]) -> bool:
    """Return True for many files, decoded by cnntrain itself, if the disk has room for the decoded images."""
    lazy = lazy_images_of(splits)
    if not all(map(is_builtin, lazy)) or sum(map(len, lazy)) < MANY_FILES:  # a user's decoder may change
        return False
    return disk_cache.has_room(lazy, _decoded_bytes(splits))


def _decoded_bytes(splits: dict[str, Examples]) -> int:
    return sum(examples.decoded_bytes() for examples in splits.values())


def fits_in_ram(splits: dict[str, Examples]) -> bool:
    return _decoded_bytes(splits) <= MAX_SHARE_OF_RAM * free_host_bytes()


def fits_on_device(examples: Examples, device: torch.device) -> bool:
    return device.type != "cuda" or examples.decoded_bytes() <= MAX_SHARE_OF_GPU * free_bytes(device)


def scan_files(splits: dict[str, Examples], mode: ScanMode) -> None:
    """Read the header of every file that stays on disk, or decode it if `mode` is full.

    With `headers`, each file is opened once. Files that passed a previous scan of the same mode (and with the same
    decoders, if it decoded them), and still have the same size and mtime, are skipped. The error lists all bad files.
    """
    lazy = lazy_images_of(splits)
    entries = [(images, row) for images in lazy for row in range(len(images))]
    if mode == "off" or not entries:
        return
    paths = sorted({images.paths[row] for images, row in entries})
    root = common_folder(paths)
    key = str(root)
    if mode == "full":
        key += "".join(sorted({_identify(images.decoder) for images in lazy}))
    record = cache_folder() / "scans" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}-{mode}.json"
    passed = _read_record(record)
    stamps = {path: [size, mtime] for path, (size, mtime, _) in zip(paths, file_stamps(paths), strict=True)}
    pending = [(images, row) for images, row in entries if passed.get(images.paths[row]) != stamps[images.paths[row]]]
    if mode == "headers":  # one entry per file, even if it contains several objects
        pending = list({images.paths[row]: (images, row) for images, row in pending}.values())

    def check(entry: tuple[LazyImages, int]) -> None:
        images, row = entry
        if mode == "full":
            images.read(row)
        else:
            read_size(images.paths[row])

    _, bad = try_map(check, pending, f"scanning {len({images.paths[row] for images, row in pending}):,} files")
    if pending:
        bad_paths = {problem.path for problem in bad}
        good = {path: stamp for path, stamp in stamps.items() if path not in bad_paths and stamp[0] >= 0}
        _write_record(record, {**passed, **good})
    raise_if_bad(bad, len(paths), root)


def _identify(decoder: Decoder) -> str:
    """Return the settings of a decoder: they determine which files it rejects."""
    return repr(decoder) if is_dataclass(decoder) else type(decoder).__qualname__  # a plain repr contains the address


def _read_record(record: Path) -> dict[str, list[int]]:
    try:
        passed = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return passed if isinstance(passed, dict) else {}


def _write_record(record: Path, passed: dict[str, list[int]]) -> None:
    with suppress(OSError):  # the next run scans again
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary = record.with_name(f"{record.name}.{os.getpid()}.part")
        temporary.write_text(json.dumps(passed))
        os.replace(temporary, record)
