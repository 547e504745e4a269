"""Where decoded images are kept; scans check headers or pixels once per file."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cnntrain.data.cache import scan_files
from cnntrain.data.decoder import ImageDecoder
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.loader import CachedLoader
from cnntrain.errors import UserError


def test_masks_are_kept_in_the_same_memory_as_images() -> None:
    images, mask = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, 8, 8, dtype=torch.uint8)
    examples = Examples(images, {"mask": mask, "label": torch.arange(4)}, list("abcd"))
    assert examples.decoded_bytes() == images.numel() + mask.numel()
    on_host = CachedLoader(examples, torch.device("meta"), on_device=False)
    assert on_host.targets["mask"].device.type == "cpu" and on_host.targets["label"].device.type == "meta"
    on_gpu = CachedLoader(examples, torch.device("meta"), on_device=True)
    assert on_gpu.targets["mask"].device.type == "meta"
    for loader in (on_host, on_gpu):
        batch = next(loader.batches(torch.arange(4), 2))
        assert {each.device.type for each in (batch.images, *batch.targets.values())} == {"meta"}
        assert batch.targets["mask"].shape == (2, 8, 8)


@pytest.fixture
def splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Examples]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    for path in paths:
        Image.effect_noise((16, 16), 50).save(path)
    return {"train": Examples(LazyImages(paths, ImageDecoder(8, 8, 1)), {}, paths)}


def spoil(path: Path, keep_time: bool) -> None:
    """Overwrite all but the header, with as many bytes."""
    content, about = path.read_bytes(), path.stat()
    path.write_bytes(content[:60] + b"?" * (len(content) - 60))
    if keep_time:
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_a_header_scan_does_not_detect_damaged_pixels(splits: dict[str, Examples], tmp_path: Path) -> None:
    spoil(tmp_path / "2.png", keep_time=False)
    scan_files(splits, "off")
    scan_files(splits, "headers")
    with pytest.raises(UserError, match=r"1 of 4 files.*\n  2\.png: "):
        scan_files(splits, "full")


def test_unchanged_good_files_are_not_scanned_again(splits: dict[str, Examples], tmp_path: Path) -> None:
    scan_files(splits, "full")
    spoil(tmp_path / "1.png", keep_time=True)
    scan_files(splits, "full")
    spoil(tmp_path / "1.png", keep_time=False)
    with pytest.raises(UserError, match=r"1\.png"):
        scan_files(splits, "full")
    with pytest.raises(UserError, match=r"1\.png"):  # what was not sound is not remembered
        scan_files(splits, "full")


def test_a_full_scan_with_other_settings_of_the_decoder_decodes_again(
    splits: dict[str, Examples], tmp_path: Path
) -> None:
    scan_files(splits, "full")
    spoil(tmp_path / "1.png", keep_time=True)
    images = splits["train"].images
    assert isinstance(images, LazyImages)
    splits["train"] = replace(splits["train"], images=replace(images, decoder=ImageDecoder(8, 8, 1, bits=12)))
    with pytest.raises(UserError, match=r"1\.png"):
        scan_files(splits, "full")


def test_a_damaged_scan_record_is_ignored(splits: dict[str, Examples], tmp_path: Path) -> None:
    scan_files(splits, "headers")
    (memory,) = (tmp_path / "cache" / "cnntrain" / "scans").iterdir()
    for content in (b"", b"[]", b"{", b"\xff", b'{"a": 1}'):
        memory.write_bytes(content)
        scan_files(splits, "headers")
