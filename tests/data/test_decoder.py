"""Decoders: modes, orientation, damaged files, and the matrix."""

import ast
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

import cnntrain
from cnntrain.data.decoder import ImageDecoder, MaskDecoder, apply_affine, parse_size, resize_geometry
from cnntrain.data.files import BadFile
from cnntrain.data.image_reader import read_size
from cnntrain.errors import UserError

EVERY_ID = tuple(range(256))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(1, 128),
    st.integers(1, 128),
    st.sampled_from(["letterbox", "short_side", "stretch"]),
)
def test_the_matrix_maps_the_corners_to_the_placement(width, height, target_height, target_width, resize):
    placement = resize_geometry(width, height, (target_height, target_width), resize)
    matrix = placement.matrix()
    left, top, right, bottom = placement.box
    corners = torch.tensor([[left - 0.5, top - 0.5], [right - 0.5, bottom - 0.5]], dtype=torch.float64)
    moved = apply_affine(corners, matrix).flatten().tolist()
    expected = [
        placement.left,
        placement.top,
        placement.left + placement.width,
        placement.top + placement.height,
    ]
    assert moved == pytest.approx([side - 0.5 for side in expected], abs=1e-6)
    if resize == "short_side":
        assert (placement.width, placement.height) == (target_width, target_height)
        assert float(matrix[0, 0]) == pytest.approx(float(matrix[1, 1]))
        middle = torch.tensor([[(width - 1) / 2, (height - 1) / 2]], dtype=torch.float64)
        center = [(target_width - 1) / 2, (target_height - 1) / 2]
        assert apply_affine(middle, matrix).flatten().tolist() == pytest.approx(center, abs=1e-6)
    if resize == "letterbox":
        assert target_width in (placement.width,) or target_height in (placement.height,)


@pytest.mark.parametrize("resize", ["letterbox", "short_side", "stretch"])
@pytest.mark.parametrize(("height", "width"), [(90, 60), (60, 90), (31, 77)])
def test_a_drawn_blob_is_at_the_position_given_by_the_matrix(tmp_path, save, resize, height, width):
    ys, xs = np.mgrid[:height, :width]
    source = np.array([width * 0.45, height * 0.55])
    blob = 255 * np.exp(-((xs - source[0]) ** 2 + (ys - source[1]) ** 2) / (2 * 2.5**2))
    path = save(tmp_path / "blob.png", np.rint(blob).astype(np.uint8))
    image, matrix = ImageDecoder(48, 40, 1, resize)(str(path))
    weights = image[0].double()
    grid_y, grid_x = torch.meshgrid(torch.arange(48.0), torch.arange(40.0), indexing="ij")
    found = torch.stack([(weights * grid_x).sum(), (weights * grid_y).sum()]) / weights.sum()
    expected = apply_affine(torch.from_numpy(source)[None], matrix)[0]
    assert torch.dist(found, expected) < 0.1


def test_a_box_is_cropped_and_padded_with_black(tmp_path, save):
    array = np.full((10, 10, 3), 200, np.uint8)
    path = save(tmp_path / "a.png", array)
    image, matrix = ImageDecoder(8, 8, 3)(str(path), (-4.0, 0.0, 4.0, 8.0))
    assert matrix.tolist() == [[1, 0, 4], [0, 1, 0], [0, 0, 1]]
    assert (image[:, :, :4] == 0).all()
    assert (image[:, :, 4:] == 200).all()


