"""Adaptive average pooling with a deterministic gradient on CUDA."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from cnntrain.models.pooling import deterministic_adaptive_avg_pool2d, make_pooling_deterministic


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (14, 10), (3, 2), (2, 9), (6, 20), (None, 4), (5, None)])
def test_values_and_gradients_are_those_of_torch(size):
    images = torch.randn(2, 3, 14, 10, dtype=torch.float32)
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    result, expected = (
        deterministic_adaptive_avg_pool2d(ours, *size),
        functional.adaptive_avg_pool2d(theirs, size),
    )
    torch.testing.assert_close(result, expected)
    weights = torch.randn_like(expected)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_mean_in_bf16_is_not_biased():
    images = torch.ones(1, 1, 7, 7, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(deterministic_adaptive_avg_pool2d(images, 3, 3), torch.ones(1, 1, 3, 3).bfloat16())


@pytest.mark.parametrize("size", [1, 3, (2, 5), (None, 2)])
def test_a_network_keeps_its_parameters_and_outputs(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(size), nn.Flatten()).eval()
    images, names = torch.randn(2, 1, 12, 12), list(model.state_dict())
    expected = model(images)
    make_pooling_deterministic(model)
    assert list(model.state_dict()) == names
    for network in (model, copy.deepcopy(model)):
        torch.testing.assert_close(network(images), expected)
        assert "AdaptiveAvgPool" not in str(network(images).grad_fn.next_functions)
