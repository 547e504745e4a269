"""Warnings about the design of networks that run."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from cnntrain.summary.preflight import preflight


def torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    from torchvision import models

    return lambda: models.get_model(name, weights=None, **options)


def names(net: nn.Module, channels: int = 1, size: int = 32, batch_size: int = 16) -> list[str]:
    return [finding.name for finding in preflight(net, channels, (size, size), batch_size=batch_size)]


def head(width: int) -> list[nn.Module]:
    return [nn.ReLU(), nn.Flatten(), nn.Linear(width, 10)]


WARNED = {
    "unread rows": nn.Sequential(nn.Conv2d(1, 4, 5, stride=3), nn.ReLU(), nn.MaxPool2d(4), *head(16)),
    "no activation between convolutions": nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3), *head(3600)),
    "softmax before cross-entropy": nn.Sequential(nn.Conv2d(1, 4, 3), *head(3600), nn.Softmax(1)),
    "bias before BatchNorm": nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), *head(3600)),
    "small receptive field": nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.Conv2d(4, 10, 1)),
    "even kernel with 'same'": nn.Sequential(nn.Conv2d(1, 4, 4, padding="same"), *head(4096)),
    "large first layer": nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.MaxPool2d(8), nn.Conv2d(64, 4, 3), *head(16)),
}


def test_a_global_pool_combines_positions() -> None:
    pooled = [nn.Conv2d(1, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)]
    assert names(nn.Sequential(*pooled)) == []


@pytest.mark.parametrize("name", WARNED)
def test_each_warning(name: str) -> None:
    assert names(WARNED[name]) == [name]


def test_batch_norm_on_1x1_maps_with_few_images() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 32, bias=False), nn.BatchNorm2d(4), *head(4))
    assert names(net, batch_size=2) == ["BatchNorm on 1x1 maps"]
    assert names(net, batch_size=64) == []


def test_unread_rows_are_counted() -> None:
    """(out-1)*S + D*(K-1) + 1 - P < W: 5x5 with stride 3 on 33 px reads 32 of them."""
    (finding,) = preflight(nn.Sequential(nn.Conv2d(1, 4, 5, stride=3), *head(400)), 1, (33, 33))
    assert "1 of 33 rows" in finding.evidence


def test_strided_shortcuts_and_separable_convolutions_give_no_warning() -> None:
    """Strided 1x1 shortcuts skip rows by design; a separable convolution has no activation between its two parts."""
    net = nn.Sequential(nn.Conv2d(2, 2, 1, stride=2), nn.ReLU(), nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 4, 1))
    assert names(nn.Sequential(net, *head(784)), 2) == []


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16"])
def test_known_networks_give_no_warning(name: str) -> None:
    assert preflight(torchvision(name), 3, (224, 224), (1000,), 32) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["googlenet", "densenet121", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "swin_t"]
)
def test_other_known_networks_give_no_warning(name: str) -> None:
    options = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    assert preflight(torchvision(name, **options), 3, (224, 224), (1000,), 32) == []