def test_downsampling_is_antialiased(tmp_path, save):
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    image, _ = ImageDecoder(8, 8, 1)(str(save(tmp_path / "stripes.png", stripes)))
    assert int(image.min()) > 100
    assert int(image.max()) < 155


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("resize", ["letterbox", "short_side", "stretch"])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_decoded_at_a_reduced_size_has_the_same_content_and_position(
    tmp_path, monkeypatch, mode, resize, orientation
):
    """Against the whole picture resized by Pillow: waves that the target size can represent."""
    ys, xs = np.mgrid[:731, :1003] if orientation == 1 else np.mgrid[:732, :1004]
    waves = 127 + 60 * np.sin(xs / 60 + ys / 90) + 60 * np.cos(ys / 70 - xs / 200)
    plain = Image.fromarray(np.rint(waves).astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain.save(tmp_path / "large.jpg", quality=95, exif=exif)
    decoder, path = ImageDecoder(60, 48, 1 if mode == "L" else 3, resize), str(tmp_path / "large.jpg")
    used, draft = [], JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", lambda *a: used.append(a[2]) or draft(*a))
    reduced, matrix = decoder(path)
    assert used, "it was decoded whole"
    monkeypatch.setattr("cnntrain.data.decoder.MIN_OVERSAMPLING", 1e9)
    whole, same_matrix = decoder(path)
    assert len(used) == 1 and torch.equal(matrix, same_matrix)
    difference = (reduced.double() - whole.double()).abs()
    assert float(difference.mean()) < 0.6 and float(difference.max()) <= 6


def test_a_rotated_jpeg_of_uneven_size_is_decoded_at_full_size(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("L", (1003, 731), 99).save(tmp_path / "a.jpg", exif=exif)
    monkeypatch.setattr(JpegImageFile, "draft", None)
    assert int(ImageDecoder(16, 16, 1, "stretch")(str(tmp_path / "a.jpg"))[0].float().mean()) == 99


def modes() -> dict[str, Image.Image]:
    red = Image.new("RGB", (6, 4), (255, 0, 0))
    sixteen = np.full((4, 6), 0x8080, np.uint16)
    return {
        "1": Image.new("1", (6, 4), 1),
        "L": Image.new("L", (6, 4), 128),
        "LA": Image.new("LA", (6, 4), (128, 255)),
        "LA clear": Image.new("LA", (6, 4), (0, 0)),
        "P": red.convert("P", palette=Image.Palette.ADAPTIVE),
        "RGB": red,
        "RGBA": Image.new("RGBA", (6, 4), (255, 0, 0, 255)),
        "RGBA clear": Image.new("RGBA", (6, 4), (9, 9, 9, 0)),
        "CMYK": Image.new("CMYK", (6, 4), (0, 255, 255, 0)),
        "I;16": Image.fromarray(sixteen),
        "I": Image.fromarray(sixteen.astype(np.int32)),
        "F": Image.fromarray(np.full((4, 6), 0.5, np.float32)),
    }


GREY, RED, WHITE = (128, 128, 128), (255, 0, 0), (255, 255, 255)
EXPECTED = {
    **dict.fromkeys(("1", "LA clear", "RGBA clear"), WHITE),
    **dict.fromkeys(("P", "RGB", "RGBA", "CMYK"), RED),
    **dict.fromkeys(("L", "LA", "I;16", "I", "F"), GREY),
}


@pytest.mark.parametrize("mode", EXPECTED)
def test_every_mode_is_converted_to_the_displayed_color(tmp_path, mode):
    path = tmp_path / "image.tiff"
    modes()[mode].save(path)
    image, _ = ImageDecoder(4, 6, 3)(str(path))
    assert image[:, 2, 3].tolist() == pytest.approx(EXPECTED[mode], abs=1)
    gray, _ = ImageDecoder(4, 6, 1)(str(path))
    luma = sum(w * v for w, v in zip((0.299, 0.587, 0.114), EXPECTED[mode], strict=True))
    assert int(gray[0, 2, 3]) == pytest.approx(luma, abs=1)


def test_sixteen_bits_are_scaled_not_saturated(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(2, 0)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    image, _ = ImageDecoder(2, 256, 1)(str(tmp_path / "ramp.png"))
    assert image[0, 0].tolist() == list(range(256))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_pillow_does(tmp_path, pixels, orientation):
    from PIL import ImageOps

    image = Image.fromarray(pixels(12, 8))
    exif = image.getexif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    found, _ = ImageDecoder(*expected.shape[:2], 3)(str(path))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)
    assert read_size(str(path)) == (expected.shape[1], expected.shape[0])


def huge_png() -> bytes:
    """A PNG header of 20000 x 20000 pixels with nothing behind it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    head = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b""))


def half_a_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def half_a_png() -> bytes:
    """Pillow decodes it when it is asked for the EXIF block, and says so only then."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


BAD_FILES = {
    "half a PNG": (half_a_png(), "truncated"),
    "empty": (b"", "is empty"),
    "text": (b"<html>404</html>", "not an image"),
    "half": (half_a_jpeg(), "truncated"),
    "huge": (huge_png(), "100 million"),
    "header only": (b"\x89PNG\r\n\x1a\n", "not an image|damaged|truncated"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_reported_with_a_reason(tmp_path, kind):
    content, reason = BAD_FILES[kind]
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(BadFile) as caught:
        ImageDecoder(8, 8, 3)(str(path))
    assert any(part in caught.value.reason for part in reason.split("|")), caught.value.reason


def test_special_and_missing_files_are_rejected(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadFile, match="not a regular file"):
        ImageDecoder(8, 8, 3)(str(tmp_path / "pipe.png"))
    with pytest.raises(BadFile, match="does not exist"):
        ImageDecoder(8, 8, 3)(str(tmp_path / "missing.png"))


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=40),
    st.integers(0, 400),
    st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]),
)
def test_damaged_files_are_decoded_or_rejected(tmp_path_factory, noise, where, kind):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    content[where : where + len(noise)] = noise
    path = tmp_path_factory.getbasetemp() / "noise.img"
    path.write_bytes(content)
    try:
        image, _ = ImageDecoder(8, 8, 3)(str(path))
    except BadFile:
        return
    assert image.shape == (3, 8, 8)


def test_palette_masks_are_read_as_ids(tmp_path):
    ids = np.array([[0, 1], [2, 255]], np.uint8)
    mask = Image.fromarray(ids)
    mask = mask.convert("P")
    mask.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
    mask = Image.frombytes("P", (2, 2), ids.tobytes())
    mask.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250] + [0] * (256 * 3 - 9))
    mask.save(tmp_path / "m.png")
    found, _ = MaskDecoder(2, 2, "stretch", EVERY_ID, 255)(str(tmp_path / "m.png"))
    assert found.tolist() == ids.tolist()


