"""Plain and residual networks for CIFAR."""

import pytest
import torch
from torch import nn

from cnntrain.errors import UserError
from cnntrain.models.cifar_resnet import CifarResNet


@pytest.mark.parametrize(
    ("depth", "shortcut", "parameters"),
    [
        (20, "none", 269_722),
        (20, "pad", 269_722),
        (56, "none", 853_018),
        (56, "pad", 853_018),
        (110, "none", 1_727_962),
        (110, "pad", 1_727_962),
        (20, "projection", 272_474),
        (56, "projection", 855_770),
    ],
)
def test_published_parameter_counts(depth: int, shortcut: str, parameters: int) -> None:
    """He et al. 2016, table 6 (0.27 M, 0.85 M, 1.7 M), to the digit as torch counts."""
    with torch.device("meta"):
        network = CifarResNet(depth=depth, shortcut=shortcut, in_channels=3, num_outputs=10, image_size=(32, 32))
    assert sum(p.numel() for p in network.parameters()) == parameters
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convs) + 1 == depth


def test_pad_shortcut_subsamples_and_appends_zeros() -> None:
    """Option A keeps every second pixel and fills new channels with zeros."""
    network = CifarResNet(depth=8, shortcut="pad", in_channels=3, num_outputs=10, image_size=(32, 32))
    x = torch.randn(1, 16, 8, 8)
    side = network.stage2[0].shortcut(x)  # type: ignore[operator,union-attr]
    assert torch.equal(side[:, :16], x[:, :, ::2, ::2])
    assert not side[:, 16:].any()


def test_wrong_depth_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="21 is not 6n \\+ 2; the nearest are 20 and 26"):
        CifarResNet(depth=21, in_channels=3, num_outputs=10, image_size=(32, 32))


def test_too_large_depth_is_rejected() -> None:
    with pytest.raises(UserError, match=r"model\.depth"):
        CifarResNet(depth=6 * 10**9 + 2, in_channels=3, num_outputs=2, image_size=(32, 32))
