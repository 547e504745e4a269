"""Decoders from a file to uint8 pixels of the target size (images, and masks of class ids), and their geometry.

Coordinates are (x, y) at pixel centers: the center of the first pixel is 0. Resizing by s keeps the edges aligned, so
x' = (x + 0.5) s - 0.5. Boxes are measured from the image's edge: the whole image is (0, 0, width, height).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from cnntrain.data.files import byte_range
from cnntrain.data.image_reader import (
    DECODE_ERRORS,
    MAX_PIXELS,
    UnusableImage,
    apply_orientation,
    decode_fast_jpeg,
    distinct_values,
    exif_orientation,
    load_pixels,
    mask_values,
    open_image,
    read_fast_jpeg,
    to_8_bits,
    upright_size,
)
from cnntrain.errors import UserError, suggest

if TYPE_CHECKING:
    from PIL import Image

Resize = Literal["letterbox", "short_side", "stretch"]
Box = tuple[float, float, float, float]  # left, top, right, bottom
RESIZES = ("letterbox", "short_side", "stretch")
# Pixels per target pixel, along one side, that a JPEG decoded at a reduced size must have at least.
MIN_OVERSAMPLING = 2


@dataclass(frozen=True)
class ResizePlacement:
    """A box of the source image that is resized to a rectangle of the target, in whole target pixels."""

    box: Box  # in source pixels from the edge; may extend beyond the image
    left: int
    top: int
    width: int
    height: int

    def matrix(self) -> Tensor:
        """Return the (3, 3) float64 matrix from source to target pixel centers."""
        return _matrix(self).clone()

    def reduced(self, divisor: int) -> "ResizePlacement":
        """Return the placement for a source image that was downsampled by `divisor`."""
        if divisor == 1:
            return self
        left, top, right, bottom = (side / divisor for side in self.box)
        return replace(self, box=(left, top, right, bottom))


@lru_cache(maxsize=64)  # most images of a dataset have one of a few sizes
def _matrix(placement: ResizePlacement) -> Tensor:
    left, top, right, bottom = placement.box
    scale_x, scale_y = placement.width / (right - left), placement.height / (bottom - top)
    shift_x = (0.5 - left) * scale_x - 0.5 + placement.left
    shift_y = (0.5 - top) * scale_y - 0.5 + placement.top
    return torch.tensor([[scale_x, 0, shift_x], [0, scale_y, shift_y], [0, 0, 1]], dtype=torch.float64)


@lru_cache(maxsize=64)
def resize_geometry(
    width: int, height: int, target_size: tuple[int, int], resize: Resize, box: Box | None = None
) -> ResizePlacement:
    """Return the placement of an image of `width` x `height` pixels in a target of (height, width).

    Args:
        resize: `letterbox` keeps the whole image and pads it, `short_side` fills the target and crops the longer side
            at both ends, `stretch` fills the target and changes the aspect ratio.
        box: crop this box instead, extended around its center to the aspect ratio of the target.
    """
    target_height, target_width = target_size
    if box is not None:
        return ResizePlacement(match_aspect(box, target_size), 0, 0, target_width, target_height)
    if resize == "stretch":
        return ResizePlacement((0, 0, width, height), 0, 0, target_width, target_height)
    if resize == "letterbox":
        scale = min(target_width / width, target_height / height)
        inner_width = min(target_width, max(1, round(width * scale)))
        inner_height = min(target_height, max(1, round(height * scale)))
        left, top = (target_width - inner_width) // 2, (target_height - inner_height) // 2
        return ResizePlacement((0, 0, width, height), left, top, inner_width, inner_height)
    scale = max(target_width / width, target_height / height)
    half_width, half_height = target_width / scale / 2, target_height / scale / 2
    left, right = width / 2 - half_width, width / 2 + half_width
    top, bottom = height / 2 - half_height, height / 2 + half_height
    crop = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
    return ResizePlacement(crop, 0, 0, target_width, target_height)


def match_aspect(box: Box, target_size: tuple[int, int]) -> Box:
    """Return the smallest box around `box`, with the same center, that has the aspect ratio of the target."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    aspect = target_size[1] / target_size[0]
    width, height = max(width, height * aspect), max(height, width / aspect)
    center_x, center_y = (left + right) / 2, (top + bottom) / 2
    return center_x - width / 2, center_y - height / 2, center_x + width / 2, center_y + height / 2


