"""Tar shards: the same examples as a folder, and errors."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

from cnntrain import compose, train
from cnntrain.config.schema import DataSettings
from cnntrain.data.files import byte_range, member_path
from cnntrain.data.load import load_data
from cnntrain.data.sources.image_folder import ImageFolder
from cnntrain.data.sources.webdataset import TarShards
from cnntrain.errors import UserError


def pack(shard: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(shard, "w") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))


def png(gray: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (6, 5), gray).save(buffer, "PNG")
    return buffer.getvalue()


def pack_folder(folder: Path, target: Path, split: str, label_of: Callable[[str], Mapping[str, bytes]]) -> None:
    """The images of an image folder in two shards, each before its label."""
    files = sorted((folder / split).rglob("*.png"))
    for number in range(2):
        members: dict[str, bytes] = {}
        for file in files[number::2]:
            key = f"{file.parent.name}/{file.stem}"
            members[f"{key}.png"] = file.read_bytes()
            members |= {f"{key}.{ending}": text for ending, text in label_of(file.parent.name).items()}
        pack(target / f"{split}-{number:03}.tar", members)


WRITTEN: dict[str, Callable[[str], Mapping[str, bytes]]] = {
    "names": lambda name: {"cls": name.encode() + b"\n"},
    "json": lambda name: {"json": json.dumps({"label": name, "more": [1]}).encode()},
    "numbers": lambda name: {"cls": str(["cat", "dog"].index(name)).encode()},
    "numbers in json": lambda name: {"json": json.dumps({"cls": ["cat", "dog"].index(name)}).encode()},
}


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
def test_shards_and_folder_have_the_same_examples(make_folder, tmp_path, monkeypatch, how, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, shards = make_folder("train", "test"), tmp_path / "shards"
    shards.mkdir()
    for split in ("train", "test"):
        pack_folder(folder, shards, split, WRITTEN[how])
    classes = ["cat", "dog"] if "numbers" in how else None
    ours = load_data(TarShards(str(shards), classes, size=16), DataSettings(cache=cache))
    theirs = load_data(ImageFolder(str(folder), size=16), DataSettings(cache="ram"))
    assert ours.spec.classes == theirs.spec.classes == ("cat", "dog")

    def examples(data):
        found = {}
        for split in (data.train, data.val, data.test):
            for row, name in enumerate(split.names):
                key = "/".join(name.removesuffix(".png").split("/")[-2:]), split is data.test
                found[key] = split.images[row], int(split.targets["label"][row])
        return found

    mine, expected = examples(ours), examples(theirs)
    assert mine.keys() == expected.keys()
    for name, (image, label) in expected.items():
        assert torch.equal(mine[name][0], image) and mine[name][1] == label, name


def test_indices_without_names_are_the_classes(tmp_path):
    pack(
        tmp_path / "train.tar",
        {"a.png": png(1), "a.cls": b"0", "b.png": png(2), "b.cls": b"3", ".hidden": b""},
    )
    assert TarShards(str(tmp_path)).spec().classes == ("0", "1", "2", "3")


def test_cls_files_take_precedence_over_json(tmp_path):
    more = json.dumps({"width": 5, "label": "bird"}).encode()
    members = {
        "x.json": more,
        "x.png": png(1),
        "x.cls": b"cat",
        "y.png": png(2),
        "y.cls": b"dog",
        "y.json": b"{}",
    }
    pack(tmp_path / "train.tar", members)
    assert TarShards(str(tmp_path)).spec().classes == ("cat", "dog")


def test_long_numbers_are_class_names(tmp_path):
    pack(tmp_path / "train.tar", {"x.png": png(1), "x.cls": b"1440764", "y.png": png(2), "y.cls": b"1443537"})
    source = TarShards(str(tmp_path))
    assert source.spec().classes == ("1440764", "1443537")
    assert source.load()["train"].targets["label"].tolist() == [0, 1]


def test_a_folder_may_end_in_tar(tmp_path):
    root = tmp_path / "all.tar"
    root.mkdir()
    pack(
        root / "train.tar",
        {"a/x.png": png(1), "a/x.cls": b"cat", ".b/z.png": png(3), "y.png": png(2), "y.cls": b"dog"},
    )
    data = load_data(TarShards(str(root)), DataSettings(val_fraction=0.5, cache="ram"))
    assert {*data.train.names, *data.val.names} == {"train.tar/a/x", "train.tar/y"}


FAULTS: dict[str, tuple[Mapping[str, bytes], str]] = {
    "no label": ({"a.png": png(1)}, "has no .cls and no .json"),
    "no image": ({"a.cls": b"1"}, "has a label but no image"),
    "two images": ({"a.png": png(1), "a.jpg": png(1), "a.cls": b"1"}, "is a second image of a"),
    "empty label": ({"a.png": png(1), "a.cls": b" \n"}, "contains no label"),
    "no text": ({"a.png": png(1), "a.cls": b"\xff\xfe"}, "contains no label"),
    "no json": ({"a.png": png(1), "a.json": b"{"}, "contains no label"),
    "a list": ({"a.png": png(1), "a.json": b"[1]"}, "contains no label"),
    "nested": ({"a.png": png(1), "a.json": b"[" * 50_000}, "contains no label"),
    "a book": ({"a.png": png(1), "a.cls": b"1" * 70_000}, "is too long for a label"),
    "nothing": ({}, "has no images"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_errors_name_shard_and_member(tmp_path, what):
    pack(tmp_path / "train-0.tar", {"x.png": png(1), "x.cls": b"cat", "y.png": png(2), "y.cls": b"dog"})
    pack(tmp_path / "train-1.tar", FAULTS[what][0])
    with pytest.raises(UserError) as caught:
        TarShards(str(tmp_path)).spec()
    assert FAULTS[what][1] in str(caught.value) and "train-1.tar" in str(caught.value)


def test_damaged_archives_are_rejected(tmp_path):
    whole = {"x.png": png(1), "x.cls": b"cat", "y.png": png(2), "y.cls": b"dog"}
    pack(tmp_path / "train-0.tar", whole)
    content = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-1.tar").write_bytes(content[:700])
    (tmp_path / "train-2.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "train-3.tar").mkdir()
    os.mkfifo(tmp_path / "train-4.tar")
    (tmp_path / "train-5.tar").write_bytes(content[:2048])  # cut off between two examples
    (tmp_path / "train-6.tar").write_bytes(content[:2300])  # in a header
    (tmp_path / "train-7.tar").write_bytes(content[:2058] + b"!" + content[2059:])  # a header damaged
    (tmp_path / "train-8.tar").write_bytes(content + content)
    backwards = bytearray(content)
    backwards[124:136] = (2**96 - 512).to_bytes(12, "big")  # a size of -512, as GNU's tar writes large ones
    (tmp_path / "train-9.tar").write_bytes(backwards)
    with pytest.raises(UserError) as caught:
        TarShards(str(tmp_path)).spec()
    for number in range(1, 10):
        assert f"train-{number}.tar" in str(caught.value)


def test_compressed_shards_are_rejected(tmp_path):
    (tmp_path / "train-0.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-0\.tar\.gz must be unpacked to \.tar first"):
        TarShards(str(tmp_path)).spec()


def test_labels_that_are_not_classes_are_rejected(tmp_path):
    pack(tmp_path / "train.tar", {"x.png": png(1), "x.cls": b"cat", "y.png": png(2), "y.cls": b"dog"})
    pack(tmp_path / "val.tar", {"x.png": png(1), "x.cls": b"cow"})
    with pytest.raises(UserError, match="train has no class 'cow'"):
        TarShards(str(tmp_path)).spec()
    with pytest.raises(UserError, match=r"data\.classes has no class 'cow', 'dog'"):
        TarShards(str(tmp_path), classes=["cat", "bird"]).spec()
    pack(tmp_path / "train.tar", {"x.png": png(1), "x.cls": b"0", "y.png": png(2), "y.cls": b"7"})
    (tmp_path / "val.tar").unlink()
    with pytest.raises(UserError, match="has 2 names, but there are labels up to 7"):
        TarShards(str(tmp_path), classes=["cat", "bird"]).spec()


def test_a_damaged_image_is_named_with_its_archive_position(tmp_path):
    members = {"x.png": png(1), "x.cls": b"cat", "y.png": png(2)[:40], "y.cls": b"dog"}
    pack(tmp_path / "train.tar", members)
    with pytest.raises(UserError, match=r"train\.tar cannot be used; .*\n  y\.png::\d+\+40: is not an image"):
        load_data(TarShards(str(tmp_path)), DataSettings(val_fraction=0.5, cache="ram"))


@pytest.mark.parametrize("path", ["photos/cat.jpg", "a.tar", "a.tar/b.jpg", "x::1+2", "été/a.tar.gz/b::1+2"])
def test_byte_ranges_of_files_and_members(path):
    assert byte_range(path) == (path, None, None)
    assert byte_range(member_path("s.tar", path, 3, 4)) == ("s.tar", 3, 4)


@pytest.mark.slow
def test_cached_and_streamed_runs_have_equal_metrics(make_folder, tmp_path):
    pack_folder(make_folder("train", count=20), tmp_path, "train", WRITTEN["names"])
    words = "model=mlp data=webdataset data.size=16 epochs=2 threads=1 batch_size=8 log.figures=false".split()
    words.append(f"data.root={tmp_path}")
    held, streamed = (
        train(compose(*words, f"run_dir={tmp_path}/{cache}", f"data.cache={cache}")) for cache in ("ram", "none")
    )
    assert held["best"] == streamed["best"]


CATS = {"x.png": png(1), "x.cls": b"cat", "y.png": png(2), "y.cls": b"dog"}


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
@pytest.mark.parametrize("place", ["{}-000.tar", "{}.tar", "{}/000.tar"])
def test_each_name_of_the_validation_split_is_accepted(tmp_path, name, place):
    for split in ("train", name):
        (tmp_path / place.format(split)).parent.mkdir(exist_ok=True)
        pack(tmp_path / place.format(split), CATS)
    splits = TarShards(str(tmp_path), size=8).load()
    assert splits["val"].names == [f"{place.format(name)}/x", f"{place.format(name)}/y"]
    assert splits["train"].names == [f"{place.format('train')}/x", f"{place.format('train')}/y"]


@pytest.mark.parametrize(
    ("others", "part"),
    [
        (["val.tar", "valid-0.tar"], "'val' and 'valid'"),
        (["val/0.tar", "validation/0.tar"], "'val' and 'validation'"),
        (["valid/0.tar", "val-0.tar"], r"val both in valid/ and outside it \(val-0.tar\)"),
        (["dev-0.tar"], "dev-0.tar belongs to no split"),
        (["testing/0.tar"], "testing is not a split"),
    ],
)
def test_shards_of_unknown_or_duplicate_splits_are_rejected(tmp_path, others, part):
    for name in ("train-0.tar", *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pack(tmp_path / name, CATS)
    with pytest.raises(UserError, match=part):
        TarShards(str(tmp_path)).spec()


def test_a_label_that_is_not_text_is_rejected(tmp_path):
    pack(tmp_path / "train-0.tar", {**CATS, "z.png": png(3), "z.json": b'{"label": "\\ud800"}'})
    with pytest.raises(UserError, match="contains no label"):
        TarShards(str(tmp_path)).spec()
