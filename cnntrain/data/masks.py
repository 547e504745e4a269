"""From a mask file to class ids on the canvas."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cnntrain.data.canvas import Box, Resize, place
from cnntrain.data.decode import Unusable, cut, load_pixels, reading

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class MaskDecoder:
    """Turns a mask file into uint8 class ids (height, width), by nearest neighbour; ids are read, never
    converted.

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
            classes = self.class_ids(image)
            size = (self.height, self.width)
            pixels = cut(Image.fromarray(classes), placement, size, Image.Resampling.NEAREST, self.border)
        return torch.from_numpy(np.array(pixels)), placement.matrix()

    def class_ids(self, image: "Image.Image") -> np.ndarray:
        """uint8 (h, w) at the file's own size.

        Raises:
            Unusable: the file holds colours, or values that stand for no class.
        """
        if image.mode not in ("1", "L", "P", "I;16", "I"):
            raise Unusable(f"must hold class ids (grey or palette), but is {image.mode}")
        load_pixels(image)
        found = np.asarray(image)  # a palette image gives its indices
        counts = np.bincount(found.ravel().astype(np.int32).clip(-1, 256) + 1, minlength=258)
        unknown = [v - 1 for v in np.flatnonzero(counts).tolist() if v in (0, 257) or self.ids[v - 1] < 0]
        if unknown:
            shown = ", ".join({-1: "below 0", 256: "above 255"}.get(v, str(v)) for v in unknown[:8])
            raise Unusable(f"has ids that are no class: {shown}" + (", ..." if len(unknown) > 8 else ""))
        return np.asarray(self.ids, dtype=np.int16).astype(np.uint8)[found.astype(np.uint8)]
