"""Data are checked before the first step; all errors are reported together, with file names."""

import json
import os
import struct
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow


def huge_png(path: Path, side: int = 20_000) -> None:
    """Write a small PNG whose header claims side x side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def photograph(path: Path) -> None:
    """An image of some kilobytes."""
    Image.effect_noise((48, 48), 50).convert("RGB").save(path)


def arguments(root: Path) -> list[str]:
    return (
        f"model=mlp threads=1 data=image_folder data.root={root} data.size=8 epochs=1 "
        "log.figures=false log.tensorboard=false"
    ).split()


def test_all_errors_are_reported_together(cnntrain, make_images) -> None:
    root = make_images(splits=("train", "val"))
    dark = root / "train" / "dark"
    (dark / "text.png").write_text("no image")
    (dark / "empty.jpg").touch()
    photograph(dark / "half.png")
    (dark / "half.png").write_bytes((dark / "half.png").read_bytes()[:200])
    huge_png(dark / "huge.png")
    os.mkfifo(dark / "pipe.png")
    os.symlink("..", dark / "loop")
    os.symlink("nowhere", dark / "dangling.png")
    (root / "val" / "gray").mkdir()
    photograph(root / "val" / "gray" / "one.png")
    said = cnntrain.refused(*arguments(root))
    assert "gray: is not a class of train" in said
    for name, reason in {
        "pipe.png": "not a regular file",
        "loop": "a link to one of its parent folders",
        "dangling.png": "a broken link",
    }.items():
        assert f"{name}: is {reason}" in said, said
    os.remove(dark / "pipe.png")
    os.remove(dark / "loop")
    os.remove(dark / "dangling.png")
    (root / "val" / "gray" / "one.png").unlink()
    (root / "val" / "gray").rmdir()
    started = time.monotonic()
    said = cnntrain.refused(*arguments(root))
    for name, reason in {
        "text.png": "not an image",
        "empty.jpg": "empty",
        "half.png": "truncated",
        "huge.png": "",
    }.items():
        assert f"{name}: {'is ' * bool(reason)}{reason}" in said, said
    assert "100 million" in said and "4 of 28 files" in said and time.monotonic() - started < 60


def test_an_empty_class_is_rejected(cnntrain, make_images) -> None:
    root = make_images()
    (root / "train" / "nothing").mkdir()
    assert "nothing: is a class without images" in cnntrain.refused(*arguments(root))


def test_hidden_files_are_ignored_and_labels_have_the_indices_of_train(cnntrain, make_images) -> None:
    """Validation lacks the first class; its images of the second must still be of class 1."""
    root = make_images(splits=("train", "val"))
    for path in (root / "val" / "dark").iterdir():
        path.unlink()
    (root / "val" / "dark").rmdir()
    for name in (".hidden.png", "Thumbs.db"):
        (root / "train" / "dark" / name).write_text("no image")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "dark" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "dark" / ".ipynb_checkpoints" / "0.png").write_text("no image")
    cnntrain(*arguments(root), "epochs=60", "schedule=constant", "optimizer.lr=0.01", "run_dir=run")
    assert json.loads(Path("run/results.json").read_text())["best"]["val/top1"] == 1


def test_the_extent_of_each_scan_mode(cnntrain, make_images) -> None:
    """A scan of headers does not detect a truncated file; it is reported when the image is read."""
    root = make_images(count=12)
    photograph(root / "train" / "dark" / "half.png")
    whole = (root / "train" / "dark" / "half.png").read_bytes()
    (root / "train" / "dark" / "half.png").write_bytes(whole[:200])
    streaming = (*arguments(root), "data.cache=none", "data.workers=0")
    assert "half.png: is truncated" in cnntrain.refused(*streaming, "data.scan=full")
    (root / "train" / "dark" / "text.png").write_text("no image")
    assert "text.png" in (said := cnntrain.refused(*streaming)) and "half.png" not in said
    (root / "train" / "dark" / "text.png").unlink()
    assert "half.png: is truncated" in cnntrain(*streaming, "data.scan=off", code=2).stderr


def test_a_scan_records_good_files(cnntrain, make_images) -> None:
    root = make_images(count=12)
    streaming = (*arguments(root), "data.cache=none", "data.workers=0", "data.scan=full")
    cnntrain(*streaming, "run_dir=a")
    (memory,) = Path("cache/cnntrain/scans").glob("*-full.json")
    known = json.loads(memory.read_text())
    assert len(known) == 24 and all(Path(path).stat().st_mtime_ns == stamp[1] for path, stamp in known.items())
    spoilt = root / "train" / "dark" / "3.png"
    content = spoilt.read_bytes()
    spoilt.write_bytes(content[:50] + b"?" * (len(content) - 50))
    assert "3.png" in cnntrain.refused(*streaming)


def test_modes_and_orientations_are_converted(cnntrain, make_images) -> None:
    """The same picture in modes 1, L, LA, P, RGBA, CMYK, with 16 bits and with an EXIF orientation."""
    root = make_images()
    cnntrain(*arguments(root), "data.channels=1", "run_dir=run")
    plain = Image.new("L", (32, 24), 255)
    plain.paste(0, (0, 0, 20, 10))
    Path("asked").mkdir()
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
        plain.convert(mode).save(f"asked/{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    plain.convert("I").point(lambda value: value * 257).convert("I;16").save("asked/sixteen.png")
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    turned.save("asked/turned.png", exif=exif)
    cnntrain("predict", "checkpoint=run", "images=asked", "threads=1", "draw=0", "run_dir=said")
    rows = json.loads(Path("said/predictions.json").read_text())["images"]
    chances = {row["image_name"]: row["probabilities"]["dark"] for row in rows}
    assert len(chances) == 9 and max(chances.values()) - min(chances.values()) < 1e-3, chances


OWN = """
import torch
from cnntrain.data.examples import Examples
from cnntrain.data.examples import Source
from cnntrain.types import DataSpec

