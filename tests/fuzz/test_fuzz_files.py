"""Annotations, images and checkpoints with arbitrary content are read or rejected."""

import copy
import io
import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cnntrain.cli import main
from cnntrain.config.compose import compose, read_settings
from cnntrain.config.schema import DataSettings, EvaluateSettings, Settings, parse
from cnntrain.data.decoder import ImageDecoder
from cnntrain.data.files import BadFile
from cnntrain.data.image_reader import read_size
from cnntrain.data.load import load_data
from cnntrain.train.checkpoint import load_validated
from cnntrain.train.restore import restore
from cnntrain.train.setup import build_source

pytestmark = pytest.mark.long
# `FUZZ_EXAMPLES=20000 python -m pytest -m long tests/fuzz` takes an hour.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "500"))
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
QUICK = """
    model=mlp model.values.width=4 threads=1 data.limit=40 log.figures=false device=cpu log.tensorboard=false
""".split()
JUNK = [
    b"",
    b" ",
    b"\n",
    b"\xef\xbb\xbf",
    *b"""\0 -1 1e999 nan 999999999999 " , < & { ] null \xff ' ../ /dev/zero \xe2\x80\xae
true ; [[[[""".split(),
]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Overwrite, remove or repeat a few parts of `content`, or fill them with junk."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(0, min(20, len(data) - start)))
        kind = draw(st.sampled_from(["junk", "bytes", "repeat", "cut", "flip"]))
        if kind == "cut":
            del data[start : start + draw(st.integers(0, len(data) - start))]
        elif kind == "repeat":
            data[start:start] = data[start : start + length] * draw(st.integers(1, 50))
        elif kind == "flip" and data:
            data[start] ^= 1 << draw(st.integers(0, 7))
        else:
            data[start : start + length] = draw(st.sampled_from(JUNK) if kind == "junk" else st.binary(max_size=20))
    return bytes(data)


CSV = b"path,label,split,group\na.png,cat,train,1\nb.png,dog,train,2\na.png,cat,val,3\n"
POINTS = b"image_name,left_eye_x,left_eye_y,right_eye_x,right_eye_y,split\na.png,1,2,5.5,2,train\nb.png,,,6,3,train\n"
BOX = b"<box top='1' left='1' width='6' height='6'><part name='0' x='2' y='3'/><part name='1' x='5' y='3'/></box>"
XML = (
    b"<?xml version='1.0'?><dataset><images>"
    + b"".join(b"<image file='%s.png'>%s</image>" % (name, BOX) for name in (b"a", b"b"))
    + b"</images></dataset>"
)
COCO = json.dumps(
    {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "category_id": 1,
                "keypoints": [1, 2, 2, 5, 2, 1],
                "bbox": [0, 0, 7, 7],
                "iscrowd": 0,
            }
            for i in (1, 2)
        ],
        "categories": [{"id": 1, "keypoints": ["left_eye", "right_eye"], "skeleton": [[1, 2]]}],
    }
).encode()
CAT = b"9 1 1 2 2 3 3 4 4 5 5 6 6 7 7 1 7 7 1 "
SOURCES = {
    "image_csv": (CSV, "t.csv", ["data.file=t.csv"]),
    "keypoint_csv": (POINTS, "t.csv", ["data.file=t.csv", "data.crop=none"]),
    "dlib_xml": (
        XML,
        "t.xml",
        ["data.root=.", "data.train=t.xml", "data.test=null", "data.keypoint_set=null", "data.flip_pairs={}"],
    ),
    "coco_keypoints": (
        COCO,
        "t.json",
        ["data.root=.", "data.train=t.json", "data.val=null", "data.train_images=."],
    ),
    "cat_folder": (CAT, "a.png.cat", ["data.root=."]),
}


@cache
def settings_of(kind: str) -> Settings:
    return read_settings([f"data={kind}", "data.size=8", *SOURCES[kind][2]])


def load(kind: str) -> None:
    source = build_source(settings_of(kind))
    source.spec()
    load_data(source, DataSettings(val_fraction=0.5))


