"""From an image file of any kind to uint8 pixels on the canvas."""

import io
import math
import os
import stat
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cnntrain.data.jpeg import plain_jpeg
from cnntrain.data.resize import Box, Resize, ResizePlacement, place
from cnntrain.data.spans import ByteRange, span_of
from cnntrain.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

LARGEST_PIXELS = 100_000_000  # a few kilobytes of PNG can unpack to terabytes: refused from the header
# Allowed formats, all decoded inside this process. Pillow's other formats are risky: EPS runs Ghostscript, WMF and
# others call registered handlers, IPTC opens embedded files, and decoders of rare formats are hardly tested.
FORMATS = (
    "JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "QOI", "TGA", "PCX", "ICO",
)  # fmt: skip
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
HEIF_ENDINGS = {".heic", ".heif"}
# Magic bytes of rejected formats, for the error message.
REFUSED_FORMATS = (
    (b"%!PS", "EPS or PostScript"), (b"\xc5\xd0\xd3\xc6", "EPS"), (b"%PDF", "PDF"), (b"8BPS", "Photoshop"),
    (b"<svg", "SVG"), (b"<?xml", "XML or SVG"), (b"\xd7\xcd\xc6\x9a", "WMF"), (b"\x89HDF", "HDF5"),
    (b"SIMPLE  =", "FITS"), (b"icns", "ICNS"), (b"DDS ", "DDS"), (b"\x01\xda", "SGI"),
)  # fmt: skip
SHOWN_FILES = 20
FINER = 2  # times the pixels per side that are needed: what a JPEG that is decoded at a fraction still has at least
# What Pillow's readers raise on damaged files, apart from its DecompressionBombError.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, RuntimeError,
          AttributeError, AssertionError, struct.error, zlib.error)  # fmt: skip


class BadFile(Exception):
    """One file that can't be used, and why; gathered, and reported together by `refuse`."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)
        self.path, self.reason = str(path), reason


class Unusable(ValueError):
    """Sound pixels that can't be used all the same; the message tells why."""


def refuse(bad: Iterable[BadFile], of: int, root: str | Path | None = None, advice: str = "") -> None:
    """Raise one `UserError` that names all of `bad`, or none when there are none.

    Args:
        of: how many files there are in all.
        root: folder that the names are shown relative to.
        advice: a remedy for several files, appended on a separate line.
    """
    ordered = sorted(bad, key=lambda one: one.path)
    if not ordered:
        return
    lines = [
        f"  {os.path.relpath(b.path, root) if root else b.path}: {b.reason}" for b in ordered[:SHOWN_FILES]
    ]
    if len(ordered) > SHOWN_FILES:
        lines.append(f"  ... and {len(ordered) - SHOWN_FILES} more")
    lines += [advice] if advice else []
    where = f" under {root}" if root else ""
    raise UserError(
        f"data: {len(ordered)} of {of} files{where} can't be used; repair or remove them:\n"
        + "\n".join(lines)
    )


@dataclass(frozen=True)
class Decoder:
    """Turns an image file into uint8 (channels, height, width).

    Transparent pixels are laid over white, letterbox borders and what a box covers outside the image are
    black.

    Attributes:
        bits: number of bits in use in 16-bit files: the value 2**bits - 1 becomes white.
    """

    height: int
    width: int
    channels: int
    resize: Resize = "letterbox"
    bits: int = 16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.channels, self.height, self.width

    def __call__(self, path: str, box: Box | None = None) -> tuple[Tensor, Tensor]:
        """The pixels, and the matrix from source to canvas, float64 (3, 3).

        Raises:
            BadFile: the file can't be used.
        """
        pixels, placement = self._plain(path, box) or self._any(path, box)
        array = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return torch.from_numpy(np.array(array, order="C")), placement.matrix()

    def _plain(self, path: str, box: Box | None) -> tuple[np.ndarray, ResizePlacement] | None:
        """What `_any` returns, sooner; None for what is no plain JPEG, and for all that it has to look at or refuse."""
        try:
            jpeg = plain_jpeg(span_of(path))
            if jpeg is None or jpeg.width * jpeg.height > LARGEST_PIXELS:
                return None
            size = jpeg.width, jpeg.height
            placement = place(*size, (self.height, self.width), self.resize, box)
            if _divisor(size, placement) > 1:
                return None
            pixels = jpeg.pixels()
            canvas = (self.height, self.width) if self.channels == 1 else (self.height, self.width, 3)
            if placement.box == (0, 0, *size) and pixels.shape == canvas:
                return pixels, placement
            from PIL import Image

            return self._drawn(Image.fromarray(pixels), placement), placement
        except DAMAGE:
            return None

    def _any(self, path: str, box: Box | None) -> tuple[np.ndarray, ResizePlacement]:
        with reading(path) as image:
            size, orientation = _upright_size(image), _orientation(image)
            placement = place(*size, (self.height, self.width), self.resize, box)
            reduced = placement.reduced(_reduce(image, placement, orientation > 1))
            load_pixels(image)
            if image.format == "TIFF":  # Pillow rotates these on load
                orientation = _orientation(image)
            return self._drawn(to_eight_bits(turn_upright(image, orientation), self.bits), reduced), placement

    def _drawn(self, image: "Image.Image", placement: ResizePlacement) -> np.ndarray:
        """uint8 (height, width), or (height, width, 3), of the canvas."""
        from PIL import Image

        mode = "L" if self.channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        return cut(image, placement, (self.height, self.width), Image.Resampling.BILINEAR, 0)


