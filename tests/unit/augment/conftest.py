"""Batches for the augmentation tests: small, and nothing in them symmetric by accident."""

from collections.abc import Callable

import pytest
import torch

from cnntrain.spec import Batch


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
