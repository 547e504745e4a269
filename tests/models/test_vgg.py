"""VGG A to E."""

import pytest
import torch
from torch import nn

from cnntrain.errors import UserError
from cnntrain.models.vgg import VGG


def vgg(configuration: str, size: int = 224, outputs: int = 1000) -> VGG:
    with torch.device("meta"):
        return VGG(configuration=configuration, in_channels=3, num_outputs=outputs, image_size=(size, size))


def kinds(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if not any(m.children())]


@pytest.mark.parametrize(("configuration", "theirs"), [("A", "vgg11"), ("B", "vgg13"), ("D", "vgg16"), ("E", "vgg19")])
def test_layers_have_torchvisions_order_and_shapes(configuration: str, theirs: str) -> None:
    from torchvision import models

    with torch.device("meta"):
        other = models.get_model(theirs, weights=None)
    model = vgg(configuration)
    assert [kind for kind in kinds(model) if kind != "Flatten"] == [
        kind for kind in kinds(other) if kind != "AdaptiveAvgPool2d"
    ]
    assert [p.shape for p in model.parameters()] == [p.shape for p in other.parameters()]


def test_configurations_that_torchvision_lacks() -> None:
    norms = [type(m).__name__ for m in vgg("A-LRN").modules()]
    assert norms.count("LocalResponseNorm") == 1
    kernels = [m.kernel_size for m in vgg("C").modules() if isinstance(m, nn.Conv2d)]
    assert (len(kernels), kernels.count((1, 1))) == (13, 3)


def test_errors() -> None:
    with pytest.raises(UserError, match=r"model\.configuration: 'F'"):
        vgg("F")
    with pytest.raises(UserError, match=r"model\.layers\[\d+\] max_pool"):
        vgg("A", size=31)
