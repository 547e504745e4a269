"""Plain JPEGs read by libjpeg-turbo alone: for small ones Pillow takes five times as long to come to the same pixels.

Plain: gray or YCbCr, and nothing in it that might turn the image. All else, and what is damaged, is left to Pillow.
"""

import os
import stat
from typing import NamedTuple

import numpy as np
from simplejpeg import decode_jpeg, decode_jpeg_header

from cnntrain.data.spans import ByteRange

LARGEST_FILE = 1 << 26  # bytes: a larger one is not read whole
# EXIF 2.32, section 4.7.2; XMP part 3, section 1.1.3.
MAY_TURN = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
COLORS = {"Gray": "GRAY", "YCbCr": "RGB"}


class PlainJpeg(NamedTuple):
    """Its bytes, and from its header the size in pixels and what it is decoded to, GRAY or RGB."""

    content: bytes
    width: int
    height: int
    colors: str

    def pixels(self) -> np.ndarray:
        """uint8 (height, width), or (height, width, 3) of RGB.

        Raises:
            ValueError: it is damaged, however little.
        """
        decoded = decode_jpeg(self.content, self.colors)
        return decoded[:, :, 0] if self.colors == "GRAY" else decoded


def plain_jpeg(span: ByteRange) -> PlainJpeg | None:
    """The file read, if that is what it is.

    Raises:
        OSError: it can't be read.
        ValueError: its header is damaged.
    """
    about = os.stat(span.file)
    size = about.st_size if span.size is None else span.size
    if not stat.S_ISREG(about.st_mode) or size > LARGEST_FILE:  # opening a FIFO would wait for ever
        return None
    file = os.open(span.file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        if span.offset:
            os.lseek(file, span.offset, os.SEEK_SET)
        content = os.read(file, size)
    finally:
        os.close(file)
    if not content.startswith(b"\xff\xd8\xff") or any(mark in content for mark in MAY_TURN):
        return None
    height, width, space, _ = decode_jpeg_header(content)
    return PlainJpeg(content, int(width), int(height), COLORS[space]) if space in COLORS else None
