"""Small image files for the tests of data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Random uint8 (H, W, C), or (H, W) for one channel."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_image(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


@pytest.fixture
def pixels() -> Callable[..., np.ndarray]:
    return random_pixels


@pytest.fixture
def save() -> Callable[..., Path]:
    return save_image


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes an image folder of two classes, its images of several sizes."""

    def make(*splits: str, count: int = 6, name: str = "pets") -> Path:
        seed = 0
        for split in splits or ("train",):
            for label in ("cat", "dog"):
                for i in range(count):
                    seed += 1
                    array = random_pixels(20 + seed % 7, 30 - seed % 5, seed=seed)
                    save_image(tmp_path / name / split / label / f"{i}.png", array)
        return tmp_path / name

    return make


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """Finds real data beside the repository, or skips the test."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"no real data: {SHARED.name}/{name} is not beside the repository")
        return SHARED / name

    return find
