"""Damaged and renamed files of every format of Pillow are read or rejected, without side effects."""

import io
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from cnntrain.cli import main
from cnntrain.data.decoder import ImageDecoder, MaskDecoder
from cnntrain.data.files import BadFile
from cnntrain.data.image_reader import image_extensions, read_size

# `FUZZ_EXAMPLES=200000 python -m pytest -m long tests/fuzz/test_fuzz_images.py` takes an hour.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "20000"))
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")
# How formats begin that Pillow opens and does not write.
BEGINNINGS = {
    "PSD": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x08\0\0\0\x08\0\x08\0\3" + bytes(40),
    "FITS": b"SIMPLE  = T".ljust(80) + b"BITPIX  = 8".ljust(80) + b"END".ljust(2720),
    "DCX": b"\xb1\x68\xde\x3a" + bytes(64),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(60),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(60),
    "GRIB": b"GRIB" + bytes(3) + b"\1" + bytes(60),
    "BUFR": b"BUFR" + bytes(60),
    "MPEG": b"\0\0\1\xb3\x01\x00\x10" + bytes(60),
    "FLI": b"\x80\0\0\0\x11\xaf\1\0\x08\0\x08\0" + bytes(120),
    "XPM": b'/* XPM */\nstatic char *a[] = {\n"1 1 1 1",\n"a c #ffffff",\n"a"};\n',
    "SUN": b"\x59\xa6\x6a\x95" + bytes(28),
    "GBR": b"\0\0\0\x14\0\0\0\1\0\0\0\x08\0\0\0\x08\0\0\0\1" + bytes(64),
    "XVTHUMB": b"P7 332\n#END_OF_COMMENTS\n1 1 255\na",
    "IPTC": b"\x1c\x03\x3c\0\2\1\0\x1c\x08\x0a\0\4%!PS",
    "EPS at an offset": b"\xc5\xd0\xd3\xc6\x1e\0\0\0" + bytes(22) + b"%!PS-Adobe-3.0\n%%BoundingBox: 0 0 8 8\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>",
    "PAM": b"P7\nWIDTH 2\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nENDHDR\nab",
}
WAYS_OUT = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.spawn",
    "os.posix_spawn",
    "pty.spawn",
    "socket.connect",
    "shutil.",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.utime",
)


class Guard:
    """Records every program that is started, and every file outside `allowed` that is written or removed.

    An audit hook (PEP 578) hears of them wherever in Python they come from; it can't be taken away, only silenced.
    """

    def __init__(self) -> None:
        self.watching = False
        self.allowed = ""
        self.seen: list[str] = []
        self._folder: int | None = None  # of the `os.open` that is under way: its audit event does not name it
        self._open = os.open
        sys.addaudithook(self._hear)

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        """`os.open`, with the folder noted that a relative path starts from."""
        self._folder = dir_fd
        try:
            return self._open(path, flags, mode, dir_fd=dir_fd)
        finally:
            self._folder = None

    def _absolute(self, path: str | bytes | os.PathLike, folder: object) -> str:
        start = f"/proc/self/fd/{folder}" if isinstance(folder, int) and folder >= 0 else os.curdir
        return os.path.abspath(os.path.join(os.path.realpath(start), os.fsdecode(path)))

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.watching:
            return
        path = arguments[0] if arguments else None
        if event == "open":
            flags = arguments[2]
            if isinstance(path, int):  # a descriptor that was opened before
                return
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return
        elif not event.startswith(WAYS_OUT):
            return
        if isinstance(path, str | bytes | os.PathLike):
            folder = self._folder if event == "open" else arguments[2 if event == "os.rename" else -1]
            places = [self._absolute(path, folder)]
            if event == "os.rename" and isinstance(arguments[1], str | bytes):
                places.append(self._absolute(arguments[1], arguments[3]))
            inside = all(f"{place}{os.sep}".startswith(self.allowed + os.sep) for place in places)
            starts = event.startswith(("subprocess.", "os.system", "os.exec", "os.spawn", "os.posix", "pty."))
            if inside and not starts:
                return
        self.seen.append(f"{event}{arguments!r}"[:300])


@cache
def the_guard() -> Guard:
    return Guard()


