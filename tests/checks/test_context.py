"""Training steps of checks compute like those of a training."""

import pytest
import torch
from torch import nn

from cnntrain.checks.context import backward
from cnntrain.train.device import Compute


def test_small_gradients_survive_fp16() -> None:
    """As in training, the loss is scaled before the backward pass and the gradients after it."""
    model = nn.Linear(2, 1, bias=False)
    images = torch.full((1, 2), 1e-4, dtype=torch.float16)
    output = nn.functional.linear(images, model.weight.half()).float().sum()  # as under autocast
    backward(output * 1e-4, model, Compute(torch.device("cpu"), "fp16", channels_last=False))
    assert model.weight.grad is not None
    assert model.weight.grad[0].tolist() == pytest.approx([1e-8, 1e-8], rel=0.01)
