"""Decode training images at a higher resolution than the network input, so that random crops keep detail."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cnntrain.data.decoder import ImageDecoder, MaskDecoder
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.files import BadFile
from cnntrain.data.image_reader import read_size
from cnntrain.data.parallel import read_sizes, thread_map
from cnntrain.data.resize import resize_geometry, transform_points

SAMPLED_FILES = 200
RESOLUTION_QUANTILE = 0.9  # the resolution of the files limits the magnification; ignores a few large images
MIN_MAGNIFICATION = 1.02  # smallest magnification per side that is worth the memory
logger = logging.getLogger("cnntrain")


def use_high_resolution(examples: Examples, magnification: float) -> Examples:
    """Return the examples decoded at ceil(`magnification` * size), limited by the resolution of the files.

    Points and masks are transformed as well. Images in memory or from another decoder are returned unchanged.
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
        result.source_to_image = _source_to_image(lazy, high)
        if result.source_to_image is None:
            return examples  # some files are unreadable; decoding reports them
        scaling = result.source_to_image @ torch.linalg.inv(examples.source_to_image)
        result.targets = _transform_targets(examples.targets, scaling)
    before, after = (each.decoded_bytes() / 2**20 for each in (examples, result))
    logger.info(
        "data: training images are decoded at %d x %d px so that random crops are not upsampled (%.0f MiB instead of "
        "%.0f); validation images at %d x %d",
        *(high.width, high.height, after, before, low.width, low.height),
    )
    return result


def _file_resolution(lazy: LazyImages, decoder: ImageDecoder) -> float:
    """Estimate the ratio of file pixels to target pixels per side, from the headers of a sample of files."""
    rows = torch.linspace(0, len(lazy) - 1, min(len(lazy), SAMPLED_FILES), dtype=torch.float64).round().long()

    def ratio(row: int) -> float | None:
        try:
            size = read_size(lazy.paths[row])
        except BadFile:
            return None  # decoding reports it
        placement = resize_geometry(*size, decoder.target_size, decoder.resize, lazy.box(row))
        left, top, right, bottom = placement.box
        return max((right - left) / placement.width, (bottom - top) / placement.height)

    ratios = sorted(value for value in thread_map(ratio, rows.tolist()) if value is not None)
    return ratios[int(RESOLUTION_QUANTILE * (len(ratios) - 1))] if ratios else 1.0


def _source_to_image(lazy: LazyImages, decoder: ImageDecoder) -> Tensor | None:
    """Return (N, 3, 3) float64 matrices from file pixels to target pixels; None if a header is unreadable."""
    sizes: Sequence[tuple[int, int]] = [(1, 1)] * len(lazy)  # with boxes, the sizes are not needed
    if lazy.boxes is None:
        paths = sorted(set(lazy.paths))
        found, bad = read_sizes(paths)
        if bad:
            return None
        size_of = dict(zip(paths, found, strict=True))
        sizes = [size_of[path] for path in lazy.paths]
    placements = (
        resize_geometry(*size, decoder.target_size, decoder.resize, lazy.box(row)) for row, size in enumerate(sizes)
    )
    return torch.stack([placement.matrix() for placement in placements])


def _transform_targets(targets: dict[str, Tensor], matrices: Tensor) -> dict[str, Tensor]:
    if "points" not in targets:
        return targets
    points = transform_points(targets["points"], matrices).float()
    return {**targets, "points": torch.where(targets["valid"][..., None], points, 0.0)}
