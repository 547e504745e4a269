"""Receptive fields: the support of gradients, the lecture's table, and published numbers."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from cnntrain.models.norm_act import ChannelShuffle
from cnntrain.summary.layer_table import summarize
from cnntrain.summary.receptive_field import ReceptiveInterval, transposed_window, window
from cnntrain.summary.trace import as_meta, meta_images, trace_run


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Concatenation(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)[:, ::2]


class Function(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "every second row":
            return x[:, :, 1::2]
        if self.name == "pad":
            return functional.pad(x, (2, 1, 0, 3))
        if self.name == "functional pool":
            return functional.avg_pool2d(x, 3, 2, 1)
        if self.name == "transpose twice":
            return (x.transpose(2, 3) * 2).transpose(2, 3)
        return x


class ChannelsLastLinear(nn.Module):
    """A dense layer on every pixel, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_BORDER = 20  # pixels: nearer to it, cropped and padded maps inside the network make the support smaller


def conv(kernel: int, **options: int) -> nn.Module:
    return nn.Conv2d(2, 2, kernel, bias=False, **options)  # type: ignore[arg-type]


BUILDERS = {
    "conv3": lambda: conv(3),
    "conv3 same": lambda: conv(3, padding=1),
    "conv5 stride 2": lambda: conv(5, stride=2, padding=2),
    "conv2 stride 2": lambda: conv(2, stride=2),
    "dilated": lambda: conv(3, dilation=3, padding=3),
    "even same": lambda: nn.Conv2d(2, 2, 4, padding="same", bias=False),
    "oblong": lambda: nn.Conv2d(2, 2, (1, 5), stride=(2, 1), bias=False),
    "shortcut": lambda: conv(1, stride=2),
    "transposed": lambda: nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, bias=False),
    "transposed 4": lambda: nn.ConvTranspose2d(2, 2, 4, stride=2, padding=1, bias=False),
    "pool": lambda: nn.AvgPool2d(2),
    "pool3": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "bilinear to 15": lambda: nn.Upsample(size=15, mode="bilinear", align_corners=True),
    "residual": lambda: Residual(nn.Sequential(conv(3, padding=1), nn.Softplus(), conv(3, padding=1))),
    "inception": lambda: Concatenation(conv(1), nn.Sequential(conv(1), conv(5, padding=2))),
    "adaptive": lambda: nn.AdaptiveAvgPool2d(7),
    "pixel shuffle": lambda: nn.Sequential(nn.Conv2d(2, 8, 1, bias=False), nn.PixelShuffle(2)),
    **{
        name: (lambda name=name: Function(name))
        for name in ("every second row", "pad", "functional pool", "transpose twice")
    },
    "dense on every pixel": ChannelsLastLinear,
    "channel shuffle": lambda: ChannelShuffle(2),
}


def support(net: nn.Module, size: tuple[int, int], position: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the first and last pixel per axis on which the output at `position` depends."""
    x = torch.rand(1, 2, *size, dtype=torch.float64, requires_grad=True)
    net(x)[0, :, position[0], position[1]].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(0) > 0
    return [
        (int(line.nonzero().min()), int(line.nonzero().max())) if line.any() else (0, -1)
        for line in (seen.any(1), seen.any(0))
    ]


def positive(net: nn.Module) -> nn.Module:
    """Make all weights positive, so that no two paths cancel."""
    with torch.no_grad():
        for p in net.double().parameters():
            p.uniform_(0.1, 0.5)
    return net


@settings(max_examples=25, deadline=None)
@given(names=st.lists(st.sampled_from(sorted(BUILDERS)), min_size=1, max_size=5), data=st.data())
def test_receptive_field_is_the_support_of_the_gradient(names: list[str], data: st.DataObject) -> None:
    """For random networks with branches, at a random position, on both axes."""
    torch.manual_seed(0)
    size = (60, 66)
    net = positive(nn.Sequential(*(BUILDERS[name]() for name in names)))
    try:
        shape = net(torch.zeros(1, 2, *size, dtype=torch.float64)).shape[2:]
    except RuntimeError:
        return  # too small for its layers
    if shape.numel() > 10_000:
        return
    trace, _ = trace_run(as_meta(net), meta_images(2, size))
    axes = trace.calls[0].axes
    assert axes is not None
    position = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    found = support(net, size, position)  # type: ignore[arg-type]
    for axis, side, place, (first, last) in zip(axes, size, position, found, strict=True):
        assert axis.kind in ("along", "fixed")
        low, high = axis.interval.at(place if axis.kind == "along" else 0)
        if first <= last:
            assert low <= first
            assert last <= high
        if low >= _BORDER and high < side - _BORDER:
            assert (first, last) == (low, high)


def _reads(before: Callable[[int], set[int]], numbers: tuple[bool, int, int, int, int], o: int) -> set[int]:
    """Return the pixels that output o reads, computed tap by tap from the previous layer's."""
    up, kernel, stride, padding, dilation = numbers
    if up:
        places = [o + padding - dilation * k for k in range(kernel)]
        taps = [place // stride for place in places if place % stride == 0]
    else:
        taps = [o * stride - padding + dilation * k for k in range(kernel)]
    return {pixel for tap in taps for pixel in before(tap)}


@given(
    layers=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 3)), max_size=4),
    ups=st.lists(st.booleans(), min_size=4, max_size=4),
    position=st.integers(-20, 20),
)
def test_interval_is_the_hull_of_the_taps(
    layers: list[tuple[int, int, int, int]], ups: list[bool], position: int
) -> None:
    """For any sequence of windows and transposed windows, compared with brute force over taps."""
    interval = ReceptiveInterval()
    reads: Callable[[int], set[int]] = lambda i: {i}  # noqa: E731
    for (kernel, stride, padding, dilation), up in zip(layers, ups, strict=False):
        make = transposed_window if up else window
        interval = make(kernel, stride, padding, dilation)(interval)
        reads = partial(_reads, reads, (up, kernel, stride, padding, dilation))
    pixels = reads(position)
    low, high = interval.at(position)
    assert (low, high) == (min(pixels), max(pixels)) if pixels else low > high


