"""Networks of torchvision, adapted to the data and the task."""

import pytest
import torch

from cnntrain.errors import UserError
from cnntrain.models import torchvision as from_torchvision
from tests.models.test_pretrained import classifier


@pytest.mark.parametrize(
    ("name", "head", "size"),
    [
        ("resnet18", "fc", 64),
        ("vgg11", "classifier.6", 64),
        ("squeezenet1_1", "classifier.1", 64),
        ("mobilenet_v3_large", "classifier.3", 64),
        ("googlenet", "fc", 64),
        ("inception_v3", "fc", 96),
        ("vit_b_16", "heads.head", 64),
        ("convnext_tiny", "classifier.2", 64),
        ("swin_t", "head", 64),
    ],
)
def test_classifiers_have_a_head_and_return_a_tensor(name: str, head: str, size: int) -> None:
    with torch.device("meta"):
        network = classifier(name, channels=2, size=size)
        assert network.head_names == (head,)
        assert network(torch.empty(2, 2, size, size)).shape == (2, 7)  # a plain tensor, in training too


def test_unknown_names_suggest_a_similar_one() -> None:
    with pytest.raises(UserError, match=r"model\.name: .*'mobilenetv2'; did you mean 'mobilenet_v2'\?"):
        classifier("mobilenetv2")
    with pytest.raises(UserError, match=r"no segmentation model 'fcn_resnet5'; did you mean 'fcn_resnet50'\?"):
        from_torchvision.Segmenter(name="fcn_resnet5", in_channels=3, num_outputs=2, image_size=(64, 64))


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_segmentation_models_return_maps(name: str) -> None:
    with torch.device("meta"):
        network = from_torchvision.Segmenter(name=name, in_channels=1, num_outputs=4, image_size=(64, 80))
        assert network(torch.empty(2, 1, 64, 80)).shape == (2, 4, 64, 80)
