"""Decode training images at a higher resolution than the network input, so that random crops keep detail."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cnntrain.data import cache as resident
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.image_reader import BadFile, Decoder, upright_size
from cnntrain.data.masks import MaskDecoder
from cnntrain.data.parallel import in_threads
from cnntrain.data.resize import Box, move, place

log = logging.getLogger("cnntrain")
SAMPLED_FILES = 200
SHARE = 0.9  # quantile of the source resolutions that limits the resolution; ignores a few large images
LEAST = 1.02  # smallest magnification per side that is worth the memory


def on_finer_canvas(examples: Examples, magnification: float) -> Examples:
    """Return the examples decoded at ceil(`magnification` * size), limited by the resolution of the files.

    Points and masks are transformed as well. Images in memory or from another decoder are returned unchanged.
    """
    lazy = examples.images
    if not isinstance(lazy, LazyImages) or type(lazy.decoder) is not Decoder or not len(lazy):
        return examples
    if not all(type(masks.decoder) is MaskDecoder for masks in examples.lazy_targets.values()):
        return examples
    factor = min(magnification, _source_pixels(lazy, lazy.decoder))
    height, width = (math.ceil(round(factor * side, 6)) for side in (lazy.decoder.height, lazy.decoder.width))
    if factor < LEAST:
        return examples
    finer = replace(
        examples,
        images=_at(lazy, height, width),
        lazy_targets={name: _at(masks, height, width) for name, masks in examples.lazy_targets.items()},
    )
    if examples.source_to_image is not None:
        finer.source_to_image = _matrices(lazy, replace(lazy.decoder, height=height, width=width))
        if finer.source_to_image is None:
            return examples  # some files are unreadable; decoding reports them
        finer.targets = _moved(
            examples.targets, finer.source_to_image @ torch.linalg.inv(examples.source_to_image)
        )
    before, after = (resident.decoded_bytes(each) / 2**20 for each in (examples, finer))
    log.info(
        "data: training images are decoded at %d x %d px so that random crops are not upsampled (%.0f MiB instead of "
        "%.0f); validation images at %d x %d", width, height, after, before, lazy.decoder.width, lazy.decoder.height,
    )  # fmt: skip
    return finer


def _at(lazy: LazyImages, height: int, width: int) -> LazyImages:
    decoder = lazy.decoder
    assert isinstance(decoder, Decoder | MaskDecoder)
    return replace(lazy, decoder=replace(decoder, height=height, width=width))


def _source_pixels(lazy: LazyImages, decoder: Decoder) -> float:
    """Estimate the ratio of file pixels to canvas pixels per side, from the headers of a sample of files."""
    rows = torch.linspace(0, len(lazy) - 1, min(len(lazy), SAMPLED_FILES), dtype=torch.float64).round().long()

    def one(row: int) -> float | None:
        try:
            size = upright_size(lazy.paths[row])
        except BadFile:
            return None  # decoding reports it
        placement = place(*size, (decoder.height, decoder.width), decoder.resize, _box(lazy, row))
        left, top, right, bottom = placement.box
        return max((right - left) / placement.width, (bottom - top) / placement.height)

    found = sorted(value for value in in_threads(one, rows.tolist()) if value is not None)
    return found[int(SHARE * (len(found) - 1))] if found else 1.0


def _matrices(lazy: LazyImages, decoder: Decoder) -> Tensor | None:
    """Return (N, 3, 3) float64 matrices from file pixels to the canvas of `decoder`; None if a header is unreadable."""
    canvas = (decoder.height, decoder.width)
    sizes: Sequence[tuple[int, int]] = [(1, 1)] * len(lazy)  # with boxes, the sizes are not needed
    if lazy.boxes is None:
        paths = sorted(set(lazy.paths))
        read, bad = resident.read_sizes(paths)
        if bad:
            return None
        size_of = dict(zip(paths, read, strict=True))
        sizes = [size_of[path] for path in lazy.paths]
    placed = (place(*size, canvas, decoder.resize, _box(lazy, row)) for row, size in enumerate(sizes))
    return torch.stack([placement.matrix() for placement in placed])


def _box(lazy: LazyImages, row: int) -> Box | None:
    if lazy.boxes is None:
        return None
    left, top, right, bottom = lazy.boxes[row].tolist()
    return left, top, right, bottom


def _moved(targets: dict[str, Tensor], matrices: Tensor) -> dict[str, Tensor]:
    if "points" not in targets:
        return targets
    points = move(targets["points"], matrices).float()
    return {**targets, "points": torch.where(targets["valid"][..., None], points, 0.0)}
