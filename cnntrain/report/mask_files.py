"""Predicted masks as files: class ids in the size of the image that they belong to."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
from torch import Tensor

from cnntrain.io import safe_files as files


def mask_names(names: list[str]) -> list[str]:
    """A PNG's name for each image: its own with another ending, or with a second one where two would be the same."""
    stems = [str(Path(name).with_suffix("")) for name in names]
    times = Counter(stems)
    return [f"{stem if times[stem] == 1 else name}.png" for stem, name in zip(stems, names, strict=True)]


def write_mask(
    mask: np.ndarray,
    source_to_image: Tensor,
    size: tuple[int, int],
    outside: int,
    target: Path,
    root: Path | None = None,
) -> np.ndarray:
    """A mask of ids on the canvas as a PNG of the image's own size (width, height), by nearest neighbor; the ids
    written, (height, width) uint8.

    Args:
        source_to_image: (3, 3) from the image's pixels; scales and shifts only.
        outside: the id of pixels that did not come onto the canvas.
        root: the run folder that `target` lies in: no link is followed from there on.

    Raises:
        UserError: a folder on the way is a link.
        OSError: it can't be written.
    """
    from PIL import Image

    rows, columns = (
        np.rint(
            np.arange(side) * float(source_to_image[axis, axis]) + float(source_to_image[axis, 2])
        ).astype(np.int64)
        for axis, side in ((1, size[1]), (0, size[0]))
    )
    height, width = mask.shape
    ids = mask[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)[None, :]].copy()
    ids[(rows < 0) | (rows >= height), :] = outside
    ids[:, (columns < 0) | (columns >= width)] = outside
    content = io.BytesIO()
    Image.fromarray(ids).save(content, "PNG")
    if root is None:
        target.parent.mkdir(parents=True, exist_ok=True)
    else:
        files.make_folder(target.parent, root)
    files.write_whole(target, content.getbuffer(), root, sync=False)
    return ids


def outside_image(source_to_image: Tensor, size: tuple[int, int], canvas: tuple[int, int]) -> np.ndarray:
    """Which pixels of the canvas (height, width) show nothing of the image: (H, W) bool.

    Args:
        source_to_image: (3, 3) from the image's pixels; scales and shifts only. size: of the image, (width, height).
    """
    inside = []
    for axis in (1, 0):
        side, length = size[axis], canvas[1 - axis]
        first, last = (
            float(source_to_image[axis, axis]) * end + float(source_to_image[axis, 2])
            for end in (-0.5, side - 0.5)
        )
        place = np.arange(length)
        inside.append((place > first - 0.5) & (place < last + 0.5))
    return ~(inside[0][:, None] & inside[1][None, :])
