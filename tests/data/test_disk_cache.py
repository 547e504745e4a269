"""Cache files have the same pixels as the images, are never outdated, and are written atomically."""

import errno
import fcntl
import os
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cnntrain.cli import main
from cnntrain.data import cache, disk_cache
from cnntrain.data.cache import _prefer_disk, cache_on_disk, decode_into_ram
from cnntrain.data.decoder import ImageDecoder
from cnntrain.data.disk_cache import CacheFile, folder
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.files import BadFile, member_path
from cnntrain.errors import MachineError, UserError


@pytest.fixture
def splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Examples]:
    """Five pictures of different sizes, letterboxed onto 8x12; one object cut out of the last."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    paths = []
    for number in range(5):
        pixels = random.integers(0, 256, (6 + number, 20 - number, 3), dtype=np.uint8)
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(pixels).save(paths[-1])
    decoder = ImageDecoder(8, 12, 3)
    masks = LazyImages(paths[:4], ImageDecoder(8, 12, 1))
    boxes = torch.tensor([[1.0, 1.0, 9.0, 6.0]], dtype=torch.float64)
    train, val = LazyImages(paths[:4], decoder), LazyImages(paths[4:], decoder, boxes)
    return {
        "train": Examples(train, {"label": torch.arange(4)}, paths[:4], lazy_targets={"mask": masks}),
        "val": Examples(val, {"label": torch.zeros(1)}, paths[4:]),
    }


def same(one: dict[str, Examples], other: dict[str, Examples]) -> bool:
    pairs = [(one[name], other[name]) for name in one]
    return all(
        torch.equal(tensor(a.images), tensor(b.images))
        and torch.equal(tensor(a.source_to_image), tensor(b.source_to_image))
        and all(torch.equal(a.targets[name], b.targets[name]) for name in b.targets)
        for a, b in pairs
    )


def tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def test_cached_images_equal_decoded_images(splits: dict[str, Examples]) -> None:
    first, in_ram = cache_on_disk(splits), decode_into_ram(splits)
    assert same(first, in_ram) and first["train"].lazy_targets == {}
    assert len(list(folder().glob("*.u8"))) == 3 and len(list(folder().iterdir())) == 3


def test_a_cached_data_set_is_not_decoded_again(splits: dict[str, Examples], monkeypatch: pytest.MonkeyPatch) -> None:
    first = cache_on_disk(splits)
    monkeypatch.setattr(ImageDecoder, "__call__", never)
    assert same(cache_on_disk(splits), first)


def test_a_changed_file_is_decoded_again(splits: dict[str, Examples]) -> None:
    before = cache_on_disk(splits)
    images = splits["train"].images
    assert isinstance(images, LazyImages)
    Image.new("RGB", (9, 9), (200, 10, 10)).save(images.paths[1])
    after = cache_on_disk(splits)
    assert not torch.equal(tensor(after["train"].images)[1], tensor(before["train"].images)[1])
    assert torch.equal(tensor(after["train"].images)[0], tensor(before["train"].images)[0])


def never(*_: object) -> None:
    raise AssertionError("decoded again")


def test_changed_bytes_with_equal_size_and_time_are_detected(
    splits: dict[str, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = splits["train"].images
    assert isinstance(images, LazyImages)
    images.paths = [str(Path(path).with_suffix(".bmp")) for path in images.paths]
    for number, path in enumerate(images.paths):
        Image.new("RGB", (9, 9), (40 * number, 10, 10)).save(path)
    before, size = cache_on_disk(splits), os.stat(images.paths[1])
    Image.new("RGB", (9, 9), (200, 99, 10)).save(images.paths[1])
    os.utime(images.paths[1], ns=(size.st_atime_ns, size.st_mtime_ns))
    assert os.stat(images.paths[1]).st_size == size.st_size
    after = cache_on_disk(splits)
    assert same(after, decode_into_ram(splits)) and not same(after, before)
    kept = len(list(folder().iterdir()))
    monkeypatch.setattr(ImageDecoder, "__call__", never)
    for path in images.paths:  # copied once more: the same bytes
        os.utime(path, ns=(size.st_atime_ns, os.stat(path).st_mtime_ns))
    assert same(cache_on_disk(splits), after)
    monkeypatch.setattr(disk_cache, "_file_checksum", never)  # which is confirmed once
    assert same(cache_on_disk(splits), after) and len(list(folder().iterdir())) == kept


def test_an_archive_member_has_the_checksum_of_its_bytes(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(b"before-" + b"content" + b"-after")
    (tmp_path / "alone").write_bytes(b"content")
    within = disk_cache._file_checksum(member_path(shard, "a.png", 7, 7))
    assert within == disk_cache._file_checksum(str(tmp_path / "alone")) == zlib.crc32(b"content")


@pytest.mark.parametrize("damage", ["zeroed", "cut", "longer", "empty", "one byte", "sums", "times"])
def test_a_damaged_cache_file_is_rebuilt(splits: dict[str, Examples], damage: str) -> None:
    good = cache_on_disk(splits)
    for path in folder().glob("*.u8"):
        content = bytearray(path.read_bytes())
        if damage == "one byte":
            content[len(content) // 2] ^= 1
        elif damage == "sums":
            content[-1] ^= 1
        elif damage == "times":
            content[0] ^= 1
        path.unlink()  # the file that is mapped stays
        others = {"zeroed": bytes(len(content)), "cut": content[:-100], "longer": content + b"?", "empty": b""}
        path.write_bytes(others.get(damage, content))
    assert same(cache_on_disk(splits), good)
    assert same(cache_on_disk(splits), decode_into_ram(splits))


def test_damaged_images_are_named_although_a_damaged_cache_file_exists(splits: dict[str, Examples]) -> None:
    cache_on_disk(splits)
    for path in folder().glob("*.u8"):
        path.unlink()
        path.write_bytes(b"cut off")
    images = splits["train"].images
    assert isinstance(images, LazyImages)
    before = os.stat(images.paths[1])
    Path(images.paths[1]).write_bytes(bytes(before.st_size))
    os.utime(images.paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=r"1\.png"):
        cache_on_disk(splits)


def test_writes_to_cached_images_stay_in_the_process(splits: dict[str, Examples]) -> None:
    first = tensor(cache_on_disk(splits)["train"].images)
    before = first.clone()
    first.zero_()
    assert torch.equal(tensor(cache_on_disk(splits)["train"].images), before)


def test_bad_files_are_all_named_and_nothing_is_cached(splits: dict[str, Examples]) -> None:
    for name in ("train", "val"):
        images = splits[name].images
        assert isinstance(images, LazyImages)
        Path(images.paths[0]).write_bytes(b"no image")
    with pytest.raises(UserError, match="2 of") as told:
        cache_on_disk(splits)
    assert "0.png" in str(told.value) and "4.png" in str(told.value)
    assert list(folder().iterdir()) == []


def test_bad_files_of_a_data_set_larger_than_memory_are_named(
    splits: dict[str, Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, bad = splits["train"].images, []
    assert isinstance(images, LazyImages)
    large = LazyImages(images.paths[:1] * 100_000, ImageDecoder(8192, 8192, 3))  # 20 TB
    monkeypatch.setattr(CacheFile, "create", lambda self, bad: bad.append(BadFile("0.png", "is damaged")))
    pixels, matrices = disk_cache.load_or_decode(large, bad)
    assert len(bad) == 1 and pixels.shape == large.shape and matrices.shape == (100_000, 3, 3)


def test_a_full_disk_is_reported_before_decoding(splits: dict[str, Examples], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MachineError, match="no room for"):
        cache_on_disk(splits)
    assert list(folder().iterdir()) == []


def test_a_removed_lock_does_not_block(tmp_path: Path) -> None:
    lock, entered = tmp_path / "a.lock", threading.Event()

    def wait() -> None:
        with disk_cache._exclusive_lock(lock):
            entered.set()

    with lock.open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.2)
        lock.unlink()
        second = lock.open("w")
        fcntl.flock(second, fcntl.LOCK_EX)
    assert not entered.wait(0.3)
    lock.unlink()
    second.close()
    waiting.join(10)
    assert entered.is_set() and not lock.exists()


def test_partial_files_of_a_killed_run_are_ignored(splits: dict[str, Examples]) -> None:
    cache_on_disk(splits)
    whole = sorted(folder().glob("*.u8"))
    contents = [path.read_bytes() for path in whole]
    for path in whole:
        path.rename(path.with_suffix(".part"))
        path.with_suffix(".part").write_bytes(b"half")
    cache_on_disk(splits)
    assert [path.read_bytes() for path in whole] == contents and len(list(folder().iterdir())) == 3


@dataclass(frozen=True)
class Own(ImageDecoder):
    """Its code may change while it looks the same."""


def test_when_auto_prefers_disk(splits: dict[str, Examples], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _prefer_disk(splits)  # a few are quickly decoded
    monkeypatch.setattr(cache, "MANY_FILES", 1)
    assert _prefer_disk(splits)
    monkeypatch.setattr(disk_cache, "MAX_SHARE_OF_DISK", 0.0)
    assert not _prefer_disk(splits)
    cache_on_disk(splits)
    assert _prefer_disk(splits)  # there already
    images = splits["train"].images
    assert isinstance(images, LazyImages)
    images.decoder = Own(8, 12, 3)
    assert not _prefer_disk(splits)


def test_clean_removes_the_cache(splits: dict[str, Examples], capsys: pytest.CaptureFixture[str]) -> None:
    cache_on_disk(splits)
    assert main(["clean"]) == 0
    assert "3 files" in capsys.readouterr().out and not folder().exists()
    assert main(["clean"]) == 0 and main(["clean", "all"]) == 2
