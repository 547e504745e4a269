"""Write predicted masks as PNG files of class ids in the size of the source image."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
from torch import Tensor

from cnntrain.io import safe_files as files


def mask_names(names: list[str]) -> list[str]:
    """Return a PNG file name per image: the suffix is replaced, or kept before `.png` if two names would be equal."""
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
    """Resample a mask to the size of its source image by nearest neighbor, write it as a PNG file and return it.

    Args:
        mask: (H, W) class ids at the network's image size, uint8.
        source_to_image: (3, 3) matrix from source pixels to `mask` pixels; scale and translation only.
        size: (width, height) of the source image.
        outside: id of source pixels that lie outside the network's image.
        target: file to write.
        root: run folder that contains `target`; links below it are refused.

    Raises:
        UserError: a folder in the path is a link.
        OSError: the file cannot be written.
    """
    from PIL import Image

    rows, columns = (
        np.rint(np.arange(side) * float(source_to_image[axis, axis]) + float(source_to_image[axis, 2])).astype(np.int64)
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
    files.write_atomic(target, content.getbuffer(), root, sync=False)
    return ids


def outside_image(source_to_image: Tensor, size: tuple[int, int], image_size: tuple[int, int]) -> np.ndarray:
    """Return a (H, W) bool mask of the padding: pixels of the network's image outside the source image.

    Args:
        source_to_image: (3, 3) matrix from source pixels; scale and translation only.
        size: (width, height) of the source image.
        image_size: (height, width) of the network's image.
    """
    inside = []
    for axis in (1, 0):
        side, length = size[axis], image_size[1 - axis]
        first, last = (
            float(source_to_image[axis, axis]) * end + float(source_to_image[axis, 2]) for end in (-0.5, side - 0.5)
        )
        position = np.arange(length)
        inside.append((position > first - 0.5) & (position < last + 0.5))
    return ~(inside[0][:, None] & inside[1][None, :])
