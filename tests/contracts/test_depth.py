"""The depth in a summary matches the number in a network's name or the published depth."""

import pytest
import torch
from torch import Tensor, nn

from cnntrain.summary.layer_table import summarize
from cnntrain.summary.view import compare
from tests.contracts.networks import header
from tests.contracts.test_models import DEEP, build

PUBLISHED = {
    **{f"resnet{n}": n for n in (18, 34, 50, 101, 152)},
    **{"vgg_a": 11, "vgg_b": 13, "vgg_c": 16, "vgg_d": 16, "vgg_e": 19, "vgg16": 16, "vgg19": 19},
    **{"alexnet": 8, "lenet5_1998": 5, "googlenet": 22, "mobilenet_v1": 28, "cifar_resnet": 20},
    **{f"densenet{n}": n for n in (121, 161, 169, 201)},
    "unet": 23,  # Ronneberger et al. 2015: "in total the network has 23 convolutional layers"
    "xception": 37,  # Chollet 2017: 36 convolutional layers, and the classifier
}
MARKED = [pytest.param(name, marks=pytest.mark.slow if name in DEEP else ()) for name in PUBLISHED]


@pytest.mark.parametrize("name", MARKED)
def test_published_depth(name: str) -> None:
    native = header(name)
    summary = summarize(
        lambda: build(name, native.channels, native.outputs, native.size), (native.channels, *native.size), name
    )
    assert summary.depth == PUBLISHED[name]
    assert compare([summary])[0]["depth"] == summary.as_dict()["depth"] == summary.depth


class Attention(nn.Module):
    """Two dense layers with a product of activations between them, and an unused branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1))
        return {"unused": self.unused(self.unused(hidden)), "out": self.last(hidden.T @ hidden)}["out"]


def test_depth_ignores_products_of_activations_and_unused_branches() -> None:
    assert summarize(Attention(), (4, 1, 1)).depth == 2


@pytest.mark.parametrize(("between", "depth"), [((), 1), ((nn.ReLU(),), 2)])
def test_a_separable_convolution_is_one_layer(between: tuple[nn.Module, ...], depth: int) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), *between, nn.Conv2d(4, 8, 1))
    assert summarize(net, (4, 8, 8)).depth == depth


def test_depth_of_a_network_without_layers() -> None:
    with torch.device("meta"):
        assert summarize(nn.Flatten(), (1, 2, 2)).depth == 0
