"""Mean and standard deviation of training images, for normalizing."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cnntrain.data.cache import decode
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.image_reader import BadFile, Decoder, upright_size
from cnntrain.data.parallel import in_threads
from cnntrain.data.resize import ResizePlacement, place
from cnntrain.randomness import hash_seed

SAMPLED_IMAGES = 2000  # when they are not in memory; the mean is then good to about 1/200
AT_ONCE = 2**24  # numbers that are looked at together: large sets are mapped from files, and stay there


def measure(
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
    for images, covered in _parts(examples, seed, files):
        for channel in range(channels):
            pixels = images[:, channel]
            counts[channel] += torch.bincount(
                pixels.flatten() if covered is None else pixels[covered], minlength=256
            )
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).clamp_min(0).sqrt()
    std[(counts > 0).sum(1) == 1] = 1.0
    return tuple(mean.tolist()), tuple(std.tolist())


def _parts(examples: Examples, seed: int, files: LazyImages | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield batches of the images (or of a sample) with their coverage (N, H, W) bool; None: no padding."""
    several = max(1, AT_ONCE // math.prod(examples.images.shape[1:]))
    images = examples.images
    files = images if isinstance(images, LazyImages) else files
    bordered = files is not None and may_have_borders(files)
    if isinstance(images, Tensor) and not bordered:
        for part in images.split(several):
            yield part, None
        return
    generator = torch.Generator().manual_seed(hash_seed(seed, "statistics"))
    rows = torch.randperm(len(examples), generator=generator)[:SAMPLED_IMAGES].sort().values
    for part in rows.split(several):
        decoded = images[part] if isinstance(images, Tensor) else None
        if decoded is None:
            decoded = decode({"train": replace(examples, lazy_targets={}).subset(part)})["train"].images
        assert isinstance(decoded, Tensor)
        covered = coverage(files, part) if bordered and files is not None else None
        yield decoded, covered if covered is not None and bool(covered.any()) else None


def may_have_borders(files: LazyImages) -> bool:
    """Return True if the decoder may pad images."""
    return type(files.decoder) is Decoder and (files.decoder.resize == "letterbox" or files.boxes is not None)


def coverage(files: LazyImages, rows: Tensor) -> Tensor:
    """Return (M, H, W) bool: canvas pixels fully covered by the image, from the headers of the files `rows`."""
    decoder = files.decoder
    assert isinstance(decoder, Decoder)
    canvas = (decoder.height, decoder.width)
    covered = torch.zeros(len(rows), *canvas, dtype=torch.bool)

    def one(place_and_row: tuple[int, int]) -> None:
        index, row = place_and_row
        left, top, right, bottom = (None,) * 4 if files.boxes is None else files.boxes[row].tolist()
        box = None if left is None else (left, top, right, bottom)
        try:
            size = upright_size(files.paths[row])
        except BadFile:
            return  # decoding reports it
        x, y = covered_sides(place(*size, canvas, decoder.resize, box), size)
        covered[index, y, x] = True

    in_threads(one, list(enumerate(rows.tolist())))
    return covered


def covered_sides(placement: ResizePlacement, size: tuple[int, int]) -> tuple[slice, slice]:
    """Return the canvas columns and rows fully covered by an image of (width, height)."""
    left, top, right, bottom = placement.box
    sides = []
    for near, far, length, start, span in (
        (left, right, size[0], placement.left, placement.width),
        (top, bottom, size[1], placement.top, placement.height),
    ):
        scale = span / (far - near)
        first = start + max(0.0, -near * scale)
        last = start + min(float(span), (length - near) * scale)
        sides.append(slice(math.ceil(first - 1e-6), max(math.floor(last + 1e-6), 0)))
    return sides[0], sides[1]
