"""Batches for the augmentation tests: small, and nothing in them symmetric by accident."""

from collections.abc import Callable

import pytest
import torch

from cnntrain.types import Batch, DataSpec

HEIGHT, WIDTH = 44, 57
POINTS = ("nose", "left_eye", "right_eye", "left_ear", "right_ear")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    def make(count: int = 6, channels: int = 3, height: int = 12, width: int = 17, first: int = 0) -> Batch:
        """Images that depend on their position in the epoch alone."""
        images = torch.stack(
            [
                torch.randint(
                    0,
                    256,
                    (channels, height, width),
                    dtype=torch.uint8,
                    generator=torch.Generator().manual_seed(position),
                )
                for position in range(first, first + count)
            ]
        )
        position = torch.arange(first, first + count)
        return Batch(images, {"label": position % 10}, position.clone(), position)

    return make


def blobs(points: torch.Tensor) -> torch.Tensor:
    """(N, 1, HEIGHT, WIDTH) uint8: a smooth bright spot at each point (N, 2)."""
    x = torch.arange(WIDTH)[None, None, :] - points[:, 0, None, None]
    y = torch.arange(HEIGHT)[None, :, None] - points[:, 1, None, None]
    return (255 * torch.exp(-(x**2 + y**2) / (2 * 1.7**2))).round().to(torch.uint8).unsqueeze(1)


def discs(points: torch.Tensor, radius_px: float = 3.0) -> torch.Tensor:
    """(N, HEIGHT, WIDTH) uint8: 1 around each point (N, 2), else 0."""
    x = torch.arange(WIDTH)[None, None, :] - points[:, 0, None, None]
    y = torch.arange(HEIGHT)[None, :, None] - points[:, 1, None, None]
    return (x**2 + y**2 <= radius_px**2).to(torch.uint8)


def make_spots_batch(count: int, seed: int) -> Batch:
    """Images with a spot at the first keypoint, the mask a disc there; the other points anywhere."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([WIDTH - 1.0, HEIGHT - 1.0])
    points = torch.rand(count, len(POINTS), 2, generator=generator) * size
    points[:, 0] = 12 + (size - 24) * torch.rand(count, 2, generator=generator)
    targets = {
        "points": points,
        "valid": torch.rand(count, len(POINTS), generator=generator) < 0.8,
        "mask": discs(points[:, 0]),
    }
    targets["valid"][:, 0] = True
    position = torch.arange(count)
    return Batch(blobs(points[:, 0]), targets, position.clone(), position)


@pytest.fixture(scope="session")
def faces() -> DataSpec:
    """What `make_spots` makes."""
    return DataSpec(1, HEIGHT, WIDTH, keypoints=POINTS, flip_pairs=(0, 2, 1, 4, 3))


@pytest.fixture(scope="session")
def make_spots() -> Callable[[int, int], Batch]:
    return make_spots_batch
