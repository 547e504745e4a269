"""From a mask file to class ids on the canvas."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cnntrain.data.image_reader import Unusable, cut, load_pixels, reading
from cnntrain.data.resize import Box, Resize, place

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class MaskDecoder:
    """Decode a mask file to uint8 class ids (height, width), resized by nearest neighbor without interpolation.

    Attributes:
        ids: for each of the 256 values in the file the class id that it stands for, or -1 where it means
            nothing.
        border: id of what lies outside the mask.
    """

    height: int
    width: int
    resize: Resize
    ids: tuple[int, ...]
    border: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.height, self.width

    def __call__(self, path: str, box: Box | None = None) -> tuple[Tensor, Tensor]:
        """The ids, and the matrix from source to canvas.

        Raises:
            BadFile: the file can't be used, or has an id that means nothing.
        """
        from PIL import Image

        with reading(path) as image:
            placement = place(*image.size, (self.height, self.width), self.resize, box)
            values = mask_values(image)
            self.refuse_unknown(present_values(values))
            classes = np.asarray(self.ids, dtype=np.int16).astype(np.uint8)[values.astype(np.uint8)]
            size = (self.height, self.width)
            pixels = cut(Image.fromarray(classes), placement, size, Image.Resampling.NEAREST, self.border)
        return torch.from_numpy(np.array(pixels)), placement.matrix()

    def refuse_unknown(self, values: Iterable[int]) -> None:
        """Reject a mask with values that map to no class.

        Args:
            values: the return value of `present_values`.

        Raises:
            Unusable: names these values.
        """
        unknown = sorted(v for v in values if not 0 <= v <= 255 or self.ids[v] < 0)
        if unknown:
            shown = ", ".join({-1: "below 0", 256: "above 255"}.get(v, str(v)) for v in unknown[:8])
            raise Unusable(f"has ids that are no class: {shown}" + (", ..." if len(unknown) > 8 else ""))


def mask_values(image: "Image.Image") -> np.ndarray:
    """Return the values of a mask file as integers (h, w) at the file's size; palette images give their indices.

    RGB images are accepted if all channels are equal and no pixel is transparent.

    Raises:
        Unusable: the file contains colors.
    """
    load_pixels(image)
    if image.mode in ("1", "L", "P", "I;16", "I"):
        return np.asarray(image)
    wrong = Unusable(
        f"must hold class ids (gray or palette), but is {image.mode}; save each pixel's class id as a gray value"
    )
    if image.mode not in ("RGB", "RGBA", "LA"):
        raise wrong
    pixels = np.asarray(image)
    if image.mode != "RGB":
        if (pixels[..., -1] != 255).any():
            raise wrong
        pixels = pixels[..., :-1]
    if (pixels != pixels[..., :1]).any():
        raise wrong
    return pixels[..., 0]


def present_values(values: np.ndarray) -> frozenset[int]:
    """Return the set of values in a mask; -1 stands for all values below 0, 256 for all above 255."""
    counts = np.bincount(values.ravel().astype(np.int32).clip(-1, 256) + 1, minlength=258)
    return frozenset((np.flatnonzero(counts) - 1).tolist())