class reading:
    """An opened image inside `with`: damage becomes `BadFile`, too many pixels are refused by the header."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> "Image.Image":
        from PIL import Image

        span = span_of(self.path)
        try:
            about = os.stat(span.file)
            if not stat.S_ISREG(about.st_mode):  # opening a FIFO would wait for ever
                raise BadFile(self.path, "is no regular file")
            if about.st_size == 0:
                raise BadFile(self.path, "is empty")
            self.image = _open(span)
        except (*DAMAGE, Image.DecompressionBombError) as error:
            raise BadFile(self.path, _reason(error)) from None
        width, height = self.image.size
        if width * height > LARGEST_PIXELS:
            self.image.close()
            raise BadFile(self.path, f"{width} x {height} pixels are more than 100 million")
        return self.image

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.image.close()
        if kind is not None and issubclass(kind, DAMAGE):
            raise BadFile(self.path, _reason(error)) from None


def _open(span: ByteRange) -> "Image.Image":
    """Open an image and read its header; supports `FORMATS`, and HEIC if `pillow_heif` is installed.

    Raises:
        Unusable: the file has another format.
    """
    from PIL import Image, UnidentifiedImageError

    source = span.file if span.size is None else _part(span)
    try:
        return Image.open(source, formats=known_formats())
    except (
        UnidentifiedImageError,
        RuntimeError,
    ) as error:  # RuntimeError: raised by the AVIF reader for most corrupt files
        failure = error
    start = _part(span._replace(offset=span.offset or 0, size=min(span.size or 16, 16))).getvalue()
    if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS:
        try:
            from pillow_heif import HeifImageFile
        except ImportError:
            remedy = "`pip install pillow-heif`, or convert it to JPEG or PNG"
            raise Unusable(f"is HEIC, which needs another package: {remedy}") from None
        return HeifImageFile(source)  # opened directly, not registered with Pillow for the whole process
    for beginning, name in REFUSED_FORMATS:
        if start.startswith(beginning):
            raise Unusable(f"is {name}, which is not supported; convert it to PNG or JPEG")
    if isinstance(failure, RuntimeError):
        raise failure
    raise Unusable("is no image in a supported format (JPEG, PNG, GIF, BMP, TIFF, WebP, AVIF and others)")


@cache
def known_formats() -> tuple[str, ...]:
    """Return the formats in `FORMATS` that this version of Pillow has; it raises an error for unknown names."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def image_endings() -> set[str]:
    """Return the file name extensions (lowercase, with the dot) of the supported formats."""
    from PIL import Image

    endings = Image.registered_extensions()
    return {ending for ending, name in endings.items() if name in known_formats()} | HEIF_ENDINGS


def load_pixels(image: "Image.Image") -> None:
    """Decode an opened image.

    Raises:
        Unusable: the size of the pixel data differs from the size in the header, which determines the placement.
    """
    size = image.size
    image.load()
    turned = image.format == "TIFF" and image.size == size[::-1]
    if image.size != size and not turned:
        shown = "{} x {}".format(*size), "{} x {}".format(*image.size)
        raise Unusable(f"is damaged: its header says {shown[0]} pixels, its data {shown[1]}")


def _part(span: ByteRange) -> io.BytesIO:
    with open(span.file, "rb") as file:
        return io.BytesIO(os.pread(file.fileno(), span.size or 0, span.offset or 0))


def _reason(error: BaseException | None) -> str:
    text = str(error)
    if isinstance(error, Unusable):
        return text
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if "DecompressionBomb" in type(error).__name__:
        return "more than 100 million pixels"
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return "is truncated"
    return f"is damaged ({text or type(error).__name__})"


def upright_size(path: str) -> tuple[int, int]:
    """(width, height) in pixels after the EXIF orientation, from the header alone.

    Raises:
        BadFile: the header can't be read.
    """
    with reading(path) as image:
        return _upright_size(image)


