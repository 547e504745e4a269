"""Mean and standard deviation, a few images at a time, against numpy over all of them."""

import pytest
import torch

from cnntrain.data import statistics
from cnntrain.data.examples import Examples


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
