"""Networks of lectures and papers have the layers in the published order."""

import pytest
import torch
from torch import nn

from tests.contracts.networks import header
from tests.contracts.test_models import build

CONV_RELU = ["Conv2d", "ReLU"]
CONV_BN_RELU = ["Conv2d", "BatchNorm2d", "ReLU"]
CONV_RELU_BN = ["Conv2d", "ReLU", "BatchNorm2d"]
CONV_TANH_POOL = ["Conv2d", "Tanh", "AvgPool2d"]
POOL = ["MaxPool2d"]
PUBLISHED = {
    "lenet5": [*CONV_RELU, *POOL, *CONV_RELU, *POOL, "Flatten", "Linear", "ReLU", "Linear"],
    "lenet5_1998": [*2 * CONV_TANH_POOL, "Flatten", "Linear", "Tanh", "Linear", "Tanh", "Linear"],
    "batchnorm_cnn": [
        *2 * CONV_BN_RELU,
        *POOL,
        "Dropout",
        "Flatten",
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
    ],
    "fmnist_cnn": [
        *2 * [*2 * CONV_RELU_BN, *POOL, "Dropout"],
        "Flatten",
        "Linear",
        "ReLU",
        "BatchNorm1d",
        "Dropout",
        "Linear",
    ],
    "dogs_cats_cnn": [
        *4 * [*2 * CONV_RELU, *POOL],
        "Flatten",
        "Dropout",
        "Linear",
        "ReLU",
        "Linear",
    ],
    "alexnet": [  # Krizhevsky et al. 2012, sections 3.5 and 4.2
        *2 * [*CONV_RELU, "LocalResponseNorm", *POOL],
        *3 * CONV_RELU,
        *POOL,
        "Flatten",
        *2 * ["Dropout", "Linear", "ReLU"],
        "Linear",
    ],
}


def kinds(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if not any(m.children())]


@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_have_the_published_order(name: str) -> None:
    native = header(name)
    with torch.device("meta"):
        model = build(name, native.channels, native.outputs, native.size)
    assert kinds(model) == PUBLISHED[name]


def test_alexnet_normalizes_before_pooling() -> None:
    """As in the paper; lecture 004 pools first. The norms get maps of 55x55 and 27x27 px."""
    sizes: list[tuple[int, ...]] = []
    with torch.device("meta"):
        model = build("alexnet", 3, 1000, (227, 227)).eval()
        for module in model.modules():
            if isinstance(module, nn.LocalResponseNorm):
                module.register_forward_hook(lambda _m, _i, output: sizes.append(tuple(output.shape[1:])))
        model(torch.empty(1, 3, 227, 227))
    assert sizes == [(96, 55, 55), (256, 27, 27)]
