"""Fingerprints detect changed images."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cnntrain.cli import main
from cnntrain.data.decoder import ImageDecoder
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.files import member_path
from cnntrain.data.fingerprint import content_hash, same_data, same_examples


def files(folder: Path, count: int = 5) -> Examples:
    folder.mkdir(exist_ok=True)
    paths = [str(folder / f"{number}.bmp") for number in range(count)]
    for number, path in enumerate(paths):
        if not Path(path).exists():
            Image.new("RGB", (9, 9), (number, 10, 10)).save(path)
    return Examples(LazyImages(paths, ImageDecoder(8, 8, 3)), {}, paths)


def test_the_hash_of_files_depends_on_bytes_and_sizes_only(tmp_path: Path) -> None:
    first = content_hash(files(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "1.bmp", (1, 1))
    assert content_hash(files(tmp_path / "b")) == first
    Image.new("RGB", (9, 9), (1, 10, 11)).save(tmp_path / "b" / "1.bmp")
    assert content_hash(files(tmp_path / "b")) != first


def test_the_hash_of_many_files_depends_on_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnntrain.data.fingerprint.SAMPLED_FILES", 2)
    first = content_hash(files(tmp_path))
    Image.new("RGB", (9, 8), (2, 10, 10)).save(tmp_path / "2.bmp")  # not in the sample
    assert content_hash(files(tmp_path)) != first


def test_the_hash_of_archive_members_depends_on_their_bytes(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    paths = [member_path(shard, f"{place}.bmp", place, 10) for place in (100, 200)]
    found = []
    for changed in (None, 0, 99, 110, 210, 100, 109, 200, 209):
        content = bytearray(300)
        if changed is not None:
            content[changed] = 1
        shard.write_bytes(content)
        found.append(content_hash(Examples(LazyImages(paths, ImageDecoder(8, 8, 3)), {}, ["0", "1"])))
    assert found[1:5] == found[:1] * 4  # outside of both
    assert len({found[0], *found[5:]}) == 5


def test_the_hash_depends_on_masks() -> None:
    images, mask = torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)
    names = ["0", "1", "2"]
    changed = mask.clone()
    changed[1, :4] = 2
    of = [content_hash(Examples(images, {"mask": each}, names)) for each in (mask, mask.clone(), changed)]
    assert of[0] == of[1] != of[2]


@pytest.mark.parametrize("change", ["mirrored", "inverted", "another one"])
def test_the_hash_of_pixels_in_memory(change: str) -> None:
    images = torch.arange(3 * 64).reshape(3, 1, 8, 8).to(torch.uint8)
    other = {"mirrored": images.flip(-1), "inverted": 255 - images, "another one": images[[0, 0, 2]]}[change]
    first = content_hash(Examples(images, {}, ["0", "1", "2"]))
    assert first == content_hash(Examples(images.clone(), {}, ["a", "b", "c"]))
    assert first != content_hash(Examples(other, {}, ["0", "1", "2"]))


def test_fingerprints_without_image_hash_are_compared_by_the_rest() -> None:
    assert same_data("9-ab", "9-ab-cd") and same_data("9-ab-cd", "9-ab-cd")
    assert not same_data("9-ab-cd", "9-ab-ce") and not same_data("9-aa", "9-ab-cd")
    assert same_examples("9-ab-cd", "9-ab-ce") and not same_examples("9-aa-cd", "9-ab-cd")


def test_resume_with_changed_pixels_is_rejected(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "data/train" / label).mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data/train" / label / f"{number}.bmp")
    arguments = ["data=image_folder", f"data.root={tmp_path / 'data'}", "data.size=8", "model=mlp", "threads=1",
                 "device=cpu", "model.values.width=4", "augment=none", "log.figures=false", "log.tensorboard=false",
                 f"run_dir={tmp_path / 'run'}", "resume=auto", "batch_size=4"]  # fmt: skip
    assert main([*arguments[:-2], "batch_size=4", "epochs=1"]) == 0
    changed = tmp_path / "data/train/a/3.bmp"
    before = changed.read_bytes()
    Image.new("RGB", (8, 8), (7, 7, 7)).save(changed)
    assert main([*arguments, "epochs=3"]) == 2
    changed.write_bytes(before)
    assert main([*arguments, "epochs=3"]) == 0