@pytest.fixture
def guard(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    guard = the_guard()
    guard.allowed, guard.seen = str(own_folder / "out"), []
    monkeypatch.setattr(os, "open", guard.open)
    yield guard
    guard.watching = False
    assert not guard.seen, guard.seen[:5]


@cache
def originals() -> dict[str, bytes]:
    """A small picture in every format and mode that Pillow writes, and the beginnings of all others."""
    made = dict(BEGINNINGS)
    Image.init()
    plain = Image.linear_gradient("L").resize((24, 16))
    for format in Image.SAVE:
        for mode in MODES:
            picture = (
                plain.convert("I").convert("I;16")
                if mode == "I;16"
                else plain.convert("RGB").convert(mode)
                if mode not in ("I", "F")
                else plain.convert(mode)
            )
            for options in (
                {},
                {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"},
                {"save_all": True},
                {"compression": "tiff_lzw"},
            ):
                buffer = io.BytesIO()
                with suppress(Exception):  # most pairs can't be written
                    picture.save(buffer, format, **options)
                    made.setdefault(f"{format} {mode} {'+'.join(options)}".strip(), buffer.getvalue())
    with suppress(ImportError):
        import pillow_heif

        buffer = io.BytesIO()
        pillow_heif.from_pillow(plain.convert("RGB").resize((64, 64))).save(buffer, quality=90)
        made["HEIF RGB"] = buffer.getvalue()
    return made


def spoil(content: bytes, draw: random.Random) -> bytes:
    """Cut off, overwritten, flipped, repeated, filled with extremes; or left as it is."""
    data = bytearray(content)
    for _ in range(draw.choice((0, 1, 1, 2, 4))):
        # Headers decide most: half of the damage is done there.
        start = draw.randrange(max(1, min(len(data), draw.choice((32, 128, len(data))))))
        length = draw.randint(0, 16)
        kind = draw.choice(("cut", "zeros", "ones", "random", "flip", "repeat", "swap", "end"))
        if kind == "cut":
            del data[start : start + length]
        elif kind == "end":
            del data[start:]
        elif kind == "repeat":
            data[start:start] = data[start : start + length] * draw.randint(1, 200)
        elif kind == "swap":
            data[start : start + length] = data[start : start + length][::-1]
        elif kind == "flip" and data:
            data[start] ^= 1 << draw.randrange(8)
        elif kind in ("zeros", "ones", "random"):
            filling = {"zeros": bytes(length), "ones": b"\xff" * length, "random": draw.randbytes(length)}[kind]
            data[start : start + length] = filling
    return bytes(data)


def endings() -> list[str]:
    Image.init()
    return sorted({*Image.registered_extensions(), *image_extensions(), ".txt", ""})


def a_file(draw: random.Random, folder: Path) -> tuple[str, str]:
    """A damaged file under any name, and what it was made of."""
    kind = draw.choice(sorted(originals()))
    path = folder / f"image{draw.choice(endings())}"
    path.write_bytes(spoil(originals()[kind], draw))
    return str(path), kind


def read(path: str) -> int:
    """How many of the ways to read an image succeed."""
    readers: tuple[Callable[[str], object], ...] = (
        read_size,
        ImageDecoder(8, 8, 1),
        ImageDecoder(8, 8, 3, "short_side"),
        MaskDecoder(8, 8, "stretch", tuple(range(256)), 255),
    )
    read = 0
    for reader in readers:
        with suppress(BadFile):
            found = reader(path)
            if isinstance(reader, ImageDecoder):
                pixels, matrix = found  # pyright: ignore[reportGeneralTypeIssues]
                assert pixels.shape == reader.shape and bool(torch.isfinite(matrix).all())
            read += 1
    return read


def fuzz_reading(guard: Guard, folder: Path, count: int, seed: int) -> dict[str, int]:
    (folder / "in").mkdir()
    draw, outcomes = random.Random(seed), {"read": 0, "refused": 0}
    originals(), endings()
    read(a_file(draw, folder / "in")[0])  # modules are imported
    guard.watching = True
    for _ in range(count):
        guard.watching = False
        path, kind = a_file(draw, folder / "in")
        guard.watching = True
        try:
            outcomes["read" if read(path) else "refused"] += 1
        except Exception as error:
            raise AssertionError(f"{kind} as {Path(path).name}: {error!r}") from error
        assert not guard.seen, (kind, guard.seen)
        guard.watching = False
        os.remove(path)
    return outcomes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that was trained for one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    for label in ("a", "b"):
        (folder / "data/train" / label).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (10, 10), (20 * number, 9, 200 * (label == "a"))).save(
                folder / f"data/train/{label}/{number}.png"
            )
    code = main(
        [
            "data=image_folder",
            f"data.root={folder / 'data'}",
            "data.size=8",
            "model=mlp",
            "epochs=1",
            "model.values.width=4",
            "threads=1",
            "device=cpu",
            "augment=none",
            "log.figures=false",
            "log.tensorboard=false",
            f"run_dir={folder / 'run'}",
        ]
    )
    assert code == 0
    return folder / "run"


def fuzz_predict(guard: Guard, folder: Path, run: Path, count: int, seed: int, draw_first: int = -1) -> dict[int, int]:
    """By exit code how often; every other time the file lies in a folder, among sound ones."""
    draw, codes = random.Random(seed), {}
    for number in range(-1, count):
        guard.watching = False
        given = folder / "in" / str(number)
        given.mkdir(parents=True)
        path, kind = a_file(draw, given)
        if number % 2:
            Image.new("RGB", (9, 7)).save(given / "sound.png")
        guard.allowed = str(folder / "out" / str(number))
        os.makedirs(folder / "out", exist_ok=True)
        guard.watching = number >= 0  # modules are imported, fonts found
        code = main(
            [
                "predict",
                f"checkpoint={run}",
                f"images={given if number % 2 else path}",
                "threads=1",
                "device=cpu",
                f"draw={1 if number < draw_first else 0}",
                f"run_dir={guard.allowed}",
            ]
        )
        guard.watching = False
        assert code in (0, 2), (kind, path, code)
        assert not guard.seen, (kind, guard.seen)
        codes[code] = codes.get(code, 0) + 1
    return codes


@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_damaged_images_is_read_or_rejected(guard: Guard, own_folder: Path) -> None:
    outcomes = fuzz_reading(guard, own_folder, 300, seed=0)
    assert min(outcomes.values()) > 40, outcomes


@pytest.mark.filterwarnings("ignore")
def test_predict_on_a_sample_of_damaged_images(guard: Guard, own_folder: Path, run: Path) -> None:
    codes = fuzz_predict(guard, own_folder, run, 4, seed=1)
    assert sum(codes.values()) == 4 + 1


def test_the_guard_detects_forbidden_calls(guard: Guard, own_folder: Path) -> None:
    import subprocess

    guard.watching = True
    with suppress(OSError):
        subprocess.Popen(["no such program"])
    (own_folder / "beside.txt").write_text("outside")
    heard, guard.seen = guard.seen, []
    os.makedirs(own_folder / "out")
    (own_folder / "out" / "inside.txt").write_text("inside")
    (own_folder / "beside.txt").read_text()
    inner, outer = os.open(own_folder / "out", os.O_RDONLY), os.open(own_folder, os.O_RDONLY)
    os.close(os.open("inside.txt", os.O_WRONLY, dir_fd=inner))
    os.rename("inside.txt", "moved.txt", src_dir_fd=inner, dst_dir_fd=inner)
    assert not guard.seen
    os.rename("moved.txt", "moved.txt", src_dir_fd=inner, dst_dir_fd=outer)
    os.close(os.open("moved.txt", os.O_WRONLY, dir_fd=outer))
    assert [each.partition("(")[0] for each in guard.seen] == ["os.rename", "open"]
    guard.seen = []
    guard.watching = False
    assert any(each.startswith("subprocess.Popen") for each in heard) and any("beside" in each for each in heard)


@pytest.mark.long
def test_many_damaged_images(guard: Guard, own_folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(fuzz_reading(guard, own_folder, EXAMPLES, seed=random.randrange(2**32)))


@pytest.mark.long
def test_predict_on_many_damaged_images(guard: Guard, own_folder: Path, run: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(fuzz_predict(guard, own_folder, run, EXAMPLES // 50, random.randrange(2**32), 20))
