"""Bit depth of 16-bit images: scale values by the number of bits in use."""

import logging
from dataclasses import replace

import numpy as np
import torch

from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.image_reader import BadFile, Decoder, load_pixels, reading
from cnntrain.data.parallel import in_threads
from cnntrain.errors import UserError

log = logging.getLogger("cnntrain")
SAMPLED_FILES = 100
MOST_READ = 2_000
FEW_BITS = 12  # of 16; images that use at most 12 bits get at most 16 of 256 gray levels


def with_bits(splits: dict[str, Examples], bits: int) -> dict[str, Examples]:
    """Return the examples with a decoder that scales 16-bit files by their maximum value 2**bits - 1.

    Raises:
        UserError: the images are not decoded from files by cnntrain.
    """
    changed = {}
    for name, examples in splits.items():
        images = examples.images
        if not isinstance(images, LazyImages) or not isinstance(images.decoder, Decoder):
            raise UserError("data.bits: these images are not decoded from files; leave it null")
        decoder = replace(images.decoder, bits=bits)
        changed[name] = replace(examples, images=replace(images, decoder=decoder))
    return changed


def warn_of_unused_bits(examples: Examples) -> None:
    """Warn if the training images are 16-bit files that use at most 12 bits, because they would be almost black.

    If a sample of the files finds 16-bit images, up to 2,000 more files are read to confirm it.
    """
    images = examples.images
    if not isinstance(images, LazyImages) or not isinstance(images.decoder, Decoder) or not len(images):
        return
    rows = (
        torch.linspace(0, len(images) - 1, min(len(images), SAMPLED_FILES), dtype=torch.float64)
        .round()
        .long()
    )
    paths = [images.paths[row] for row in rows.tolist()]
    if not any(in_threads(_is_deep, paths)):
        return
    highest = 0
    for some in (paths, sorted(set(images.paths) - set(paths))[:MOST_READ]):
        highest = max([highest, *(value for value in in_threads(_largest, some) if value is not None)])
        if highest >= 2**FEW_BITS:
            return
    if highest:
        needed = max(9, highest.bit_length())
        log.warning(
            "data: the training images have 16 bits but no value above %d, so they use at most %d of 256 gray levels; "
            "set data.bits=%d to use the full range", highest, highest // 257 + 1, needed,
        )  # fmt: skip


def _is_deep(path: str) -> bool:
    try:
        with reading(path) as image:
            return image.mode.startswith("I")
    except BadFile:
        return False  # decoding reports it


def _largest(path: str) -> int | None:
    """Return the largest value of a file with more than 8 bits; None for other and for unreadable files."""
    try:
        with reading(path) as image:
            if not image.mode.startswith("I"):
                return None
            load_pixels(image)
            return int(np.asarray(image).max())
    except BadFile:
        return None
