"""Multiply-adds: the lectures' arithmetic, torch's counter, torchvision's published numbers."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cnntrain.models.sequential.parser import Sequential
from cnntrain.summary.layer_table import summarize
from cnntrain.summary.trace import as_meta, meta_images


def conv(ins: int, outs: int, kernel: int, **options: Any) -> nn.Module:
    return nn.Conv2d(ins, outs, kernel, padding=kernel // 2, **options)


def cost(net: nn.Module, *shape: int) -> int:
    return summarize(net, shape).multiply_adds


def test_ten_5x5_filters() -> None:
    """Lecture: ten 5x5 filters on 3x32x32, padded by 2: 760 parameters, 32*32*10*75 = 768,000."""
    summary = summarize(conv(3, 10, 5), (3, 32, 32))
    assert (summary.multiply_adds, summary.parameters()) == (768_000, 760)


def test_convolution_and_dense_layer_of_the_same_size() -> None:
    """Lecture: 16 -> 32 channels of 64x64: 4,640 parameters (3x3 convolution) or 8,590,065,664 (dense layer)."""
    assert summarize(nn.Conv2d(16, 32, 3), (16, 66, 66)).parameters() == 4_640
    with torch.device("meta"):
        dense = nn.Sequential(nn.Flatten(), nn.Linear(16 * 64 * 64, 32 * 64 * 64))
    assert summarize(dense, (16, 64, 64)).parameters() == 8_590_065_664


def test_1x1_reduction_before_a_5x5_convolution() -> None:
    """GoogLeNet's 5x5 branch in module 3a (Szegedy et al. 2015, table 1): 192 -> 16 -> 32 channels."""
    direct = cost(conv(192, 32, 5), 192, 28, 28)
    reduced = cost(nn.Sequential(conv(192, 16, 1), conv(16, 32, 5)), 192, 28, 28)
    assert (direct, reduced) == (120_422_400, 12_443_648)


def test_inception_example() -> None:
    """Lecture, Inception: 471,040,000 multiply-adds directly, 40,960,000 by way of a 1x1 convolution.

    Both numbers come from 92 filters of 5x5 on 32x32x200, "same", and a reduction to 16 channels: 32*32*92*5*5*200, and
    32*32*16*200 + 32*32*92*5*5*16. (One convolution and a reduction to fewer channels than go in and come out give both
    only so, or with the map's sides doubled or halved and every width halved or doubled.)
    """
    five = {"conv": {"out": 92, "kernel": 5, "padding": "same"}}
    one = {"conv": {"out": 16, "kernel": 1}}
    costs = []
    for layers in ([five], [one, five]):
        with torch.device("meta"):
            net = Sequential(
                layers=[*layers, {"output": {"kernel": 1}}], in_channels=200, num_outputs=1, image_size=(32, 32)
            )
        rows = summarize(net, (200, 32, 32)).rows
        costs.append([row.multiply_adds for row in rows[:-1]])
    assert costs == [[471_040_000], [3_276_800, 37_683_200]]
    assert sum(costs[1]) == 40_960_000


def test_depthwise_separable() -> None:
    """Lecture: 256 filters of 5x5 on 12x12x3: 1,228,800; depthwise and then 1x1: 4,800 + 49,152 = 53,952."""
    full = nn.Conv2d(3, 256, 5)
    separable = nn.Sequential(nn.Conv2d(3, 3, 5, groups=3), nn.Conv2d(3, 256, 1))
    assert cost(full, 3, 12, 12) == 1_228_800
    assert [row.multiply_adds for row in summarize(separable, (3, 12, 12)).rows] == [4_800, 49_152]


def test_mobilenet_unit() -> None:
    """Lecture: 16 -> 32 channels need 4,640 parameters with a 3x3 convolution, 688 with depthwise 3x3 and then 1x1."""
    full = summarize(conv(16, 32, 3), (16, 8, 8)).parameters()
    unit = nn.Sequential(conv(16, 16, 3, groups=16, bias=False), nn.Conv2d(16, 32, 1))
    assert (full, summarize(unit, (16, 8, 8)).parameters()) == (4_640, 688)


class Functional(nn.Module):
    """Weights and operations outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 4))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.up = nn.ConvTranspose2d(3, 4, 3, 2, groups=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("oc,nchw->nohw", self.weight, self.up(x)).flatten(2).transpose(1, 2)
        return (self.attention(y, y, y)[0] + y) @ self.weight


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    transposed=st.booleans(),
    bias=st.booleans(),
)
def test_multiply_adds_are_half_of_torchs_flops(
    kernel: int, stride: int, groups: int, transposed: bool, bias: bool
) -> None:
    """torch.utils.flop_counter counts two operations per multiply-add; for convolutions of every kind."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    agree(kind(4, 8, kernel, stride, groups=groups, bias=bias), 4, 13)


def agree(net: nn.Module, channels: int, size: int) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        as_meta(net).eval()(meta_images(channels, (size, size)))
    assert cost(net, channels, size, size) * 2 == counter.get_total_flops()


def test_functional_operations_are_counted() -> None:
    """Residual adds have a row, matrix products are counted, parameters outside of layers are found."""
    net = Functional()
    agree(net, 3, 9)
    summary = summarize(net, (3, 9, 9))
    assert summary.parameters() == sum(p.numel() for p in net.parameters())
    assert {"add", "matmul", "matmul#2"} <= {row.name for row in summary.rows}
    assert summary.uncounted == []


_NAMES = """
    alexnet densenet121 efficientnet_b0 googlenet inception_v3 mnasnet1_0 mobilenet_v2 mobilenet_v3_small regnet_y_400mf
    resnet18 resnext50_32x4d shufflenet_v2_x1_0 squeezenet1_1 swin_t vgg16 vit_b_16 wide_resnet50_2 convnext_tiny
    maxvit_t
"""
CLASSIFIERS = _NAMES.split()


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_published_numbers_of_torchvision(name: str) -> None:
    """Parameters are exact, multiply-adds agree with the rounded number there and with torch's counter."""
    agrees_with_torchvision(name)


@pytest.mark.long
def test_published_numbers_of_all_other_classifiers() -> None:
    from torchvision import models

    others = [name for name in models.list_models(module=models) if name not in CLASSIFIERS]
    assert len(others) > 50
    for name in others:
        agrees_with_torchvision(name)


def agrees_with_torchvision(name: str) -> None:
    from torchvision import models

    weights = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    published, crop = weights.meta, weights.transforms().crop_size[0]
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name == "googlenet":
        options["aux_logits"] = False
    if name.startswith("vit"):
        options["image_size"] = crop
    net = as_meta(lambda: models.get_model(name, weights=None, **options))
    summary = summarize(net, (3, crop, crop))
    assert summary.parameters() == published["num_params"], name
    agree(net, 3, crop)
    assert summary.multiply_adds / 1e9 == pytest.approx(published["_ops"], abs=1e-3), name
