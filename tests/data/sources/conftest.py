"""Photographs with marks."""

import numpy as np
import pytest


@pytest.fixture
def photographs(tmp_path, save, pixels):
    """Four images of 60 x 40, a bright dot where each of two eyes is."""
    for i in range(4):
        array = np.zeros((40, 60, 3), np.uint8)
        array[10 + i, 20] = array[10 + i, 40] = 255
        save(tmp_path / f"{i}.png", array)
    return tmp_path
