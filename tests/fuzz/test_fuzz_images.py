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
# First bytes of formats that Pillow opens but cannot write.
HEADERS = {
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
SIDE_EFFECTS = (
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


class SideEffectGuard:
    """Records every program that is started, and every file outside `allowed` that is written or removed.

    It is an audit hook (PEP 578), which sees all calls in Python. A hook cannot be removed, so it has a switch.

    Attributes:
        enabled: whether events are recorded.
        allowed: folder in which files may be written.
        events: recorded events.
    """

    def __init__(self) -> None:
        self.enabled = False
        self.allowed = ""
        self.events: list[str] = []
        self._dir_fd: int | None = None  # of the current `os.open`; its audit event does not contain it
        self._open = os.open
        sys.addaudithook(self._record)

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        """Replacement for `os.open` that remembers `dir_fd` for the audit event."""
        self._dir_fd = dir_fd
        try:
            return self._open(path, flags, mode, dir_fd=dir_fd)
        finally:
            self._dir_fd = None

    def _absolute(self, path: str | bytes | os.PathLike, dir_fd: object) -> str:
        start = f"/proc/self/fd/{dir_fd}" if isinstance(dir_fd, int) and dir_fd >= 0 else os.curdir
        return os.path.abspath(os.path.join(os.path.realpath(start), os.fsdecode(path)))

    def _record(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.enabled:
            return
        path = arguments[0] if arguments else None
        if event == "open":
            flags = arguments[2]
            if isinstance(path, int):  # a descriptor that is already open
                return
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return
        elif not event.startswith(SIDE_EFFECTS):
            return
        if isinstance(path, str | bytes | os.PathLike):
            dir_fd = self._dir_fd if event == "open" else arguments[2 if event == "os.rename" else -1]
            paths = [self._absolute(path, dir_fd)]
            if event == "os.rename" and isinstance(arguments[1], str | bytes):
                paths.append(self._absolute(arguments[1], arguments[3]))
            inside = all(f"{path}{os.sep}".startswith(self.allowed + os.sep) for path in paths)
            starts_program = event.startswith(("subprocess.", "os.system", "os.exec", "os.spawn", "os.posix", "pty."))
            if inside and not starts_program:
                return
        self.events.append(f"{event}{arguments!r}"[:300])


@cache
def installed_guard() -> SideEffectGuard:
    return SideEffectGuard()


@pytest.fixture
def guard(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SideEffectGuard]:
    guard = installed_guard()
    guard.allowed, guard.events = str(own_folder / "out"), []
    monkeypatch.setattr(os, "open", guard.open)
    yield guard
    guard.enabled = False
    assert not guard.events, guard.events[:5]


@cache
def originals() -> dict[str, bytes]:
    """Return a small image in every format and mode that Pillow writes, and headers of the other formats."""
    contents = dict(HEADERS)
    Image.init()
    gradient = Image.linear_gradient("L").resize((24, 16))
    for format in Image.SAVE:
        for mode in MODES:
            image = (
                gradient.convert("I").convert("I;16")
                if mode == "I;16"
                else gradient.convert("RGB").convert(mode)
                if mode not in ("I", "F")
                else gradient.convert(mode)
            )
            for options in (
                {},
                {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"},
                {"save_all": True},
                {"compression": "tiff_lzw"},
            ):
                buffer = io.BytesIO()
                with suppress(Exception):  # most combinations cannot be written
                    image.save(buffer, format, **options)
                    contents.setdefault(f"{format} {mode} {'+'.join(options)}".strip(), buffer.getvalue())
    with suppress(ImportError):
        import pillow_heif

        buffer = io.BytesIO()
        pillow_heif.from_pillow(gradient.convert("RGB").resize((64, 64))).save(buffer, quality=90)
        contents["HEIF RGB"] = buffer.getvalue()
    return contents


def damage(content: bytes, draw: random.Random) -> bytes:
    """Truncate, overwrite, flip or repeat a few parts of `content`; sometimes return it unchanged."""
    data = bytearray(content)
    for _ in range(draw.choice((0, 1, 1, 2, 4))):
        # The header matters most, so most of the damage is near the start.
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


def extensions() -> list[str]:
    Image.init()
    return sorted({*Image.registered_extensions(), *image_extensions(), ".txt", ""})


def write_damaged_file(draw: random.Random, folder: Path) -> tuple[str, str]:
    """Write a damaged file with a random extension; return its path and the kind of image."""
    kind = draw.choice(sorted(originals()))
    path = folder / f"image{draw.choice(extensions())}"
    path.write_bytes(damage(originals()[kind], draw))
    return str(path), kind


def count_readers(path: str) -> int:
    """Return how many of the readers accept an image."""
    readers: tuple[Callable[[str], object], ...] = (
        read_size,
        ImageDecoder(8, 8, 1),
        ImageDecoder(8, 8, 3, "short_side"),
        MaskDecoder(8, 8, "stretch", tuple(range(256)), 255),
    )
    count = 0
    for reader in readers:
        with suppress(BadFile):
            result = reader(path)
            if isinstance(reader, ImageDecoder):
                pixels, matrix = result  # pyright: ignore[reportGeneralTypeIssues]
                assert pixels.shape == reader.shape and bool(torch.isfinite(matrix).all())
            count += 1
    return count


def fuzz_reading(guard: SideEffectGuard, folder: Path, count: int, seed: int) -> dict[str, int]:
    (folder / "in").mkdir()
    draw, outcomes = random.Random(seed), {"read": 0, "refused": 0}
    originals(), extensions()
    count_readers(write_damaged_file(draw, folder / "in")[0])  # imports modules
    guard.enabled = True
    for _ in range(count):
        guard.enabled = False
        path, kind = write_damaged_file(draw, folder / "in")
        guard.enabled = True
        try:
            outcomes["read" if count_readers(path) else "refused"] += 1
        except Exception as error:
            raise AssertionError(f"{kind} as {Path(path).name}: {error!r}") from error
        assert not guard.events, (kind, guard.events)
        guard.enabled = False
        os.remove(path)
    return outcomes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a network for one epoch."""
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


def fuzz_predict(
    guard: SideEffectGuard, folder: Path, run: Path, count: int, seed: int, draw_first: int = -1
) -> dict[int, int]:
    """Count the exit codes of `predict` on damaged files, alone or in a folder with a valid image."""
    draw, codes = random.Random(seed), {}
    for number in range(-1, count):
        guard.enabled = False
        inputs = folder / "in" / str(number)
        inputs.mkdir(parents=True)
        path, kind = write_damaged_file(draw, inputs)
        if number % 2:
            Image.new("RGB", (9, 7)).save(inputs / "valid.png")
        guard.allowed = str(folder / "out" / str(number))
        os.makedirs(folder / "out", exist_ok=True)
        guard.enabled = number >= 0  # the first call imports modules and searches fonts
        code = main(
            [
                "predict",
                f"checkpoint={run}",
                f"images={inputs if number % 2 else path}",
                "threads=1",
                "device=cpu",
                f"draw={1 if number < draw_first else 0}",
                f"run_dir={guard.allowed}",
            ]
        )
        guard.enabled = False
        assert code in (0, 2), (kind, path, code)
        assert not guard.events, (kind, guard.events)
        codes[code] = codes.get(code, 0) + 1
    return codes


@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_damaged_images_is_read_or_rejected(guard: SideEffectGuard, own_folder: Path) -> None:
    outcomes = fuzz_reading(guard, own_folder, 300, seed=0)
    assert min(outcomes.values()) > 40, outcomes


@pytest.mark.filterwarnings("ignore")
def test_predict_on_a_sample_of_damaged_images(guard: SideEffectGuard, own_folder: Path, run: Path) -> None:
    codes = fuzz_predict(guard, own_folder, run, 4, seed=1)
    assert sum(codes.values()) == 4 + 1


def test_the_guard_detects_forbidden_calls(guard: SideEffectGuard, own_folder: Path) -> None:
    import subprocess

    guard.enabled = True
    with suppress(OSError):
        subprocess.Popen(["no such program"])
    (own_folder / "beside.txt").write_text("outside")
    recorded, guard.events = guard.events, []
    os.makedirs(own_folder / "out")
    (own_folder / "out" / "inside.txt").write_text("inside")
    (own_folder / "beside.txt").read_text()
    inner, outer = os.open(own_folder / "out", os.O_RDONLY), os.open(own_folder, os.O_RDONLY)
    os.close(os.open("inside.txt", os.O_WRONLY, dir_fd=inner))
    os.rename("inside.txt", "moved.txt", src_dir_fd=inner, dst_dir_fd=inner)
    assert not guard.events
    os.rename("moved.txt", "moved.txt", src_dir_fd=inner, dst_dir_fd=outer)
    os.close(os.open("moved.txt", os.O_WRONLY, dir_fd=outer))
    assert [each.partition("(")[0] for each in guard.events] == ["os.rename", "open"]
    guard.events = []
    guard.enabled = False
    assert any(each.startswith("subprocess.Popen") for each in recorded) and any("beside" in each for each in recorded)


@pytest.mark.long
def test_many_damaged_images(guard: SideEffectGuard, own_folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(fuzz_reading(guard, own_folder, EXAMPLES, seed=random.randrange(2**32)))


@pytest.mark.long
def test_predict_on_many_damaged_images(guard: SideEffectGuard, own_folder: Path, run: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(fuzz_predict(guard, own_folder, run, EXAMPLES // 50, random.randrange(2**32), 20))
