"""Mean and standard deviation against numpy, and 16-bit files that use few bits."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cnntrain.cli import main
from cnntrain.config.compose import read_settings
from cnntrain.config.schema import DataSettings
from cnntrain.data import statistics
from cnntrain.data.decoder import ImageDecoder, Resize, resize_geometry, resize_image
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.files import BadFile
from cnntrain.data.load import load_data
from cnntrain.data.sources.digits import Digits
from cnntrain.data.sources.image_folder import ImageFolder
from cnntrain.data.sources.keypoint_csv import KeypointCsv
from cnntrain.data.statistics import covered_slices
from cnntrain.errors import UserError
from cnntrain.train.setup import build_components


@pytest.mark.parametrize("chunk_values", [1, 100, 250, 10**6])
def test_chunked_statistics_equal_numpy(monkeypatch: pytest.MonkeyPatch, chunk_values: int) -> None:
    monkeypatch.setattr(statistics, "CHUNK_VALUES", chunk_values)
    images = torch.randint(0, 256, (11, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = statistics.measure_statistics(Examples(images, {}, [str(i) for i in range(11)]), seed=0)
    values = images.numpy().astype("float64") / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)), abs=1e-12)
    assert std == pytest.approx(values.std((0, 2, 3)), abs=1e-12)


def noise(path: Path, height: int, width: int, seed: int) -> np.ndarray:
    """Bright noise, saved losslessly."""
    pixels = np.random.default_rng(seed).integers(90, 200, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
@pytest.mark.parametrize("magnification", [1.0, 1.5])
def test_letterbox_padding_is_excluded_from_the_statistics(tmp_path: Path, cache: str, magnification: float) -> None:
    shapes = [(32, 16), (16, 32), (32, 32), (31, 10), (7, 29), (64, 20)]
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for number, shape in enumerate(shapes):
            noise(tmp_path / "train" / label / f"{number}.png", *shape, seed=number)
    source = ImageFolder(str(tmp_path), size=32, resize="letterbox")
    spec = load_data(source, DataSettings(cache=cache), magnification).spec
    assert spec.mean == pytest.approx((144.5 / 255,) * 3, abs=0.01)
    assert spec.std is not None and max(spec.std) < 0.13  # 0.28 with black borders


@pytest.mark.parametrize("crop", ["points", "none"])
def test_box_padding_is_excluded_from_the_statistics(tmp_path: Path, crop: str) -> None:
    lines = ["image_name,a_x,a_y,b_x,b_y"]
    for number in range(6):
        noise(tmp_path / f"{number}.png", 40, 20 + number, seed=number)
        lines.append(f"{number}.png,2,{5 + number},15,{20 + number}")
    (tmp_path / "points.csv").write_text("\n".join(lines))
    source = KeypointCsv(root=str(tmp_path), size=32, crop=crop, crop_margin=1.0)
    data = load_data(source)
    images = data.train.images
    assert isinstance(images, Tensor) and float((images == 0).float().mean()) > 0.2
    assert data.spec.mean == pytest.approx((144.5 / 255,) * 3, abs=0.015)


def test_coverage_of_selected_rows(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path, (height, width) in zip(paths, [(8, 8), (8, 4), (2, 8)], strict=True):
        noise(Path(path), height, width, seed=0)
    found = statistics.coverage(LazyImages(paths, ImageDecoder(8, 8, 3, "letterbox")), torch.tensor([2, 1]))
    expected = torch.zeros(2, 8, 8, dtype=torch.bool)
    expected[0, 3:5] = True
    expected[1, :, 2:6] = True
    assert torch.equal(found, expected)


@pytest.mark.parametrize("resize", ["letterbox", "short_side", "stretch"])
def test_a_box_beyond_the_image_is_padded(tmp_path: Path, resize: Resize) -> None:
    path = str(tmp_path / "a.png")
    Image.new("RGB", (20, 20), (100, 100, 100)).save(path)
    boxes = torch.tensor([[-20.0, 0.0, 20.0, 20.0]], dtype=torch.float64)
    files = LazyImages([path], ImageDecoder(16, 16, 3, resize), boxes)
    images = torch.stack([files[0]])
    assert float((images == 0).float().mean()) > 0.4
    mean, std = statistics.measure_statistics(Examples(images, {}, ["a"]), seed=0, files=files)
    assert mean == pytest.approx((100 / 255,) * 3, abs=0.03)
    assert all(each < 0.1 or each == 1 for each in std)


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(*[st.integers(1, 60)] * 2),
    st.none() | st.tuples(*[st.floats(-30, 30)] * 2, *[st.floats(2, 80)] * 2),
)
def test_covered_pixels_of_a_white_image_are_white(size, start_and_extent) -> None:
    width, height = size
    left, top, *extent = start_and_extent or (0, 0, 0, 0)
    box = (left, top, left + extent[0], top + extent[1]) if start_and_extent else None
    placement = resize_geometry(width, height, (24, 20), "letterbox", box)
    x, y = covered_slices(placement, (width, height))
    drawn = resize_image(Image.new("L", (width, height), 255), placement, (24, 20), Image.Resampling.BILINEAR, 0)
    covered = np.zeros((24, 20), bool)
    covered[y, x] = True
    # Antialiasing mixes the pixels next to an edge with what lies beyond.
    assert ((drawn[covered] > 0).all() and (drawn[~covered] < 255).all()) or not covered.any()


def ramp(path: Path, highest: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.linspace(0, highest, 256).round().astype(np.uint16)[None].repeat(2, 0)).save(path)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label in ("a", "b"):
        for number in range(5):
            ramp(tmp_path / "train" / label / f"{number}.png", 4095 - number)
    return tmp_path


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 16])
def test_the_used_bits_fill_the_gray_levels(tmp_path: Path, bits: int) -> None:
    path = ramp(tmp_path / "a.png", 2**bits - 1)
    assert ImageDecoder(2, 256, 1, bits=bits)(path)[0][0, 0].tolist() == list(range(256))


def test_bits_do_not_affect_8_bit_and_float_images(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 77).save(tmp_path / "l.png")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "f.tif")
    assert int(ImageDecoder(4, 4, 1, bits=12)(str(tmp_path / "l.png"))[0].max()) == 77
    assert int(ImageDecoder(4, 4, 1, bits=12)(str(tmp_path / "f.tif"))[0].max()) == 128


def test_values_that_need_more_bits_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="4096"):
        ImageDecoder(2, 256, 1, bits=12)(ramp(tmp_path / "a.png", 4096))


def levels(data) -> int:
    assert isinstance(data.train.images, Tensor)
    return len(data.train.images.unique())


def test_unused_bits_cause_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = ImageFolder(str(folder), size=[2, 256], channels=1, resize="stretch")
    with caplog.at_level(logging.WARNING, "cnntrain"):
        assert levels(load_data(source)) == 17
    assert "data.bits=12" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cnntrain"):
        assert levels(load_data(source, DataSettings(bits=12))) == 256
    assert not caplog.text


@pytest.mark.parametrize(("highest", "said"), [(5, "data.bits=9"), (4095, "data.bits=12"), (4096, None)])
def test_the_warning_names_the_needed_bits(
    tmp_path: Path, highest: int, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    for label in ("a", "b"):
        for number in range(5):
            ramp(tmp_path / "train" / label / f"{number}.png", highest)
    with caplog.at_level(logging.WARNING, "cnntrain"):
        load_data(ImageFolder(str(tmp_path), size=8, channels=1))
    assert (said in caplog.text and f"no value above {highest}," in caplog.text) if said else not caplog.text


@pytest.mark.parametrize("other", ["16 bits", "8 bits"])
def test_no_warning_for_files_that_use_their_bits(folder: Path, other: str, caplog: pytest.LogCaptureFixture) -> None:
    """One bright image of many is enough, in the sample or not."""
    if other == "16 bits":
        ramp(folder / "train" / "b" / "3.png", 30_000)
    else:
        for path in folder.rglob("*.png"):
            Image.new("L", (4, 4), 9).save(path)
    for sampled in (2, 100):
        with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "cnntrain"):
            patch.setattr("cnntrain.data.statistics.BIT_DEPTH_SAMPLE", sampled)
            load_data(ImageFolder(str(folder), size=8, channels=1))
    assert "data.bits" not in caplog.text


def test_bits_are_rejected_for_images_in_memory() -> None:
    with pytest.raises(UserError, match=r"data\.bits"):
        load_data(Digits(), DataSettings(bits=12))
    for wrong in ("8", "17", "many"):
        with pytest.raises(UserError, match=r"data\.bits"):
            build_components(read_settings([f"data.bits={wrong}", "model=mlp"]))


def test_predict_uses_the_bits_of_the_training(folder: Path) -> None:
    quick = "model=mlp model.values.width=4 threads=1 device=cpu log.figures=false log.tensorboard=false".split()
    data = f"data=image_folder data.root={folder} data.size=8 data.channels=1 data.bits=12 augment=none".split()
    assert main([*quick, *data, "epochs=1", "run_dir=run"]) == 0
    (folder / "asked").mkdir()
    sixteen = np.linspace(0, 65535, 256).round().astype(np.uint16)
    Image.fromarray((sixteen // 16)[None].repeat(2, 0)).save(folder / "asked" / "twelve.png")
    Image.fromarray((sixteen // 257).astype(np.uint8)[None].repeat(2, 0)).save(folder / "asked" / "eight.png")
    assert main(["predict", "checkpoint=run", f"images={folder / 'asked'}", "threads=1", "draw=0", "run_dir=out"]) == 0
    rows = json.loads(Path("out/predictions.json").read_text())["images"]
    one, other = (row["probabilities"]["a"] for row in rows)
    assert one == pytest.approx(other, abs=0.01)
