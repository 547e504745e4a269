"""Pre-flight: its verdict is that of torch, and it finds the smallest image size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cnntrain.summary.preflight import preflight
from cnntrain.types import Finding


def layer(kind: str, size: int, stride: int, width: int, padding: int) -> nn.Module:
    if kind == "conv":
        return nn.Conv2d(width, 2, size, stride, padding)
    if kind == "max pool":
        return nn.MaxPool2d(size, stride, min(padding, size // 2))
    if kind == "average pool":
        return nn.AvgPool2d(size, stride, min(padding, size // 2))
    if kind == "transposed":
        return nn.ConvTranspose2d(width, 2, size, stride, padding)
    if kind == "norm":
        return nn.BatchNorm2d(width)
    if kind == "flatten":
        return nn.Flatten()
    return nn.Linear(8 * width, 2)


LAYERS = st.tuples(
    st.sampled_from(["conv", "max pool", "average pool", "transposed", "norm", "flatten", "linear"]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([2, 2, 2, 2, 3]),
    st.integers(0, 2),
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(specs=st.lists(LAYERS, min_size=1, max_size=6), size=st.integers(1, 14), batch_size=st.integers(1, 2))
def test_the_verdict_is_that_of_torch(specs: list[tuple[Any, ...]], size: int, batch_size: int) -> None:
    """For random layer lists: it names the layer at which torch fails; otherwise it has the shape of torch's output."""
    net = nn.Sequential(*(layer(*spec) for spec in specs))
    value, failed = torch.rand(batch_size, 2, size, size), None
    for i, module in enumerate(net):
        try:
            value = module(value)
        except (RuntimeError, ValueError, IndexError):
            failed = i
            break
        if value.numel() == 0:  # a transposed convolution that crops all of its output
            failed = i
            break
    right = preflight(net, 2, (size, size), tuple(value.shape[1:]), batch_size=batch_size)
    if failed is None:
        assert all(finding.verdict == "WARN" for finding in right)
        wrong = preflight(net, 2, (size, size), (*value.shape[1:], 7), batch_size=batch_size)
        assert [finding.verdict for finding in wrong] == ["FAIL"]
    else:
        (finding,) = right
        assert finding.verdict == "FAIL"
        assert finding.evidence.startswith(f"model.{failed} {type(net[failed]).__name__}")


def torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    from torchvision import models

    return lambda: models.get_model(name, weights=None, **options)


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    assert (finding.name, finding.verdict) == ("preflight", "FAIL")
    assert finding.remedy
    return finding


def test_alexnet_on_28_px() -> None:
    """The message has the layer, its input, the arithmetic, and the smallest valid size, 63 px."""
    finding = only(preflight(torchvision("alexnet"), 3, (28, 28)))
    assert "model.features.5 MaxPool2d(K3 P0 S2): (2 - 3 + 2*0)/2 + 1 < 1" in finding.evidence
    assert "its input is 192x2x2" in finding.evidence
    assert "images are 28x28 px" in finding.evidence
    assert "alexnet needs at least 63 px" in finding.evidence
    assert "data.size=63" in finding.remedy
    assert preflight(torchvision("alexnet"), 3, (63, 63)) == []


def test_vgg_on_8_px() -> None:
    finding = only(preflight(torchvision("vgg11"), 3, (8, 8)))
    assert "model.features.15 MaxPool2d" in finding.evidence
    assert "at least 32 px" in finding.evidence


def test_image_size_and_width_for_a_wrong_dense_layer() -> None:
    """The message has the image size that fits the layer, and the number of inputs that fits the image size."""
    net = nn.Sequential(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1152, 10))
    finding = only(preflight(net, 1, (32, 32)))
    assert "model.4 Linear(1152 -> 10): needs in_features=1152, but gets 1568" in finding.evidence
    assert "exactly 28 px" in finding.evidence
    assert "in_features=1568" in finding.remedy


class Reduces(nn.Module):
    """A convolution with `width` channels, a reduction to a vector, and a dense layer."""

    def __init__(self, width: int, reduce: Callable[[Tensor], Tensor], features: int, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, width, 3, padding=1), nn.Linear(features, classes)
        self.reduce = reduce

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.reduce(self.conv(x)))


@pytest.mark.parametrize("width", [8, 12, 16])
@pytest.mark.parametrize(
    "reduce",
    [
        lambda x: x.mean((1, 2)),
        lambda x: x.mean((1, 3)),
        lambda x: x.mean(1).flatten(1),
        lambda x: x.amax((1, 2)),
        lambda x: x.mean((1, 2)) + 0,
    ],
    ids=["columns", "rows", "pixels", "columns by maximum", "and an addition"],
)
def test_a_size_that_fits_by_coincidence_is_not_suggested(reduce: Callable[[Tensor], Tensor], width: int) -> None:
    """An average over channels leaves positions; one image size has as many as the dense layer has inputs."""
    finding = only(preflight(Reduces(width, reduce, width), 1, (28, 28), (10,)))
    assert "data.size" not in finding.remedy and "exactly" not in finding.evidence
    assert "mean((2, 3))" in finding.remedy and "in_features" not in finding.remedy


def test_a_size_with_a_wrong_output_is_not_suggested() -> None:
    """view(-1, 64) moves pixels into the batch dimension: it runs at 8 px, but mixes images."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), Views(), nn.Linear(64, 10))
    finding = only(preflight(net, 1, (30, 30), (10,)))
    assert "data.size" not in finding.remedy


class Views(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 64)


@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize("classes", [2, 10])
def test_a_size_that_fits_is_suggested(width: int, classes: int) -> None:
    net = Reduces(width, lambda x: x.flatten(1), width * 16 * 16, classes)
    finding = only(preflight(net, 1, (28, 28), (classes,)))
    assert "exactly 16 px" in finding.evidence and "data.size=16" in finding.remedy


def test_wrong_output() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    assert preflight(net, 1, (28, 28), (10,)) == []
    assert "(N, 10); the task needs one tensor (N, 7)" in only(preflight(net, 1, (28, 28), (7,))).evidence
    flat = only(preflight(net, 1, (28, 28), (10, None, None)))
    assert "needs one tensor (N, 10, height, width)" in flat.evidence and "unet_small" in flat.remedy

    class Many(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": x, "aux": x}

    assert "a dict with out, aux" in only(preflight(Many(), 1, (28, 28), (1, 28, 28))).evidence


def test_the_network_is_not_changed() -> None:
    """Neither weights, statistics, mode nor hooks change, and the builder is called on the meta device."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    preflight(net, 1, (28, 28))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in net.modules())
    devices = []
    preflight(lambda: devices.append(torch.empty(1).device.type) or nn.Conv2d(1, 1, 3), 1, (8, 8))
    assert devices == ["meta"]


def test_a_network_that_reads_values_is_skipped() -> None:
    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    (finding,) = preflight(Looks(), 1, (8, 8))
    assert finding.verdict == "SKIP"


def test_lazy_layers() -> None:
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    assert preflight(net, 1, (28, 28), (10,)) == []
    assert "model.0 Conv2d" in only(preflight(net, 1, (2, 2))).evidence


def test_smallest_size_of_a_network_with_lazy_layers() -> None:
    """A trial must not fix the shapes of lazy layers for the next one."""
    net = nn.Sequential(nn.LazyConv2d(4, 9), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    assert "at least 9 px" in only(preflight(net, 1, (4, 4), (10,))).evidence
