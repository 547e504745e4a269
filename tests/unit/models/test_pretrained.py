"""Other people's weights, and other people's networks."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cnntrain.errors import UserError
from cnntrain.models import from_timm, from_torchvision
from cnntrain.models.pretrained import adapt_first_conv
from cnntrain.models.resnet import ResNet


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like those that torchvision publishes, for 1000 classes."""
    from torchvision import models

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(models.get_model("resnet18").state_dict(), path)
    return path


def resnet18(channels: int, size: int, **options: object) -> ResNet:
    return ResNet(
        depth=18,
        in_channels=channels,
        num_outputs=10,
        image_size=(size, size),
        **options,  # type: ignore[arg-type]
    )


def test_a_grey_image_is_answered_like_the_same_image_in_colour(weights: Path) -> None:
    """Summing the filters over colour is exact: the backbone sees no difference."""
    images = torch.randn(2, 1, 96, 96)
    answers = []
    for channels in (1, 3):
        network = resnet18(channels, 96, pretrained=str(weights)).eval()
        network.fc = nn.Identity()  # type: ignore[assignment]
        with torch.no_grad():
            answers.append(network(images.expand(-1, channels, -1, -1)))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)


def test_filters_for_other_channels_keep_their_answer_to_a_constant() -> None:
    weight = torch.randn(4, 3, 5, 5)
    assert torch.equal(adapt_first_conv(weight, 3), weight)
    assert adapt_first_conv(weight, 6).shape == (4, 6, 5, 5)
    torch.testing.assert_close(adapt_first_conv(weight, 6).sum(1), weight.sum(1))
    assert adapt_first_conv(weight, 4).shape == (4, 4, 5, 5)


def test_a_small_stem_starts_afresh(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "cnntrain"):
        network = resnet18(3, 32, pretrained=str(weights))
    assert "new from scratch: conv1, fc" in caplog.text
    assert torch.equal(network.layer4[1].conv2.weight, torch.load(weights)["layer4.1.conv2.weight"])


def test_weights_of_another_architecture_are_refused(weights: Path) -> None:
    with pytest.raises(UserError, match=r"model\.pretrained: .* does not fit resnet34"):
        ResNet(depth=34, in_channels=3, num_outputs=10, image_size=(96, 96), pretrained=str(weights))


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [("IMAGENET1K_V", "did you mean 'IMAGENET1K_V1'"), ("nothere.pth", "no file .*nothere.pth")],
)
def test_unknown_weights(pretrained: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resnet18(3, 96, pretrained=pretrained)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import ResNet18_Weights

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", unreachable)
    with pytest.raises(UserError, match=r"could not fetch https://.*model\.pretrained=FILE\.pth"):
        resnet18(3, 96, pretrained="DEFAULT")


def classifier(name: str, channels: int = 3, size: int = 64, **options: object) -> nn.Module:
    return from_torchvision.classifier(
        name=name,
        in_channels=channels,
        num_outputs=7,
        image_size=(size, size),
        **options,  # type: ignore[arg-type]
    )


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
def test_torchvision_by_name(name: str, head: str, size: int) -> None:
    with torch.device("meta"):
        network = classifier(name, channels=2, size=size)
        assert network.head_names == (head,)
        assert network(torch.empty(2, 2, size, size)).shape == (2, 7)  # a plain tensor, in training too


def test_torchvision_pretrained(weights: Path) -> None:
    network = classifier("resnet18", channels=1, pretrained=str(weights))
    state = torch.load(weights)
    assert torch.equal(network.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(network.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])


@pytest.mark.slow
def test_auxiliary_heads_of_the_weights_are_left_out(tmp_path: Path) -> None:
    from torchvision import models

    path = tmp_path / "googlenet.pth"
    torch.save(models.get_model("googlenet", aux_logits=True, init_weights=False).state_dict(), path)
    network = classifier("googlenet", pretrained=str(path))
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_misspelt_names() -> None:
    with pytest.raises(UserError, match=r"model\.name: .*'mobilenetv2'; did you mean 'mobilenet_v2'\?"):
        classifier("mobilenetv2")
    with pytest.raises(
        UserError, match=r"no segmentation model 'fcn_resnet5'; did you mean 'fcn_resnet50'\?"
    ):
        from_torchvision.Segmenter(name="fcn_resnet5", in_channels=3, num_outputs=2, image_size=(64, 64))


@pytest.mark.parametrize(
    "name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]
)
def test_torchvision_segmentation(name: str) -> None:
    with torch.device("meta"):
        network = from_torchvision.Segmenter(name=name, in_channels=1, num_outputs=4, image_size=(64, 80))
        assert network(torch.empty(2, 1, 64, 80)).shape == (2, 4, 64, 80)


def test_timm() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        network = from_timm.classifier(
            name="convnext_atto", in_channels=1, num_outputs=7, image_size=(64, 64)
        )
        assert network(torch.empty(2, 1, 64, 64)).shape == (2, 7)
    assert network.head_names == ("head.fc",)
    with pytest.raises(UserError, match="did you mean 'convnext_atto'"):
        from_timm.classifier(name="convnext_ato", in_channels=1, num_outputs=7, image_size=(64, 64))


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install cnntrain\[timm\]"):
        from_timm.classifier(name="convnext_atto", in_channels=1, num_outputs=7, image_size=(64, 64))