def test_mask_and_image_have_the_same_geometry_and_padding_is_ignored(tmp_path, save):
    ids = np.zeros((20, 40), np.uint8)
    ids[:, 20:] = 3
    path = str(save(tmp_path / "m.png", ids))
    mask, matrix = MaskDecoder(16, 16, "letterbox", EVERY_ID, 255)(path)
    image, same = ImageDecoder(16, 16, 1, "letterbox")(path)
    assert torch.equal(matrix, same)
    assert (mask[:4] == 255).all()
    assert (mask[4:12, :8] == 0).all()
    assert (mask[4:12, 8:] == 3).all()
    assert (image[0, 4:12, 9:] == 3).all()


def test_unknown_ids_are_named(tmp_path, save):
    ids = tuple(i if i < 3 else -1 for i in range(256))
    path = save(tmp_path / "m.png", np.array([[0, 1, 7, 9]], np.uint8))
    with pytest.raises(BadFile, match="not class ids: 7, 9"):
        MaskDecoder(4, 4, "stretch", ids, 255)(str(path))


@pytest.mark.parametrize("size", [0, -1, [3], [1, 2, 3], True, 2.5, [8, 0], "big"])
def test_invalid_sizes_are_rejected(size):
    with pytest.raises(UserError, match=r"data\.size"):
        parse_size(size)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a program fails the test."""

    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError(f"a program was started: {arguments}")

    for name in ("system", "popen", "posix_spawn", "posix_spawnp", "execv", "execve"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("name", ["a.png", "a.eps", "a.jpg"])
def test_postscript_is_rejected_under_any_name(tmp_path, monkeypatch, name):
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")  # as if Ghostscript were installed
    (tmp_path / name).write_bytes(EPS)
    path = str(tmp_path / name)
    for read in (read_size, ImageDecoder(8, 8, 3), MaskDecoder(8, 8, "stretch", EVERY_ID, 255)):
        with pytest.raises(BadFile, match="supported format"):
            read(path)


def test_every_image_is_opened_with_a_list_of_formats():
    """Without one Pillow tries all that it knows, and some start programs."""
    package = Path(cnntrain.__file__).parent
    calls = []
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and (
                (called.attr == "open" and isinstance(called.value, ast.Name) and called.value.id == "Image")
                or called.attr in ("imread", "read_image", "decode_image")
            ):
                calls.append((file.name, [keyword.arg for keyword in node.keywords]))
    assert calls == [("image_reader.py", ["formats"])]


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_tiff_is_rotated_once(tmp_path, pixels, orientation):
    """Pillow turns TIFFs by itself while it loads them, and all others not at all."""
    from PIL import ImageOps

    image = Image.fromarray(pixels(12, 8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.tif", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "turned.tif")))
    height, width = (8, 12) if orientation != 3 else (12, 8)
    assert expected.shape == (height, width, 3)
    found, _ = ImageDecoder(height, width, 3)(str(tmp_path / "turned.tif"))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)
    assert read_size(str(tmp_path / "turned.tif")) == (width, height)


def test_pixel_data_of_another_size_than_the_header_is_rejected(tmp_path, monkeypatch):
    """By the header's size the picture is placed: it would be cut wrongly."""
    Image.new("RGB", (16, 12)).save(tmp_path / "a.png")
    load = PngImageFile.load

    def shrunk(image: PngImageFile) -> object:
        found = load(image)
        image._size = (8, 6)
        return found

    monkeypatch.setattr(PngImageFile, "load", shrunk)
    with pytest.raises(BadFile, match=r"16 x 12.*8 x 6"):
        ImageDecoder(8, 8, 3)(str(tmp_path / "a.png"))


def heic(path: Path, array: np.ndarray, orientation: int = 1) -> None:
    """Save losslessly enough, as phones do: turned pixels and an EXIF note."""
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(array)
    pillow_heif.from_pillow(image).save(path, quality=-1, exif=exif.tobytes())


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_is_read_if_its_package_is_installed(tmp_path, orientation):
    ramp = np.linspace(20, 220, 64 * 48 * 3).reshape(48, 64, 3).astype(np.uint8)
    heic(tmp_path / "a.png", ramp, orientation)  # the content decides, not the name
    width, height = read_size(str(tmp_path / "a.png"))
    assert (width, height) == ((48, 64) if orientation == 6 else (64, 48))
    found, _ = ImageDecoder(height, width, 3)(str(tmp_path / "a.png"))
    expected = np.rot90(ramp, -1) if orientation == 6 else ramp
    assert float((found.permute(1, 2, 0).double() - torch.from_numpy(expected.copy())).abs().mean()) < 3
    assert "HEIF" not in Image.OPEN, "it was registered for the whole process"


def test_heic_without_its_package_names_the_package(tmp_path, monkeypatch):
    heic(tmp_path / "a.heic", np.zeros((32, 32, 3), np.uint8))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadFile, match="pip install pillow-heif"):
        ImageDecoder(8, 8, 3)(str(tmp_path / "a.heic"))