class Wrong(Source):
    def spec(self):
        return DataSpec(channels=1, height=8, width=8, classes=("no", "yes"))

    def load(self):
        labels = torch.arange(40) % 3
        images = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
        return {"train": Examples(images, {"label": labels}, [f"row {i}" for i in range(40)])}
"""


def test_labels_out_of_range_are_rejected(cnntrain) -> None:
    Path("mine/data").mkdir(parents=True)
    Path("mine/wrong.py").write_text(OWN)
    Path("mine/data/wrong.yaml").write_text("_target_: wrong.Wrong\n")
    said = cnntrain.refused("--config-dir", "mine", "data=wrong", "model=mlp", "threads=1")
    assert "13 of 40 train labels are out of range, 0 to 1: 2 (row 2)" in said


def test_masks_out_of_range_are_rejected(cnntrain) -> None:
    for folder in ("images", "masks"):
        Path("root/train", folder).mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (16, 16), (90, 90, 90)).save(f"root/train/images/{number}.png")
        Image.new("L", (16, 16), number).save(f"root/train/masks/{number}.png")
    said = cnntrain.refused(
        "data=mask_folder", "data.root=root", "data.classes=[a,b]", "data.size=16", "model=unet_small"
    )
    assert "masks/2.png: has values that are not class ids: 2" in said and "masks/3.png" in said


def test_an_endless_annotation_file_is_rejected(cnntrain) -> None:
    Path("root").mkdir()
    os.mkfifo("root/points.xml")
    os.symlink("/dev/zero", "root/points.json")
    for arguments in (("data=dlib_xml", "data.train=points.xml"), ("data=coco_keypoints", "data.train=points.json")):
        assert "not a regular file" in cnntrain.refused(*arguments, "data.root=root", "model=keypoint_cnn", "threads=1")
