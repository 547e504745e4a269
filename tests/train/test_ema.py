"""The moving average of a network's weights."""

import torch
from torch import nn

from cnntrain.train.ema import MovingAverage


def test_weights_are_averaged_and_buffers_copied():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False))
    average = MovingAverage(model, decay=0.5)
    old = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    model(torch.randn(2, 1, 5, 5))
    average.update(model, step=100)
    for before, mine, now in zip(old, average.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, (before + now) / 2)
    for mine, now in zip(average.model.buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, now) and mine.dtype == now.dtype and mine is not now


def test_a_network_without_buffers_is_averaged():
    model = nn.Linear(2, 1)
    MovingAverage(model, decay=0.9).update(model, step=1)
