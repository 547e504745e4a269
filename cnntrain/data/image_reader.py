"""Open image files of any supported format: header, orientation, pixels, and the values of mask files."""

import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from simplejpeg import decode_jpeg, decode_jpeg_header

from cnntrain.data.files import BadFile, ByteRange, byte_range

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 100_000_000  # checked in the header: a few kilobytes of PNG can decompress to terabytes
MAX_JPEG_BYTES = 1 << 26  # larger files are not read into memory at once
# Allowed formats, all decoded inside this process. Pillow's other formats are risky: EPS runs Ghostscript, WMF and
# others call registered handlers, IPTC opens embedded files, and decoders of rare formats are hardly tested.
FORMATS = "JPEG PNG GIF BMP DIB TIFF WEBP AVIF JPEG2000 PPM QOI TGA PCX ICO".split()
HEIF_BRANDS = b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split()
HEIF_EXTENSIONS = {".heic", ".heif"}
# Exceptions of Pillow's readers on damaged files, except its DecompressionBombError.
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, RuntimeError),
    *(AttributeError, AssertionError, struct.error, zlib.error),
)
# Markers of metadata with an orientation: EXIF 2.32, section 4.7.2; XMP part 3, section 1.1.3.
ORIENTATION_MARKERS = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
JPEG_COLORS = {"Gray": "GRAY", "YCbCr": "RGB"}  # color space in the file: simplejpeg's output color space


class UnusableImage(ValueError):
    """An intact image that cannot be used; the message is the reason."""


def read_fast_jpeg(source: ByteRange) -> tuple[bytes, int, int, str] | None:
    """Read a gray or YCbCr JPEG without orientation metadata, which libjpeg-turbo decodes five times as fast as Pillow.

    Returns:
        The file's content, width, height, and simplejpeg's name of its colors; None for all other files.

    Raises:
        OSError: the file cannot be read, or is large.
        ValueError: the header is damaged.
    """
    content = source.read(MAX_JPEG_BYTES, prefix=b"\xff\xd8\xff")
    if not content or any(marker in content for marker in ORIENTATION_MARKERS):
        return None
    height, width, space, _ = decode_jpeg_header(content)
    return (content, int(width), int(height), JPEG_COLORS[space]) if space in JPEG_COLORS else None


def decode_fast_jpeg(content: bytes, colors: str) -> np.ndarray:
    """Decode to uint8 (height, width), or (height, width, 3) for RGB: for small images the same pixels as Pillow's."""
    decoded = decode_jpeg(content, colors)
    return decoded[:, :, 0] if colors == "GRAY" else decoded


@contextmanager
def open_image(path: str) -> Iterator["Image.Image"]:
    """Open an image and read its header. Decoding errors inside the `with` block are raised as `BadFile`.

    Raises:
        BadFile: the file is unreadable, damaged, in an unsupported format, or has more than 100 million pixels.
    """
    from PIL import Image

    source = byte_range(path)
    try:
        status = os.stat(source.file)
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would block forever
            raise BadFile(path, "is not a regular file")
        if status.st_size == 0:
            raise BadFile(path, "is empty")
        image = _open(source)
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise BadFile(path, _reason(error)) from None
    try:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadFile(path, f"has {width} x {height} pixels, more than 100 million")
        yield image
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise BadFile(path, _reason(error)) from None
    finally:
        image.close()


def _open(source: ByteRange) -> "Image.Image":
    """Open an image with Pillow: one of `FORMATS`, or HEIC if `pillow_heif` is installed."""
    from PIL import Image, UnidentifiedImageError

    file = source.file if source.size is None else io.BytesIO(source.read())
    try:
        return Image.open(file, formats=supported_formats())
    except (UnidentifiedImageError, RuntimeError) as error:  # the AVIF reader raises RuntimeError for corrupt files
        failure = error
    start = source._replace(size=min(source.size or 16, 16)).read()
    if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS:
        try:
            from pillow_heif import HeifImageFile
        except ImportError:
            remedy = "run `pip install pillow-heif`, or convert it to JPEG or PNG"
            raise UnusableImage(f"is HEIC, which needs another package: {remedy}") from None
        return HeifImageFile(file)  # opened directly, not registered with Pillow for the whole process
    if isinstance(failure, RuntimeError):
        raise failure
    formats = "JPEG, PNG, GIF, BMP, TIFF, WebP, AVIF and others"
    raise UnusableImage(f"is not an image in a supported format ({formats}); convert it to PNG or JPEG")