def expand_box(box: Box, margin: float, target_size: tuple[int, int]) -> Box:
    """Extend `box` on each side by `margin` times its longer side, then to the aspect ratio of the target."""
    left, top, right, bottom = box
    extra = margin * max(right - left, bottom - top)
    return match_aspect((left - extra, top - extra, right + extra, bottom + extra), target_size)


def box_around_points(points: Tensor, margin: float) -> Box:
    """Return the bounding box of points (K, 2), extended on each side by `margin` times its longer side."""
    low, high = points.min(0).values.tolist(), points.max(0).values.tolist()
    extra = margin * max(high[0] - low[0], high[1] - low[1], 1.0)
    return low[0] + 0.5 - extra, low[1] + 0.5 - extra, high[0] + 0.5 + extra, high[1] + 0.5 + extra


def apply_affine(points: Tensor, matrix: Tensor) -> Tensor:
    """Apply affine matrices (..., 3, 3) to points (..., K, 2), in float64."""
    return points.double() @ matrix[..., :2, :2].mT + matrix[..., None, :2, 2]


def parse_size(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) from `data.size`, which is one number for a square or [height, width]."""
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or not all(type(side) is int and 1 <= side <= 8192 for side in pair):
        raise UserError(f"data.size must be pixels from 1 to 8192, one number or [height, width], got {size!r}")
    return pair[0], pair[1]


@dataclass(frozen=True)
class ImageDecoder:
    """Decode an image file to uint8 (channels, height, width).

    Transparent pixels become white. Padding (letterbox, or a box that extends beyond the image) is black.
    """

    height: int
    width: int
    channels: int
    resize: Resize = "letterbox"
    bits: int = 16  # in use in 16-bit files: the value 2**bits - 1 becomes white

    @property
    def target_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width

    @property
    def shape(self) -> tuple[int, ...]:
        return self.channels, self.height, self.width

    def placement(self, size: tuple[int, int], box: Box | None = None) -> ResizePlacement:
        """Return the placement of an image of (width, height) pixels, or of a box in it."""
        return resize_geometry(*size, self.target_size, self.resize, box)

    def __call__(self, path: str, box: Box | None = None) -> tuple[Tensor, Tensor]:
        """Return the pixels, and the (3, 3) float64 matrix from source to target pixels; raise BadFile on an error."""
        pixels, placement = self._decode_fast(path, box) or self._decode(path, box)
        array = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return torch.from_numpy(np.array(array, order="C")), placement.matrix()

    def _decode_fast(self, path: str, box: Box | None) -> tuple[np.ndarray, ResizePlacement] | None:
        """Decode most JPEG files; return None for other files and on errors, which `_decode` reports."""
        try:
            jpeg = read_fast_jpeg(byte_range(path))
            if jpeg is None:
                return None
            content, width, height, colors = jpeg
            placement = self.placement((width, height), box)
            if width * height > MAX_PIXELS or _jpeg_divisor((width, height), placement) > 1:
                return None
            pixels = decode_fast_jpeg(content, colors)
            shape = self.target_size if self.channels == 1 else (*self.target_size, 3)
            if placement.box == (0, 0, width, height) and pixels.shape == shape:
                return pixels, placement
            from PIL import Image

            return self._resized(Image.fromarray(pixels), placement), placement
        except DECODE_ERRORS:
            return None

    def _decode(self, path: str, box: Box | None) -> tuple[np.ndarray, ResizePlacement]:
        with open_image(path) as image:
            size, orientation = upright_size(image), exif_orientation(image)
            placement = self.placement(size, box)
            reduced = placement.reduced(_reduce_jpeg(image, placement, orientation > 1))
            load_pixels(image)
            if image.format == "TIFF":  # Pillow rotates TIFF images on load
                orientation = exif_orientation(image)
            upright = to_8_bits(apply_orientation(image, orientation), self.bits)
            return self._resized(upright, reduced), placement

    def _resized(self, image: "Image.Image", placement: ResizePlacement) -> np.ndarray:
        """Return uint8 (height, width), or (height, width, 3), of the target size."""
        from PIL import Image

        mode = "L" if self.channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        return resize_image(image, placement, self.target_size, Image.Resampling.BILINEAR, 0)


@dataclass(frozen=True)
class MaskDecoder:
    """Decode a mask file to uint8 class ids (height, width), resized by nearest neighbor."""

    height: int
    width: int
    resize: Resize
    ids: tuple[int, ...]  # class id for each of the 256 values in the file; -1 for values that are not a class
    fill: int  # id of pixels outside the mask

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    def __call__(self, path: str, box: Box | None = None) -> tuple[Tensor, Tensor]:
        """Return the ids, and the (3, 3) float64 matrix from source to target pixels; raise BadFile on an error."""
        from PIL import Image

        with open_image(path) as image:
            placement = resize_geometry(*image.size, self.shape, self.resize, box)
            values = mask_values(image)
            self.check_values(distinct_values(values))
            ids = np.asarray(self.ids, dtype=np.int16).astype(np.uint8)[values.astype(np.uint8)]
            nearest = Image.Resampling.NEAREST
            pixels = resize_image(Image.fromarray(ids), placement, self.shape, nearest, self.fill)
        return torch.from_numpy(np.array(pixels)), placement.matrix()

    def check_values(self, values: Iterable[int]) -> None:
        """Reject a mask with values (see `distinct_values`) that are not a class."""
        unknown = [value for value in values if not 0 <= value <= 255 or self.ids[value] < 0]
        if unknown:
            raise UnusableImage(f"has values that are not class ids: {format_values(unknown)}")


def format_values(values: Iterable[int]) -> str:
    """Format the first few values of a mask for a message."""
    names = [{-1: "below 0", 256: "above 255"}.get(value, str(value)) for value in sorted(values)]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def make_decoder(size: int | list[int], channels: int, resize: Resize) -> ImageDecoder:
    """Return the decoder for `data.size`, `data.channels` and `data.resize`; check their values."""
    if channels not in (1, 3):
        raise UserError(f"data.channels: must be 1 or 3, got {channels!r}")
    if resize not in RESIZES:
        near = suggest(str(resize), RESIZES)
        raise UserError(f"data.resize: {resize!r} is not one of {', '.join(RESIZES)}{near}")
    return ImageDecoder(*parse_size(size), channels, resize)


def resize_image(
    image: "Image.Image", placement: ResizePlacement, target_size: tuple[int, int], resample: Any, fill: int
) -> np.ndarray:
    """Crop the placement's box, resize it with antialiasing, and pad it to uint8 (height, width[, 3]) with `fill`."""
    from PIL import Image, ImageOps

    fill_color = fill if image.mode == "L" else (fill,) * 3
    left, top, right, bottom = placement.box
    width, height = image.size
    padding = [math.ceil(max(0.0, side)) for side in (-left, -top, right - width, bottom - height)]
    if any(padding):  # Pillow's resize accepts only boxes inside the image
        if (width + padding[0] + padding[2]) * (height + padding[1] + padding[3]) > MAX_PIXELS:
            raise UnusableImage("its box reaches too far outside the image")
        image = ImageOps.expand(image, tuple(padding), fill_color)
        left, top, right, bottom = left + padding[0], top + padding[1], right + padding[0], bottom + padding[1]
    box = (left, top, min(right, image.width), min(bottom, image.height))
    if box == (0, 0, *image.size) and image.size == target_size[::-1]:
        return np.asarray(image)
    resized = image.resize((placement.width, placement.height), resample, box=box)
    if (placement.height, placement.width) == target_size:
        return np.asarray(resized)
    padded = Image.new(image.mode, (target_size[1], target_size[0]), fill_color)
    padded.paste(resized, (placement.left, placement.top))
    return np.asarray(padded)


