"""Statistics of the training images: mean and standard deviation, and the bits in use in 16-bit files."""

import logging
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cnntrain.data.cache import decode_into_ram
from cnntrain.data.decoder import ImageDecoder, ResizePlacement
from cnntrain.data.examples import Examples, LazyImages, evenly_spaced
from cnntrain.data.image_reader import load_pixels, open_image
from cnntrain.data.parallel import read_sizes, try_map
from cnntrain.errors import UserError
from cnntrain.randomness import hash_seed

STATISTICS_SAMPLE = 2000  # of images on disk; the standard error of the mean is then about 1/200
CHUNK_VALUES = 2**24  # values processed at once: large datasets are memory-mapped
BIT_DEPTH_SAMPLE = 100  # files whose bit depth is read
MAX_BIT_DEPTH_FILES = 2_000  # files that are decoded to find the highest value
FEW_BITS = 12  # of 16; images that use at most 12 bits get at most 16 of 256 gray levels
log = logging.getLogger("cnntrain")


def measure_statistics(
    examples: Examples, seed: int, files: LazyImages | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure the per-channel mean and standard deviation over all pixels of the images, on the 0-1 scale.

    Padding (letterbox borders, boxes that extend beyond their image) is excluded. The result is exact for decoded
    images without padding. If there may be padding or the images stay on disk, 2,000 images sampled with `seed` are
    used. A constant channel gets the standard deviation 1.

    Args:
        files: the files that `examples` were decoded from, in the same order; None if not decoded from files.
    """
    channels = examples.images.shape[1]
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for images, covered in _chunks(examples, seed, files):
        for channel in range(channels):
            pixels = images[:, channel]
            pixels = pixels.flatten() if covered is None else pixels[covered]
            counts[channel] += torch.bincount(pixels, minlength=256)
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).clamp_min(0).sqrt()
    std[(counts > 0).sum(1) == 1] = 1.0
    return tuple(mean.tolist()), tuple(std.tolist())


def _chunks(examples: Examples, seed: int, files: LazyImages | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield chunks of the images (or of a sample) with their coverage (N, H, W) bool; None: no padding."""
    chunk_size = max(1, CHUNK_VALUES // math.prod(examples.images.shape[1:]))
    images = examples.images
    files = images if isinstance(images, LazyImages) else files
    padded = files is not None and may_be_padded(files)
    if isinstance(images, Tensor) and not padded:
        for chunk in images.split(chunk_size):
            yield chunk, None
        return
    generator = torch.Generator().manual_seed(hash_seed(seed, "statistics"))
    rows = torch.randperm(len(examples), generator=generator)[:STATISTICS_SAMPLE].sort().values
    for chunk_rows in rows.split(chunk_size):
        if isinstance(images, Tensor):
            chunk = images[chunk_rows]
        else:
            sample = replace(examples, lazy_targets={}).subset(chunk_rows)
            chunk = decode_into_ram({"train": sample})["train"].images
        assert isinstance(chunk, Tensor)
        covered = coverage(files, chunk_rows) if padded and files is not None else None
        yield chunk, covered if covered is not None and bool(covered.any()) else None


def may_be_padded(files: LazyImages) -> bool:
    """Return True if the decoder may pad images."""
    decoder = files.decoder
    return type(decoder) is ImageDecoder and (decoder.resize == "letterbox" or files.boxes is not None)


def coverage(files: LazyImages, rows: Tensor) -> Tensor:
    """Return (M, H, W) bool: target pixels fully covered by the image, from the headers of the files `rows`."""
    decoder = files.decoder
    assert isinstance(decoder, ImageDecoder)
    covered = torch.zeros(len(rows), *decoder.target_size, dtype=torch.bool)
    sizes, _ = read_sizes(files.paths[row] for row in rows.tolist())  # decoding reports bad files
    for index, row in enumerate(rows.tolist()):
        if size := sizes.get(files.paths[row]):
            x, y = covered_slices(decoder.placement(size, files.box(row)), size)
            covered[index, y, x] = True
    return covered


def covered_slices(placement: ResizePlacement, size: tuple[int, int]) -> tuple[slice, slice]:
    """Return the target columns and rows fully covered by an image of (width, height)."""
    left, top, right, bottom = placement.box
    slices = []
    for near, far, length, start, span in (
        (left, right, size[0], placement.left, placement.width),
        (top, bottom, size[1], placement.top, placement.height),
    ):
        scale = span / (far - near)
        first = start + max(0.0, -near * scale)
        last = start + min(float(span), (length - near) * scale)
        slices.append(slice(math.ceil(first - 1e-6), max(math.floor(last + 1e-6), 0)))
    return slices[0], slices[1]


def with_bit_depth(splits: dict[str, Examples], bits: int) -> dict[str, Examples]:
    """Return the examples with a decoder that scales 16-bit files by their maximum value 2**bits - 1."""
    result = {}
    for name, examples in splits.items():
        images = examples.images
        if not isinstance(images, LazyImages) or not isinstance(images.decoder, ImageDecoder):
            raise UserError("data.bits: these images are not decoded from files; leave it null")
        images = replace(images, decoder=replace(images.decoder, bits=bits))
        result[name] = replace(examples, images=images)
    return result


def warn_of_unused_bits(examples: Examples) -> None:
    """Warn if the training images are 16-bit files that use at most 12 bits, because they would be almost black.

    If a sample of the files finds 16-bit images, up to 2,000 more files are read to confirm it.
    """
    images = examples.images
    if not isinstance(images, LazyImages) or not isinstance(images.decoder, ImageDecoder) or not len(images):
        return
    sample = [images.paths[row] for row in evenly_spaced(len(images), BIT_DEPTH_SAMPLE)]
    if not any(try_map(_is_deep, sample)[0]):  # decoding reports unreadable files
        return
    highest = 0
    for paths in (sample, sorted(set(images.paths) - set(sample))[:MAX_BIT_DEPTH_FILES]):
        highest = max([highest, *filter(None, try_map(_max_value, paths)[0])])
        if highest >= 2**FEW_BITS:
            return
    if highest:
        log.warning(
            "data: the training images have 16 bits but no value above %d, so they use at most %d of 256 gray levels; "
            "set data.bits=%d to use the full range",
            *(highest, highest // 257 + 1, max(9, highest.bit_length())),
        )


def _is_deep(path: str) -> bool:
    """Return True if a file has more than 8 bits."""
    with open_image(path) as image:
        return image.mode.startswith("I")


def _max_value(path: str) -> int:
    """Return the largest value of a file with more than 8 bits; 0 for other files."""
    with open_image(path) as image:
        if not image.mode.startswith("I"):
            return 0
        load_pixels(image)
        return int(np.asarray(image).max())
