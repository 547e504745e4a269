"""Rows and totals of a summary: the lectures' AlexNet, conventions of counting, sums."""

import pytest
import torch
from torch import Tensor, nn

from cnntrain.errors import UserError
from cnntrain.summary.layer_table import ModelSummary, Row, summarize


def row(summary: ModelSummary, name: str) -> Row:
    (found,) = (each for each in summary.rows if each.name == name)
    return found


@pytest.fixture(scope="module")
def alexnet() -> ModelSummary:
    from torchvision import models

    return summarize(lambda: models.alexnet(weights=None), (3, 227, 227), "alexnet")


def test_alexnet_memory(alexnet: ModelSummary) -> None:
    """Lecture, AlexNet's memory in KB, layer by layer; 2,375 with average pool and flatten."""
    kib = [r.activations_kib for r in alexnet.rows if r.kind in ("Conv2d", "MaxPool2d", "Linear")]
    assert [round(value) for value in kib[:-1]] == [784, 182, 547, 127, 254, 169, 169, 36, 16, 16]
    assert round(kib[-1], 1) == 3.9
    assert round(alexnet.activations_kib) == 2375


def test_alexnet_multiply_adds(alexnet: ModelSummary) -> None:
    """Lecture, AlexNet's multiply-adds in millions; torchvision's first map is 56x56 at 227 px."""
    millions = [row.multiply_adds / 1e6 for row in alexnet.rows if row.multiply_adds]
    assert [round(value, 1) for value in millions] == [72.9, 223.9, 112.1, 149.5, 99.7, 37.7, 16.8, 4.1]
    assert round(alexnet.multiply_adds / 1e6, 1) == 716.8
    assert row(alexnet, "features.0").output_shape == (64, 56, 56)


def test_alexnet_parameters(alexnet: ModelSummary) -> None:
    """Lecture: 96 % of AlexNet's parameters are in its dense layers."""
    dense = sum(row.parameters for row in alexnet.rows if row.kind == "Linear")
    assert alexnet.parameters() == 61_100_840
    assert round(dense / alexnet.parameters(), 2) == 0.96


def test_totals_are_the_sums_of_the_rows(alexnet: ModelSummary) -> None:
    assert alexnet.parameters() == sum(row.parameters for row in alexnet.rows)
    assert alexnet.multiply_adds == sum(row.multiply_adds for row in alexnet.rows)
    assert alexnet.activations_kib == sum(row.activations_kib for row in alexnet.rows)
    assert len({row.name for row in alexnet.rows}) == len(alexnet.rows)


def test_notation(alexnet: ModelSummary) -> None:
    assert row(alexnet, "features.0").notation == "C64 K11 P2 S4"
    net = nn.Conv2d(4, 8, (3, 1), padding="same", dilation=2, groups=4, padding_mode="reflect")
    assert summarize(nn.Sequential(net), (4, 9, 9)).rows[0].notation == "C8 K3x1 P2x0 S1 D2 G4"


class Shared(nn.Module):
    """A convolution used twice, a head not used in validation, a parameter outside of layers, and a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.auxiliary = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        return self.relu(self.conv(x)) + x * self.scale


def test_rows_of_repeated_unused_and_functional_layers() -> None:
    """A layer used twice has two rows and is counted once; unused modules and loose parameters have rows too."""
    net = Shared()
    summary = summarize(net, (4, 8, 8))
    names = "conv norm relu conv#2 relu#2 mul add auxiliary.0 auxiliary.1"
    assert [row.name for row in summary.rows] == names.split()
    assert row(summary, "conv#2").parameters == 0
    assert row(summary, "conv#2").multiply_adds == row(summary, "conv").multiply_adds > 0
    assert row(summary, "mul").parameters == 4
    assert [row.ran for row in summary.rows[-2:]] == [False, False]
    assert summary.parameters() == sum(p.numel() for p in net.parameters())
    statistics = sum(b.numel() for b in net.buffers() if b.is_floating_point())
    assert summary.parameters("keras") == summary.parameters() + statistics


def test_folded_parameters_equal_those_of_torchs_fusion() -> None:
    """Fusion removes the norm and adds a bias to the convolution; a norm after an activation stays."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    conv, norm, late = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    summary = summarize(nn.Sequential(conv, norm, nn.ReLU(), late), (3, 9, 9))
    fused = fuse_conv_bn_eval(conv.eval(), norm.eval())
    left = sum(p.numel() for p in fused.parameters()) + sum(p.numel() for p in late.parameters())
    assert summary.parameters("folded") == left
    assert summary.parameters("keras") == summary.parameters() + 32


def test_in_place_layers_take_no_memory() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Dropout(), nn.ReLU())
    assert [row.activations_kib for row in summarize(net, (1, 10, 10)).rows] == [1.0, 0.0, 0.0, 1.0]


def test_large_networks_are_summarized_in_seconds() -> None:
    """19 layers, 143,667,240 parameters (Simonyan and Zisserman 2015, table 2), without drawing a weight."""
    import time

    from torchvision import models

    start = time.perf_counter()
    summary = summarize(lambda: models.vgg19(weights=None), (3, 224, 224))
    assert (summary.parameters(), summary.depth) == (143_667_240, 19)
    assert time.perf_counter() - start < 3  # a second on a quiet machine


def test_error_of_a_network_that_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"model\.1 Conv2d\(4 -> 4, K9 P0 S1\): \(6 - 9 \+ 2\*0\)/1 \+ 1 < 1"):
        summarize(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 9)), (1, 8, 8))


def test_signals_and_volumes() -> None:
    line = summarize(nn.Sequential(nn.Conv1d(1, 2, 5, stride=2), nn.MaxPool1d(2)), (1, 33))
    assert line.receptive_field == (7,)
    block = summarize(nn.Sequential(nn.Conv3d(1, 2, 3), nn.Conv3d(2, 2, 3)), (1, 9, 9, 9))
    assert (block.receptive_field, block.rows[1].multiply_adds) == ((5, 5, 5), 125 * 2 * 2 * 27)
