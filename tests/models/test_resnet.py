"""ResNets have torchvision's weights and outputs; the stem fits small images."""

import logging

import pytest
import torch
from torch import nn

from cnntrain.errors import UserError
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
def test_outputs_equal_torchvisions(depth: int) -> None:
    from torchvision import models

    torch.manual_seed(0)
    theirs = models.get_model(f"resnet{depth}", num_classes=10).eval()
    ours = resnet(depth, stem="imagenet").eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("depth", [18, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (34, 50, 101, 152))])
def test_initial_weights_equal_torchvisions(depth: int) -> None:
    """The same seed gives the same weights: modules are built and initialized in the same order."""
    from torchvision import models

    torch.manual_seed(0)
    theirs = models.get_model(f"resnet{depth}", num_classes=10).state_dict()
    torch.manual_seed(0)
    ours = resnet(depth, stem="imagenet").state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(("size", "stem"), [(28, "small"), (64, "small"), (65, "imagenet"), (224, "imagenet")])
def test_auto_stem_depends_on_the_image_size_and_is_logged(
    size: int, stem: str, caplog: pytest.LogCaptureFixture
) -> None:
    log_stem.cache_clear()
    with caplog.at_level(logging.INFO, "cnntrain"), torch.device("meta"):
        network = resnet(18, size)
    assert network.stem == stem
    assert f"model.stem=auto: {stem}" in caplog.text
    assert network.conv1.kernel_size == ((3, 3) if stem == "small" else (7, 7))


def test_small_stem_keeps_a_larger_last_map() -> None:
    """For 28 px, the last map of the ImageNet stem has 1x1 positions, that of the small stem 4x4."""
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