def _reason(error: BaseException) -> str:
    """Return the reason for `BadFile`."""
    text = str(error)
    if isinstance(error, UnusableImage):
        return text
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if "DecompressionBomb" in type(error).__name__:
        return "has more than 100 million pixels"
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return "is truncated"
    return f"is damaged ({text or type(error).__name__})"


@cache
def supported_formats() -> tuple[str, ...]:
    """Return the formats in `FORMATS` that this version of Pillow has; it raises an error for unknown names."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def image_extensions() -> set[str]:
    """Return the file name extensions (lowercase, with the dot) of the supported formats."""
    from PIL import Image

    extensions = Image.registered_extensions()
    return {name for name, kind in extensions.items() if kind in supported_formats()} | HEIF_EXTENSIONS


def load_pixels(image: "Image.Image") -> None:
    """Decode an opened image; reject pixel data of another size than the header's, which determines the placement."""
    size = image.size
    image.load()
    rotated = image.format == "TIFF" and image.size == size[::-1]
    if image.size != size and not rotated:
        header, data = "{} x {}".format(*size), "{} x {}".format(*image.size)
        raise UnusableImage(f"is damaged: its header says {header} pixels, its data {data}")


def read_size(path: str) -> tuple[int, int]:
    """Return (width, height) in pixels after the EXIF orientation, from the header; raise BadFile on an error."""
    with open_image(path) as image:
        return upright_size(image)


def upright_size(image: "Image.Image") -> tuple[int, int]:
    """Return (width, height) in pixels after the EXIF orientation, without decoding the image."""
    width, height = image.size
    if image.format == "TIFF":  # Pillow may have swapped the sides already; the tags are unchanged
        tags: Any = getattr(image, "tag_v2", {})
        width, height = int(tags.get(256, width)), int(tags.get(257, height))
    return (height, width) if exif_orientation(image) >= 5 else (width, height)


def exif_orientation(image: "Image.Image") -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none or the metadata is damaged."""
    from PIL import Image

    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():
        return 1
    try:
        # Image.getexif reads only the header; PNG's own getexif also decodes the pixels, and raises errors only once.
        value = Image.Image.getexif(image).get(0x0112, 1)
    except DECODE_ERRORS:
        return 1
    return value if value in range(1, 9) else 1


def apply_orientation(image: "Image.Image", orientation: int) -> "Image.Image":
    """Rotate and flip the image upright (EXIF 2.32, section 4.6.4); `orientation` is from 1 to 8."""
    if orientation == 1:
        return image
    from PIL.Image import Transpose

    transposes = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
    return image.transpose(Transpose[transposes[orientation - 2]])


def to_8_bits(image: "Image.Image", bits: int = 16) -> "Image.Image":
    """Convert any mode to L or RGB. 16-bit values are scaled (Pillow saturates); transparent pixels become white.

    `bits` are the bits in use: the value 2**bits - 1 becomes 255. Values that need more bits are rejected, and 32-bit
    values of an unknown range.
    """
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        if image.mode == "F":
            if not (values.min() >= 0 and values.max() <= 1):
                raise UnusableImage("has floating-point pixels outside 0 to 1; save it with 8 or 16 bits")
            values, bits = values * 65535, 16
        if values.min() < 0 or values.max() > 65535:
            raise UnusableImage("has 32-bit pixels outside 0 to 65535; save it with 8 or 16 bits")
        white = 2**bits - 1
        if values.max() > white:
            raise UnusableImage(f"has values up to {int(values.max())}, but data.bits={bits} allows at most {white}")
        return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        foreground = image.convert("RGBA")
        background = Image.new("RGBA", foreground.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, foreground).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def mask_values(image: "Image.Image") -> np.ndarray:
    """Return the values of an opened mask file as integers (h, w); palette images give their indices.

    RGB images are accepted if all channels are equal and no pixel is transparent; others are rejected.
    """
    load_pixels(image)
    if image.mode in ("1", "L", "P", "I;16", "I"):
        return np.asarray(image)
    if image.mode in ("RGB", "RGBA", "LA"):
        pixels = np.asarray(image)
        colors, alpha = (pixels, None) if image.mode == "RGB" else (pixels[..., :-1], pixels[..., -1])
        if (colors == colors[..., :1]).all() and (alpha is None or (alpha == 255).all()):
            return colors[..., 0]
    raise UnusableImage(
        f"must contain class ids (gray or palette), but is {image.mode}; save each pixel's class id as a gray value"
    )


def distinct_values(values: np.ndarray) -> frozenset[int]:
    """Return the distinct values of a mask; -1 stands for all values below 0, 256 for all above 255."""
    counts = np.bincount(values.ravel().astype(np.int32).clip(-1, 256) + 1, minlength=258)
    return frozenset((np.flatnonzero(counts) - 1).tolist())
