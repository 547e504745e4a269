"""Mean and standard deviation, a few images at a time, against numpy over all of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cnntrain.data import statistics
from cnntrain.data.examples import Examples, LazyImages
from cnntrain.data.image_reader import Decoder, cut
from cnntrain.data.load import load_data
from cnntrain.data.resize import Resize, place
from cnntrain.data.sources.image_folder import ImageFolder
from cnntrain.data.sources.keypoint_csv import KeypointCsv
from cnntrain.data.statistics import covered_sides


@pytest.mark.parametrize("at_once", [1, 100, 250, 10**6])
def test_parts_make_the_whole(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(statistics, "AT_ONCE", at_once)
    images = torch.randint(
        0, 256, (11, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = statistics.measure(Examples(images, {}, [str(i) for i in range(11)]), seed=0)
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
def test_letterbox_borders_are_left_out(tmp_path: Path, cache: str, magnification: float) -> None:
    shapes = [(32, 16), (16, 32), (32, 32), (31, 10), (7, 29), (64, 20)]
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for number, shape in enumerate(shapes):
            noise(tmp_path / "train" / label / f"{number}.png", *shape, seed=number)
    source = ImageFolder(str(tmp_path), size=32, resize="letterbox")
    spec = load_data(source, cache=cache, magnification=magnification).spec
    assert spec.mean == pytest.approx((144.5 / 255,) * 3, abs=0.01)
    assert spec.std is not None and max(spec.std) < 0.13  # 0.28 with black borders


@pytest.mark.parametrize("crop", ["points", "none"])
def test_of_points_and_their_boxes_only_the_image_counts(tmp_path: Path, crop: str) -> None:
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


def test_what_is_covered_is_told_of_the_rows_that_are_asked_for(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path, (height, width) in zip(paths, [(8, 8), (8, 4), (2, 8)], strict=True):
        noise(Path(path), height, width, seed=0)
    found = statistics.coverage(LazyImages(paths, Decoder(8, 8, 3, "letterbox")), torch.tensor([2, 1]))
    expected = torch.zeros(2, 8, 8, dtype=torch.bool)
    expected[0, 3:5] = True
    expected[1, :, 2:6] = True
    assert torch.equal(found, expected)


@pytest.mark.parametrize("resize", ["letterbox", "short_side", "stretch"])
def test_a_box_that_reaches_beyond_its_image_leaves_borders(tmp_path: Path, resize: Resize) -> None:
    path = str(tmp_path / "a.png")
    Image.new("RGB", (20, 20), (100, 100, 100)).save(path)
    boxes = torch.tensor([[-20.0, 0.0, 20.0, 20.0]], dtype=torch.float64)
    files = LazyImages([path], Decoder(16, 16, 3, resize), boxes)
    images = torch.stack([files[0]])
    assert float((images == 0).float().mean()) > 0.4
    mean, std = statistics.measure(Examples(images, {}, ["a"]), seed=0, files=files)
    assert mean == pytest.approx((100 / 255,) * 3, abs=0.03)
    assert all(each < 0.1 or each == 1 for each in std)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 60),
    st.tuples(*[st.floats(-30, 30)] * 2), st.tuples(*[st.floats(2, 80)] * 2), st.booleans(),
)  # fmt: skip
def test_what_an_image_covers_is_what_a_white_one_whitens(width, height, start, extent, boxed) -> None:
    box = (start[0], start[1], start[0] + extent[0], start[1] + extent[1]) if boxed else None
    placement = place(width, height, (24, 20), "letterbox", box)
    x, y = covered_sides(placement, (width, height))
    drawn = cut(Image.new("L", (width, height), 255), placement, (24, 20), Image.Resampling.BILINEAR, 0)
    covered = np.zeros((24, 20), bool)
    covered[y, x] = True
    # Antialiasing mixes the pixels next to an edge with what lies beyond.
    assert ((drawn[covered] > 0).all() and (drawn[~covered] < 255).all()) or not covered.any()
