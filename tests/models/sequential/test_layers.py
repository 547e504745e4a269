"""Layers of a list: output shapes and values."""

import pytest
import torch
from torch import nn

from cnntrain.models.sequential.parser import Sequential, layer_builders


def build(*layers: object, channels: int = 3, size: tuple[int, ...] = (32, 32), outputs: int = 10) -> Sequential:
    return Sequential(layers=list(layers), in_channels=channels, num_outputs=outputs, image_size=size)


def shape_after(*layers: object, channels: int = 4, size: tuple[int, ...] = (8, 8)) -> tuple[int, ...]:
    """Return the shape of the map before a per-pixel output layer."""
    network = build(*layers, {"output": {"kernel": 1}}, channels=channels, size=size, outputs=5)
    images = torch.randn(2, channels, *size)
    assert network(images).shape[:2] == (2, 5)
    return tuple(network.layers[:-1](images).shape[1:])


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        pytest.param({"conv": 7}, (7, 6, 6), id="first argument"),
        pytest.param({"conv": {"out": 7, "kernel": 5, "padding": "same"}}, (7, 8, 8), id="same"),
        pytest.param({"conv": {"out": 7, "kernel": 4, "padding": "same"}}, (7, 8, 8), id="even same"),
        pytest.param({"conv": {"out": 7, "kernel": 3, "stride": 2, "padding": "same"}}, (7, 4, 4), id="halved"),
        pytest.param({"conv": {"out": 7, "kernel": 3, "padding": "full"}}, (7, 10, 10), id="full"),
        pytest.param({"conv": {"out": 7, "kernel": 3, "padding": 4, "dilation": 4}}, (7, 8, 8), id="dilated"),
        pytest.param({"conv": {"out": 8, "kernel": [1, 3], "groups": 4}}, (8, 8, 6), id="groups"),
        pytest.param({"conv": {"out": 7, "padding": 1, "padding_mode": "reflect"}}, (7, 8, 8), id="padding_mode"),
        pytest.param({"transposed_conv": 7}, (7, 16, 16), id="transposed"),
        pytest.param({"depthwise_separable": {"out": 7, "stride": 2}}, (7, 4, 4), id="depthwise separable"),
        pytest.param("max_pool", (4, 4, 4), id="max pool"),
        pytest.param({"max_pool": {"kernel": 3, "stride": 2, "ceil": True}}, (4, 4, 4), id="ceil"),
        pytest.param({"avg_pool": 3}, (4, 2, 2), id="avg pool"),
        pytest.param({"adaptive_avg_pool": 3}, (4, 3, 3), id="adaptive"),
        pytest.param({"upsample": {"scale": 2, "mode": "bicubic"}}, (4, 16, 16), id="upsample"),
        pytest.param({"pixel_shuffle": 2}, (1, 16, 16), id="pixel shuffle"),
        pytest.param({"channel_shuffle": 2}, (4, 8, 8), id="channel shuffle"),
        pytest.param({"pad": {"pixels": 1, "mode": "circular"}}, (4, 10, 10), id="pad"),
        pytest.param({"group_norm": 2}, (4, 8, 8), id="group norm"),
        pytest.param("instance_norm", (4, 8, 8), id="instance norm"),
        pytest.param({"lrn": 5}, (4, 8, 8), id="lrn"),
        pytest.param({"dropout2d": 0.1}, (4, 8, 8), id="dropout2d"),
        pytest.param("prelu", (4, 8, 8), id="prelu"),
        pytest.param({"repeat": {"times": 3, "layers": [{"conv": 6}, "relu"]}}, (6, 2, 2), id="repeat"),
        pytest.param({"branches": [[{"conv": {"out": 2, "kernel": 1}}], ["relu"]]}, (6, 8, 8), id="branches"),
        pytest.param({"inception": {"out": [1, 2, 3, 4], "reduce": [1, 1]}}, (10, 8, 8), id="inception"),
        pytest.param({"inception": {"out": [1, 2, 3, 4], "kind": "naive"}}, (10, 8, 8), id="naive inception"),
        pytest.param({"residual": {"layers": [{"conv": {"out": 4, "padding": 1}}]}}, (4, 8, 8), id="residual"),
        pytest.param(
            {"residual": {"layers": [{"conv": {"out": 6, "stride": 2, "padding": 1}}]}}, (6, 4, 4), id="projected"
        ),
        pytest.param(
            {"residual": {"layers": [{"conv": {"out": 6, "stride": 2, "padding": 1}}], "shortcut": "pad"}},
            (6, 4, 4),
            id="padded",
        ),
    ],
)
def test_output_shapes(layer: object, shape: tuple[int, ...]) -> None:
    assert shape_after(layer) == shape


@pytest.mark.parametrize("size", [(40,), (12, 12, 12)])
def test_signals_and_volumes(size: tuple[int, ...]) -> None:
    network = build({"conv": 4}, "batch_norm", "relu", "max_pool", "global_avg_pool", "output", size=size)
    assert network(torch.randn(2, 3, *size)).shape == (2, 10)


def test_depthwise_separable_parameter_count() -> None:
    """3x3 on 16 to 32 channels: 16*9 + 16*32 weights, 704 with biases, against 4,640 (lecture)."""
    layer = {"depthwise_separable": {"out": 32, "norm": "none", "activation": "none"}}
    network = build(layer, {"output": {"kernel": 1}}, channels=16)
    assert count(network.layers[0]) == 16 * 9 + 16 * 32 == 656
    with_bias = build(
        {"depthwise_separable": {"out": 32, "norm": "none", "bias": True}}, "flatten", "output", channels=16
    )
    assert count(with_bias.layers[0]) == 704
    assert count(build({"conv": {"out": 32}}, "flatten", "output", channels=16).layers[0]) == 4640


def test_lrn_equals_the_papers_formula() -> None:
    """b = a / (k + alpha * sum a^2)^beta over 5 channels (Krizhevsky et al. 2012, section 3.3)."""
    lrn = build({"lrn": {"size": 5, "alpha": 0.01}}, "flatten", "output", channels=6, size=(1, 1)).layers[0]
    a = torch.rand(1, 6, 1, 1) * 10
    total = (a[:, :5] ** 2).sum()  # of the channels 2 away from channel 2 at most
    torch.testing.assert_close(lrn(a)[0, 2, 0, 0], a[0, 2, 0, 0] / (2 + 0.01 * total) ** 0.75)


def test_every_layer_has_a_docstring() -> None:
    for word, builder in layer_builders().items():
        assert builder.__doc__, word
