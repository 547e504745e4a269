"""U-Net."""

import pytest
import torch
from torch import nn

from cnntrain.errors import UserError
from cnntrain.models.unet import UNet


def unet(size: tuple[int, int], channels: int = 1, outputs: int = 2, **options: object) -> UNet:
    return UNet(in_channels=channels, num_outputs=outputs, image_size=size, **options)  # type: ignore[arg-type]


def test_published_sizes_and_parameter_count() -> None:
    """Ronneberger et al. 2015, figure 1: 572 px become 388; 23 convolutions, 31,030,658 parameters."""
    with torch.device("meta"):
        network = unet((572, 572), padding="valid")
        assert network(torch.empty(1, 1, 572, 572)).shape == (1, 2, 388, 388)
    assert sum(p.numel() for p in network.parameters()) == 31_030_658
    assert sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in network.modules()) == 23


@pytest.mark.parametrize("upsampling", ["transposed", "nearest", "bilinear", "bicubic", "unpool"])
@pytest.mark.parametrize("size", [(48, 48), (45, 63), (16, 31)])
def test_any_image_size_and_upsampling(upsampling: str, size: tuple[int, int]) -> None:
    network = unet(size, channels=3, width=4, upsampling=upsampling)
    output = network(torch.randn(2, 3, *size))
    assert output.shape == (2, 2, *size)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_translation_equivariance() -> None:
    """With same padding, shifting the image by 16 px shifts the output by 16 px, away from the border."""
    torch.manual_seed(0)
    network = unet((256, 256), width=2, depth=2).eval()
    image = torch.zeros(1, 1, 256, 256)
    image[..., 120:130, 110:125] = 1.0
    with torch.no_grad():
        moved = network(image.roll((16, 16), (2, 3)))
        output = network(image).roll((16, 16), (2, 3))
    torch.testing.assert_close(moved[..., 64:-64, 64:-64], output[..., 64:-64, 64:-64])


def test_errors() -> None:
    with pytest.raises(UserError, match=r"model\.depth=4 with padding=same needs images of at least 16 px, not 12x40"):
        unet((12, 40))
    with pytest.raises(UserError, match="at least 188 px"):
        unet((187, 187), padding="valid")
    with pytest.raises(UserError, match=r"model\.upsampling: 'bilinar' .*did you mean 'bilinear'"):
        unet((64, 64), upsampling="bilinar")
    with torch.device("meta"):
        assert unet((188, 188), padding="valid")(torch.empty(1, 1, 188, 188)).shape == (1, 2, 4, 4)
