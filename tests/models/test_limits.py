"""A config of a few bytes can't ask for layers without end."""

from typing import Any

import pytest

from cnntrain.errors import UserError
from cnntrain.models.cifar_resnet import CifarResNet
from cnntrain.models.sequential.parser import Sequential, count_layers

RELU: list[Any] = ["relu"]


def nested(times: object, depth: int) -> list[Any]:
    layers: list[Any] = RELU
    for _ in range(depth):
        layers = [{"repeat": {"times": times, "layers": layers}}]
    return layers


def test_layers_are_counted_with_all_repeats_written_out() -> None:
    layers = ["relu", {"repeat": {"times": 3, "layers": ["relu", {"conv": {"out": 3}}]}}, "output"]
    assert count_layers(layers) == 8
    assert count_layers([{"residual": {"layers": ["relu", "relu"]}}, {"branches": [RELU, RELU * 2]}]) == 5


@pytest.mark.parametrize("layers", [
    nested(10**9, 1), nested(1e9, 1), nested(100, 3), nested(2, 15), [{"repeat": {"times": 10**9, "layers": []}}],
    [{"residual": {"layers": nested(10**9, 1)}}], [{"branches": [nested(10**9, 1)]}],
    [{"residual": [{"repeat": {"times": 10**9, "layers": RELU}}]}],
])  # fmt: skip
def test_too_many_layers_are_refused_before_they_are_built(layers: list[Any]) -> None:
    with pytest.raises(UserError, match=r"model\.layers"):
        Sequential(layers=["flatten", *layers, "output"], in_channels=1, num_outputs=2, image_size=(8, 8))


def test_a_depth_beyond_all_networks_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.depth"):
        CifarResNet(depth=6 * 10**9 + 2, in_channels=3, num_outputs=2, image_size=(32, 32))