def _reduce_jpeg(image: "Image.Image", placement: ResizePlacement, rotated: bool) -> int:
    """Configure an opened JPEG to be decoded at 1/2, 1/4 or 1/8 of its size if that is enough; return the divisor.

    libjpeg omits the high frequencies of each 8x8 block: resampling without aliasing, and much faster.
    """
    width, height = image.size
    divisor = _jpeg_divisor(image.size, placement, rotated) if image.format == "JPEG" else 1
    if divisor == 1:
        return 1
    image.draft(image.mode, (width // divisor, height // divisor))  # pyright: ignore[reportArgumentType]
    return divisor if image.size == (-(-width // divisor), -(-height // divisor)) else 1


def _jpeg_divisor(size: tuple[int, int], placement: ResizePlacement, rotated: bool = False) -> int:
    """Return by how much a JPEG of (width, height) can be reduced while decoding: 8, 4, 2 or 1."""
    left, top, right, bottom = placement.box
    scale = min((right - left) / placement.width, (bottom - top) / placement.height)
    for divisor in (8, 4, 2):
        # A last column of fewer than `divisor` pixels becomes a whole pixel. That is accurate, except if a rotation
        # makes it the first column.
        uneven = rotated and (size[0] % divisor or size[1] % divisor)
        if divisor <= scale / MIN_OVERSAMPLING and min(size) >= 16 * divisor and not uneven:
            return divisor
    return 1