def _upright_size(image: "Image.Image") -> tuple[int, int]:
    """Return (width, height) in pixels after the EXIF orientation, without loading the image."""
    width, height = image.size
    if image.format == "TIFF":  # Pillow may have swapped the sides already; the tags are unchanged
        tags: Any = getattr(image, "tag_v2", {})
        width, height = int(tags.get(256, width)), int(tags.get(257, height))
    return (height, width) if _orientation(image) >= 5 else (width, height)


def _orientation(image: "Image.Image") -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or its block is damaged (the pixels may be sound)."""
    from PIL import Image

    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():
        return 1
    try:
        # The header's. PNG's own getexif decodes the pixels too, and what fails then fails only once.
        value = Image.Image.getexif(image).get(0x0112, 1)
    except DAMAGE:
        return 1
    return value if value in range(1, 9) else 1


def _reduce(image: "Image.Image", placement: ResizePlacement, turned: bool) -> int:
    """Have an opened JPEG decoded at 1/2, 1/4 or 1/8 of its size where that is still finer than is needed; the divisor.

    libjpeg leaves the high frequencies of each 8x8 block out: a resampling without aliasing, and much less work.
    """
    if image.format != "JPEG":
        return 1
    width, height = image.size
    divisor = _divisor(image.size, placement, turned)
    if divisor == 1:
        return 1
    image.draft(image.mode, (width // divisor, height // divisor))  # pyright: ignore[reportArgumentType]
    return divisor if image.size == (-(-width // divisor), -(-height // divisor)) else 1


def _divisor(size: tuple[int, int], placement: ResizePlacement, turned: bool = False) -> int:
    """8, 4 or 2 where a JPEG of (width, height) pixels decoded at that fraction is still finer than needed; else 1."""
    left, top, right, bottom = placement.box
    spare = min((right - left) / placement.width, (bottom - top) / placement.height) / FINER
    # A last column of less than `d` pixels counts as a whole one: right, unless turning makes it the first.
    return next(
        (
            d
            for d in (8, 4, 2)
            if d <= spare and min(size) >= 16 * d and not (turned and (size[0] % d or size[1] % d))
        ),
        1,
    )


def turn_upright(image: "Image.Image", orientation: int | None = None) -> "Image.Image":
    """The image as the camera was held (EXIF 2.32, section 4.6.4: orientation), which is read where it is not given."""
    orientation = orientation or _orientation(image)
    if orientation == 1:
        return image
    from PIL.Image import Transpose

    turns = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
             5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
             8: Transpose.ROTATE_90}  # fmt: skip
    return image.transpose(turns[orientation])


def to_eight_bits(image: "Image.Image", bits: int = 16) -> "Image.Image":
    """Any mode to one of L and RGB: 16 bits are scaled (Pillow's convert would saturate), transparency is
    white.

    Args:
        bits: number of bits in use: the value 2**bits - 1 becomes 255.

    Raises:
        Unusable: 32-bit values with an unknown range, or values that need more than `bits` bits.
    """
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        if image.mode == "F":
            if not (values.min() >= 0 and values.max() <= 1):
                raise Unusable("has floating-point pixels outside 0 to 1; save it with 8 or 16 bits")
            values, bits = values * 65535, 16
        if values.min() < 0 or values.max() > 65535:
            raise Unusable("has 32-bit pixels outside 0 to 65535; save it with 8 or 16 bits")
        white = 2**bits - 1
        if values.max() > white:
            raise Unusable(
                f"has values up to {int(values.max())}, but data.bits={bits} allows at most {white}"
            )
        return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        clear = image.convert("RGBA")
        white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, clear).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def cut(
    image: "Image.Image", placement: ResizePlacement, canvas: tuple[int, int], filter: Any, fill: int
) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3): the placement's box, resized (antialiased) onto a canvas of `fill`."""
    from PIL import Image, ImageOps

    left, top, right, bottom = placement.box
    width, height = image.size
    beyond = [math.ceil(max(0.0, side)) for side in (-left, -top, right - width, bottom - height)]
    if any(beyond):  # Pillow resizes only what lies inside
        if (width + beyond[0] + beyond[2]) * (height + beyond[1] + beyond[3]) > LARGEST_PIXELS:
            raise Unusable("its box reaches too far outside the image")
        image = ImageOps.expand(image, tuple(beyond), fill if image.mode == "L" else (fill,) * 3)
        left, top, right, bottom = left + beyond[0], top + beyond[1], right + beyond[0], bottom + beyond[1]
    box = (left, top, min(right, image.width), min(bottom, image.height))
    if box == (0, 0, *image.size) and image.size == canvas[::-1]:
        return np.asarray(image)
    resized = image.resize((placement.width, placement.height), filter, box=box)
    if (placement.height, placement.width) == canvas:
        return np.asarray(resized)
    sheet = Image.new(image.mode, (canvas[1], canvas[0]), fill if image.mode == "L" else (fill,) * 3)
    sheet.paste(resized, (placement.left, placement.top))
    return np.asarray(sheet)
