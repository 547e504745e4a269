"""Networks that answer for every pixel: U-Net and the fully convolutional ones."""

import pytest
import torch
from torch import nn

from cnntrain.errors import UserError
from cnntrain.models.fcn import FCN, last_map_of_each_size
from cnntrain.models.resnet import ResNet
from cnntrain.models.torchvision import classifier
from cnntrain.models.unet import UNet


def unet(size: tuple[int, int], channels: int = 1, outputs: int = 2, **options: object) -> UNet:
    return UNet(in_channels=channels, num_outputs=outputs, image_size=size, **options)  # type: ignore[arg-type]


def fcn(backbone: object, size: tuple[int, int] = (64, 64), outputs: int = 5, **options: object) -> FCN:
    return FCN(in_channels=3, num_outputs=outputs, image_size=size, backbone=backbone, **options)  # type: ignore[arg-type]


def test_unet_is_the_papers() -> None:
    """Ronneberger et al. 2015, figure 1: 572 px become 388; 23 convolutions, 31,030,658 parameters."""
    with torch.device("meta"):
        network = unet((572, 572), padding="valid")
        assert network(torch.empty(1, 1, 572, 572)).shape == (1, 2, 388, 388)
    assert sum(p.numel() for p in network.parameters()) == 31_030_658
    assert sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in network.modules()) == 23


@pytest.mark.parametrize("upsampling", ["transposed", "nearest", "bilinear", "bicubic", "unpool"])
@pytest.mark.parametrize("size", [(48, 48), (45, 63), (16, 31)])
def test_unet_takes_any_size(upsampling: str, size: tuple[int, int]) -> None:
    network = unet(size, channels=3, width=4, upsampling=upsampling)
    answer = network(torch.randn(2, 3, *size))
    assert answer.shape == (2, 2, *size)
    answer.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_unet_sees_where_a_pixel_is() -> None:
    """A same-padded U-Net moved by 16 px answers the same, moved by 16 px, away from the border."""
    torch.manual_seed(0)
    network = unet((256, 256), width=2, depth=2).eval()
    image = torch.zeros(1, 1, 256, 256)
    image[..., 120:130, 110:125] = 1.0
    with torch.no_grad():
        moved = network(image.roll((16, 16), (2, 3)))
        answer = network(image).roll((16, 16), (2, 3))
    torch.testing.assert_close(moved[..., 64:-64, 64:-64], answer[..., 64:-64, 64:-64])


def test_unet_errors() -> None:
    with pytest.raises(
        UserError, match=r"model\.depth=4 with padding=same needs images of at least 16 px, not 12x40"
    ):
        unet((12, 40))
    with pytest.raises(UserError, match="at least 188 px"):
        unet((187, 187), padding="valid")
    with pytest.raises(UserError, match=r"model\.upsampling: 'bilinar' .*did you mean 'bilinear'"):
        unet((64, 64), upsampling="bilinar")
    with torch.device("meta"):
        assert unet((188, 188), padding="valid")(torch.empty(1, 1, 188, 188)).shape == (1, 2, 4, 4)


LAYERS = {
    "layers": [{"conv": {"out": 8, "padding": "same"}}, "relu", "max_pool", {"conv": 16}, "relu", "max_pool"]
}


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
def test_fcn_of_any_classifier(backbone: object) -> None:
    with torch.device("meta"):
        network = fcn(backbone, size=(70, 90))
        assert network(torch.empty(2, 3, 70, 90)).shape == (2, 5, 70, 90)


def test_fcn_8s_scores_three_maps() -> None:
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
def test_the_maps_that_are_scored(name: str, channels: list[int]) -> None:
    with torch.device("meta"):
        backbone = classifier(name=name, in_channels=3, num_outputs=10, image_size=(224, 224))
        assert [width for _, width in last_map_of_each_size(backbone, 3)][-3:] == channels


def test_fcn_leaves_the_backbones_head_out() -> None:
    network = fcn("resnet18", size=(224, 224))
    assert not any(name.startswith("backbone.fc") for name, _ in network.named_parameters())


def test_fcn_learns_in_every_parameter() -> None:
    network = fcn("cifar_resnet20")
    network(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_fcn_errors() -> None:
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        fcn("resnet8")
    with pytest.raises(UserError, match="has no feature map"):
        fcn({"layers": ["flatten", {"linear": 5}]}, size=(8, 8))
    with pytest.raises(UserError, match=r"model\.backbone\.layers\[0\]: unknown layer 'cnov'"):
        fcn({"layers": ["cnov"]})