@pytest.mark.parametrize("kind", SOURCES)
@FUZZ
@given(data=st.data())
def test_damaged_annotations_are_read_or_rejected(kind: str, data: st.DataObject, exit_code: Any) -> None:
    content, name, _ = SOURCES[kind]
    for image in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), (90, 120, 30)).save(image)
    Path(name).write_bytes(data.draw(damaged(content)))
    assert exit_code(load, kind) in (0, 2)


def test_the_undamaged_annotations_are_read() -> None:
    for kind, (content, name, _) in SOURCES.items():
        for image in ("a.png", "b.png"):
            Image.new("RGB", (8, 8), (90, 120, 30)).save(image)
        Path(name).write_bytes(content)
        if kind not in ("image_csv", "cat_folder"):  # one lists an image twice, one has no points for an image
            load(kind)


KINDS = """RGB-PNG P-PNG I;16-PNG RGBA-PNG 1-PNG RGB-JPEG CMYK-JPEG P-GIF RGB-BMP RGB-TIFF F-TIFF RGBA-WEBP RGB-PPM
RGBA-ICO RGB-TGA RGB-PCX"""


def image_bytes(kind: str) -> bytes:
    """Return a small image; formats with EXIF get an empty EXIF block."""
    mode, format = kind.split("-")
    gradient = Image.linear_gradient("L").resize((16, 12)).convert("I" if mode == "I;16" else mode)
    options = {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"} if format in ("JPEG", "WEBP") else {}
    buffer = io.BytesIO()
    gradient.convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


IMAGES = {kind: image_bytes(kind) for kind in KINDS.split()}


@FUZZ
@given(data=st.data())
def test_damaged_images_are_read_or_rejected(data: st.DataObject) -> None:
    Path("image").write_bytes(data.draw(damaged(IMAGES[data.draw(st.sampled_from(sorted(IMAGES)))])))
    for channels in (1, 3):
        with suppress(BadFile):
            assert min(read_size("image")) > 0
            pixels, matrix = ImageDecoder(8, 8, channels)("image")
            assert pixels.shape == (channels, 8, 8) and matrix.isfinite().all()


@pytest.fixture(scope="module")
def checkpoint_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    run = tmp_path_factory.mktemp("run")
    assert main([*QUICK, "epochs=1", f"run_dir={run}"]) == 0
    return (run / "checkpoints" / "last.pt").read_bytes()


@FUZZ
@given(data=st.data())
def test_damaged_checkpoints_are_read_or_rejected(data: st.DataObject, checkpoint_bytes: bytes, exit_code: Any) -> None:
    Path("last.pt").write_bytes(data.draw(damaged(checkpoint_bytes)))
    assert exit_code(load_validated, Path("last.pt")) in (0, 2)


@cache
def evaluate_settings() -> EvaluateSettings:
    composed = compose("evaluate", ["checkpoint=last.pt", "threads=1", "device=cpu"])
    return parse(EvaluateSettings, {key: value for key, value in composed.items() if key != "choices"})


def paths_of(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in nested dictionaries and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(inner for key, value in items for inner in paths_of(value, (*path, key)))][not path :]


@FUZZ
@given(data=st.data())
def test_checkpoints_with_an_arbitrary_value_are_read_or_rejected(
    data: st.DataObject, checkpoint_bytes: bytes, exit_code: Any
) -> None:
    """Replace one value of a valid checkpoint."""
    saved = torch.load(io.BytesIO(checkpoint_bytes), weights_only=True)
    path = data.draw(st.sampled_from(paths_of({k: v for k, v in saved.items() if k not in ("versions", "format")})))
    parent = saved
    for key in path[:-1]:
        parent = parent[key]
    junk = [
        None,
        "",
        "x",
        -1,
        2**70,
        0.5,
        float("nan"),
        [],
        {},
        [None],
        {"a": 1},
        True,
        torch.zeros(2),
        torch.zeros(0),
        (1, 2),
    ]
    parent[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(junk)))
    torch.save(saved, "last.pt")

    def evaluate() -> None:
        restore(load_validated(Path("last.pt")), evaluate_settings())

    assert exit_code(evaluate) in (0, 2, 4)
    assert main([*QUICK, "epochs=2", "run_dir=again", "resume=last.pt"]) in (0, 2, 3, 4)
