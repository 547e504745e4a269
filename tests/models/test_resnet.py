"""ResNets: torchvision's, key by key; and a stem for small images."""

import logging

import pytest
import torch
from torch import nn

from cnntrain.errors import UserError
from cnntrain.models.cifar_resnet import CifarResNet
from cnntrain.models.resnet import ResNet, log_stem


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def resnet(depth: int, size: int = 64, channels: int = 3, outputs: int = 10, **options: object) -> ResNet:
    return ResNet(
        depth=depth,
        in_channels=channels,
        num_outputs=outputs,
        image_size=(size, size),
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("depth", [18, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (34, 50))])
def test_answers_as_torchvisions_does_with_the_same_state(depth: int) -> None:
    from torchvision import models

    torch.manual_seed(0)
    theirs = models.get_model(f"resnet{depth}", num_classes=10).eval()
    ours = resnet(depth, stem="imagenet").eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize(
    "depth", [18, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (34, 50, 101, 152))]
)
def test_starts_as_torchvisions_does(depth: int) -> None:
    """The same seed draws the same weights: the modules are made, and initialized, in the same order."""
    from torchvision import models

    torch.manual_seed(0)
    theirs = models.get_model(f"resnet{depth}", num_classes=10).state_dict()
    torch.manual_seed(0)
    ours = resnet(depth, stem="imagenet").state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("size", "stem"), [(28, "small"), (64, "small"), (65, "imagenet"), (224, "imagenet")]
)
def test_auto_stem_goes_by_the_images_size_and_says_so(
    size: int, stem: str, caplog: pytest.LogCaptureFixture
) -> None:
    log_stem.cache_clear()
    with caplog.at_level(logging.INFO, "cnntrain"), torch.device("meta"):
        network = resnet(18, size)
    assert network.stem == stem
    assert f"model.stem=auto: {stem}" in caplog.text
    assert network.conv1.kernel_size == ((3, 3) if stem == "small" else (7, 7))


def test_small_stem_keeps_a_map_for_small_images() -> None:
    """The ImageNet stem leaves one pixel of 28, the small one four by four."""
    with torch.device("meta"):
        sizes = []
        for stem in ("imagenet", "small"):
            network = resnet(18, 28, channels=1, stem=stem)
            network.layer4.register_forward_hook(lambda module, inputs, out: sizes.append(out.shape[-1]))
            network(torch.empty(2, 1, 28, 28))
    assert sizes == [1, 4]


def test_zero_init_makes_every_block_the_identity() -> None:
    network = resnet(18, zero_init_last_norm=True).eval()
    x = torch.rand(1, 64, 8, 8)  # positive, as after a ReLU
    assert torch.equal(network.layer1(x), x)


def test_misspelt_stem_and_unknown_depth() -> None:
    with pytest.raises(UserError, match=r"model\.stem: 'smal'.*did you mean 'small'"):
        resnet(18, stem="smal")
    with pytest.raises(UserError, match=r"model\.depth: 19"):
        resnet(19)


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
def test_cifar_counts(depth: int, shortcut: str, parameters: int) -> None:
    """He et al. 2016, table 6 (0.27 M, 0.85 M, 1.7 M), to the digit as torch counts."""
    with torch.device("meta"):
        network = CifarResNet(
            depth=depth, shortcut=shortcut, in_channels=3, num_outputs=10, image_size=(32, 32)
        )
    assert count(network) == parameters
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convs) + 1 == depth


def test_cifar_shortcut_without_parameters() -> None:
    """Option A: every second pixel, the new channels zero."""
    network = CifarResNet(depth=8, shortcut="pad", in_channels=3, num_outputs=10, image_size=(32, 32))
    x = torch.randn(1, 16, 8, 8)
    side = network.stage2[0].shortcut(x)  # type: ignore[operator,union-attr]
    assert torch.equal(side[:, :16], x[:, :, ::2, ::2])
    assert not side[:, 16:].any()


def test_cifar_depth_names_its_neighbors() -> None:
    with pytest.raises(UserError, match="21 is not 6n \\+ 2; the nearest are 20 and 26"):
        CifarResNet(depth=21, in_channels=3, num_outputs=10, image_size=(32, 32))
