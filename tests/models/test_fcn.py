"""Fully convolutional networks with a classifier as backbone."""

import pytest
import torch

from cnntrain.errors import UserError
from cnntrain.models.fcn import FCN, last_map_of_each_size
from cnntrain.models.resnet import ResNet
from cnntrain.models.torchvision import classifier


def fcn(backbone: object, size: tuple[int, int] = (64, 64), outputs: int = 5, **options: object) -> FCN:
    return FCN(in_channels=3, num_outputs=outputs, image_size=size, backbone=backbone, **options)  # type: ignore[arg-type]


LAYERS = {"layers": [{"conv": {"out": 8, "padding": "same"}}, "relu", "max_pool", {"conv": 16}, "relu", "max_pool"]}


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet18",
        "cifar_resnet20",
        "mobilenet_v3_small",
        "alexnet",
        "vgg11",
        LAYERS,
        pytest.param("densenet121", marks=pytest.mark.slow),
        pytest.param("googlenet", marks=pytest.mark.slow),
        pytest.param("squeezenet1_1", marks=pytest.mark.slow),
        pytest.param("shufflenet_v2_x1_0", marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_any_classifier_as_backbone(backbone: object) -> None:
    with torch.device("meta"):
        network = fcn(backbone, size=(70, 90))
        assert network(torch.empty(2, 3, 70, 90)).shape == (2, 5, 70, 90)


def test_number_of_scored_maps() -> None:
    """Long et al. 2015, section 4.2: strides 32, 16 and 8; FCN-32s scores one."""
    with torch.device("meta"):
        backbone = ResNet(depth=18, in_channels=3, num_outputs=10, image_size=(224, 224))
        assert last_map_of_each_size(backbone, 3)[-3:] == [("layer2", 128), ("layer3", 256), ("layer4", 512)]
        assert len(fcn("resnet18", size=(224, 224)).score) == 3
        assert len(fcn("resnet18", size=(224, 224), skips=0).score) == 1


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("vgg11", [512, 512, 512]),
        ("mobilenet_v3_small", [96, 288, 576]),  # the widest of a block, past squeeze-and-excitation
        ("squeezenet1_1", [128, 256, 512]),  # its head is a convolution
        ("convnext_tiny", [192, 384, 768]),  # channels last inside its blocks
    ],
)
def test_scored_maps_of_torchvision_classifiers(name: str, channels: list[int]) -> None:
    with torch.device("meta"):
        backbone = classifier(name=name, in_channels=3, num_outputs=10, image_size=(224, 224))
        assert [width for _, width in last_map_of_each_size(backbone, 3)][-3:] == channels


def test_the_head_of_the_backbone_is_removed() -> None:
    network = fcn("resnet18", size=(224, 224))
    assert not any(name.startswith("backbone.fc") for name, _ in network.named_parameters())


def test_every_parameter_gets_a_gradient() -> None:
    network = fcn("cifar_resnet20")
    network(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_errors() -> None:
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        fcn("resnet8")
    with pytest.raises(UserError, match="has no feature map"):
        fcn({"layers": ["flatten", {"linear": 5}]}, size=(8, 8))
    with pytest.raises(UserError, match=r"model\.backbone\.layers\[0\]: unknown layer 'cnov'"):
        fcn({"layers": ["cnov"]})
