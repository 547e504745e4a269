"""JPEGs decoded without Pillow have the same pixels as with Pillow; all other files are decoded by Pillow."""

import io
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cnntrain.data import decoder as decoder_module
from cnntrain.data import image_reader
from cnntrain.data.decoder import ImageDecoder
from cnntrain.data.files import BadFile, byte_range, member_path
from cnntrain.data.image_reader import decode_fast_jpeg, read_fast_jpeg


def picture(size: tuple[int, int], mode: str, seed: int = 0) -> Image.Image:
    """Coarse noise, as smooth as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, **how: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **how)
    return file.getvalue()


def outcome(decoder: ImageDecoder, path: str, box: tuple[float, float, float, float] | None = None) -> object:
    try:
        image, matrix = decoder(path, box)
    except BadFile as error:
        return error.reason
    return image.tolist(), matrix.tolist()


@pytest.fixture
def by_pillow(monkeypatch):
    """Return the outcome with Pillow only."""

    def decoded(*what: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(decoder_module, "read_fast_jpeg", lambda source: None)
            return outcome(*what)  # pyright: ignore[reportArgumentType]

    return decoded


ENCODINGS = (
    *({}, {"quality": 30}, {"quality": 98, "subsampling": 0}, {"subsampling": 1}),
    *({"progressive": True}, {"restart_marker_rows": 1}),
)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("how", ENCODINGS, ids=str)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (1, 1), (96, 17)], ids=str)
def test_pixels_equal_those_of_pillow(tmp_path, mode, how, size):
    (tmp_path / "a.jpg").write_bytes(encoded(picture(size, mode), **how))
    found = read_fast_jpeg(byte_range(str(tmp_path / "a.jpg")))
    assert found and found[1:3] == size
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.mode == mode
        assert np.array_equal(decode_fast_jpeg(found[0], found[3]), np.asarray(image))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.sampled_from([1, 3]),
    st.sampled_from(["L", "RGB", "CMYK"]),
    st.sampled_from(["letterbox", "short_side", "stretch"]),
    st.none() | st.tuples(*[st.floats(-20, 40)] * 2, *[st.floats(41, 100)] * 2),
)
def test_resized_images_equal_those_of_pillow(tmp_path_factory, size, target_size, channels, mode, resize, box):
    path = tmp_path_factory.mktemp("jpeg") / "a.jpg"
    path.write_bytes(encoded(picture(size, mode)))
    decoder = ImageDecoder(*target_size, channels, resize)
    pixels, placement = decoder._decode(str(path), box)
    fast = decoder._decode_fast(str(path), box)
    assert (fast is None) == (mode == "CMYK" or decoder_module._jpeg_divisor(size, placement) > 1)
    if fast:
        assert np.array_equal(fast[0], pixels) and fast[1] == placement


def test_images_with_an_orientation_are_left_to_pillow(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(encoded(picture((20, 10), "RGB"), exif=exif))
    assert read_fast_jpeg(byte_range(str(tmp_path / "a.jpg"))) is None
    image, _ = ImageDecoder(20, 10, 3, "stretch")(str(tmp_path / "a.jpg"))
    with Image.open(tmp_path / "a.jpg") as source:
        upright = np.asarray(source.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(image.permute(1, 2, 0), upright)


def test_too_many_pixels_and_special_files_are_not_read(tmp_path, monkeypatch):
    content = bytearray(encoded(picture((32, 32), "L")))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = b"\xff\xff\xff\xff"  # 65535 x 65535 px, by the header
    (tmp_path / "bomb.jpg").write_bytes(content)
    assert "million" in str(outcome(ImageDecoder(8, 8, 1), str(tmp_path / "bomb.jpg")))
    os.mkfifo(tmp_path / "fifo.jpg")
    assert outcome(ImageDecoder(8, 8, 1), str(tmp_path / "fifo.jpg")) == "is not a regular file"
    with pytest.raises(OSError, match="regular file"):
        read_fast_jpeg(byte_range("/dev/zero"))
    monkeypatch.setattr(image_reader, "MAX_JPEG_BYTES", 100)
    (tmp_path / "a.jpg").write_bytes(encoded(picture((32, 32), "L")))
    with pytest.raises(OSError, match="100 bytes"):
        read_fast_jpeg(byte_range(str(tmp_path / "a.jpg")))


def test_an_image_that_is_too_large_only_when_decoded_is_a_bad_file(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(BadFile) as caught, image_reader.open_image(str(tmp_path / "a.png")):
        raise Image.DecompressionBombError("too large")
    assert caught.value.reason == "has more than 100 million pixels"


def test_an_archive_member_is_read_in_place(tmp_path):
    first, second = (encoded(picture((16, 16), "RGB", seed)) for seed in (1, 2))
    (tmp_path / "a.tar").write_bytes(b"before" + first + second)
    member = member_path(tmp_path / "a.tar", "2.jpg", 6 + len(first), len(second))
    (tmp_path / "2.jpg").write_bytes(second)
    decoder = ImageDecoder(16, 16, 3)
    assert decoder._decode_fast(member, None) is not None
    assert torch.equal(decoder(member)[0], decoder(str(tmp_path / "2.jpg"))[0])


@pytest.mark.parametrize("kind", ["cut", "a byte", "ten bytes", "a hole"])
def test_a_damaged_file_has_the_same_outcome_as_with_pillow(tmp_path, by_pillow, kind):
    """The same pixels, or the same error."""
    random = np.random.default_rng(5)
    whole, path, refused = (
        encoded(picture((40, 40), "RGB"), progressive=kind == "a hole"),
        tmp_path / "a.jpg",
        0,
    )
    for _ in range(150):
        content, at = bytearray(whole), int(random.integers(2, len(whole)))
        if kind == "cut":
            del content[at:]
        elif kind == "a hole":
            del content[at : at + int(random.integers(1, 60))]
        else:
            for place in random.integers(2, len(whole), 1 if kind == "a byte" else 10):
                content[place] = random.integers(0, 256)
        path.write_bytes(content)
        found = outcome(ImageDecoder(40, 40, 3), str(path))
        assert found == by_pillow(ImageDecoder(40, 40, 3), str(path))
        refused += isinstance(found, str)
    assert refused