def test_lecture_table() -> None:
    """conv 7 stride 2 pad 3, norm, relu, max-pool 3 stride 2 pad 1 on 256 px, as computed by hand."""
    net = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    rows = summarize(net, (3, 256, 256)).rows
    assert [row.output_shape[1] for row in rows] == [128, 128, 128, 64]
    assert [row.start for row in rows] == [(0.5, 0.5)] * 4
    assert [row.jump for row in rows] == [(2, 2), (2, 2), (2, 2), (4, 4)]
    assert [row.receptive_field for row in rows] == [(7, 7), (7, 7), (7, 7), (11, 11)]


def test_two_3x3_have_the_field_of_one_5x5() -> None:
    """VGG's argument (Simonyan and Zisserman 2015, 2.3): 18C^2 weights, not 25C^2, for the same field."""
    twice = summarize(nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False)), (8, 32, 32))
    once = summarize(nn.Sequential(nn.Conv2d(8, 8, 5, bias=False)), (8, 32, 32))
    assert twice.receptive_field == once.receptive_field == (5, 5)
    assert (twice.parameters(), once.parameters()) == (18 * 64, 25 * 64)


PUBLISHED = {"alexnet": 195, "vgg16": 212, "vgg19": 268, "resnet18": 435, "resnet34": 899, "resnet50": 427}


PUBLISHED_SLOW = {"resnet101": 971, "googlenet": 379, "mobilenet_v2": 491, "densenet121": 2071}


@pytest.mark.parametrize(
    ("name", "field"),
    [*PUBLISHED.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in PUBLISHED_SLOW.items())],
)
def test_published_fields(name: str, field: int) -> None:
    """Of the last feature map at 224 px (Araujo et al., Distill 2019, for torchvision's strides)."""
    from torchvision import models

    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    summary = summarize(lambda: models.get_model(name, weights=None, **options), (3, 224, 224))
    assert summary.receptive_field == (field, field)
    assert summary.unfollowed == []


def test_squeeze_and_excitation_keeps_the_local_field() -> None:
    """The map keeps its local field, and one path sees the whole image."""

    class Squeeze(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.mean((2, 3), keepdim=True).sigmoid()

    row = summarize(nn.Sequential(nn.Conv2d(3, 4, 5), Squeeze()), (3, 40, 40)).rows[-1]
    assert (row.receptive_field, row.local_field, row.whole) == ((40, 40), (5, 5), True)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_have_the_field_of_zero_padding(mode: str) -> None:
    """The padding mode does not move the windows; wrapped pixels count as pixels beyond the border."""
    net = nn.Sequential(nn.Conv2d(3, 4, 5, stride=2, padding=2, padding_mode=mode), nn.Conv2d(4, 4, 3))
    first, second = summarize(net, (3, 20, 20)).rows
    assert (first.receptive_field, first.start, second.receptive_field) == ((5, 5), (0.5, 0.5), (9, 9))
    assert (first.notation, second.jump) == ("C4 K5 P2 S2", (2, 2))


def test_a_dense_layer_reads_only_rows_that_windows_read() -> None:
    """A dense layer does not see rows that no window reads."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, stride=4), nn.Flatten(), nn.Linear(8, 10))
    assert summarize(net, (1, 10, 10)).rows[-1].receptive_field == (7, 7)


def test_unknown_operations_are_listed() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft2(x).real

    summary = summarize(nn.Sequential(nn.Conv2d(3, 4, 3), Turned()), (3, 16, 16))
    assert summary.rows[-1].receptive_field is None
    assert any("1: " in place for place in summary.unfollowed)
    assert any("fft" in place for place in summary.uncounted)


class Patches(nn.Module):
    """Cut a map into patches, as in vision transformers."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return (x.view(n, c, h // 2, 2, w // 2, 2) * 2).mean((3, 5))


class Attention(nn.Module):
    """Product of activations at every pair of positions."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        return ((tokens.mT @ tokens).softmax(-1) @ tokens.mT).mT.view(x.shape)


@pytest.mark.parametrize("module", [Patches(), Attention()])
def test_fields_through_other_views_and_attention_are_unknown(module: nn.Module) -> None:
    summary = summarize(nn.Sequential(nn.Conv2d(3, 4, 3), module, nn.Conv2d(4, 4, 3)), (3, 18, 18))
    assert (summary.rows[0].receptive_field, summary.rows[-1].receptive_field) == ((3, 3), None)
    assert summary.receptive_field is None
    assert summary.unfollowed
