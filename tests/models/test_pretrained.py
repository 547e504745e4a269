"""Pretrained weights: finding, reading, adapting and loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cnntrain.errors import UserError
from cnntrain.models import torchvision as from_torchvision
from cnntrain.models.fcn import FCN
from cnntrain.models.pretrained import adapt_first_conv, find_weights, is_inside, load_pretrained
from cnntrain.models.resnet import ResNet

RESNET18 = {"_target_": "cnntrain.models.resnet.ResNet", "depth": 18}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like those that torchvision publishes, for 1000 classes."""
    from torchvision import models

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(models.get_model("resnet18").state_dict(), path)
    return path


def load(model: nn.Module, node: dict[str, Any], pretrained: object, outputs: int = 10) -> tuple[str, ...]:
    weights = find_weights(node, pretrained, dict)
    assert weights is not None
    return load_pretrained(model, weights, num_outputs=outputs)


def resnet18(channels: int, size: int, pretrained: object = None, **options: object) -> ResNet:
    model = ResNet(
        depth=18,
        in_channels=channels,
        num_outputs=10,
        image_size=(size, size),
        **options,  # type: ignore[arg-type]
    )
    if pretrained is not None:
        load(model, RESNET18, pretrained)
    return model


def classifier(name: str, channels: int = 3, size: int = 64, **options: object) -> nn.Module:
    return from_torchvision.classifier(
        name=name,
        in_channels=channels,
        num_outputs=7,
        image_size=(size, size),
        **options,  # type: ignore[arg-type]
    )


def test_gray_images_give_the_same_output_as_in_color(weights: Path) -> None:
    """Summing the filters over colors is exact: the features are the same."""
    images = torch.randn(2, 1, 96, 96)
    answers = []
    for channels in (1, 3):
        network = resnet18(channels, 96, pretrained=str(weights)).eval()
        network.fc = nn.Identity()  # type: ignore[assignment]
        with torch.no_grad():
            answers.append(network(images.expand(-1, channels, -1, -1)))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)


def test_adapted_filters_keep_their_response_to_a_constant() -> None:
    weight = torch.randn(4, 3, 5, 5)
    assert torch.equal(adapt_first_conv(weight, 3), weight)
    assert adapt_first_conv(weight, 6).shape == (4, 6, 5, 5)
    torch.testing.assert_close(adapt_first_conv(weight, 6).sum(1), weight.sum(1))
    assert adapt_first_conv(weight, 4).shape == (4, 4, 5, 5)


def test_a_small_stem_is_initialized_randomly(weights: Path) -> None:
    network = resnet18(3, 32, stem="small")
    assert load(network, RESNET18, str(weights)) == ("conv1", "fc")
    assert torch.equal(network.layer4[1].conv2.weight, torch.load(weights)["layer4.1.conv2.weight"])


def test_weights_of_another_architecture_are_rejected(weights: Path) -> None:
    with pytest.raises(UserError, match=r"model\.pretrained: .* does not fit resnet34"):
        load(
            ResNet(depth=34, in_channels=3, num_outputs=10, image_size=(96, 96)),
            {**RESNET18, "depth": 34},
            str(weights),
        )


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [("IMAGENET1K_V", "did you mean 'IMAGENET1K_V1'"), ("nothere.pth", "no file .*nothere.pth")],
)
def test_unknown_weights(pretrained: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resnet18(3, 96, pretrained=pretrained)


def test_failed_download_suggests_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import ResNet18_Weights

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", unreachable)
    with pytest.raises(UserError, match=r"cannot download https://.*model\.pretrained=FILE\.pth"):
        resnet18(3, 96, pretrained="DEFAULT")


def test_torchvision_classifier_with_weights(weights: Path) -> None:
    network = classifier("resnet18", channels=1)
    node = {"_target_": "cnntrain.models.torchvision.classifier", "name": "resnet18"}
    assert load(network, node, str(weights), outputs=7) == ("fc",)
    state = torch.load(weights)
    assert torch.equal(network.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(network.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])


@pytest.mark.slow
def test_auxiliary_heads_of_the_weights_are_ignored(tmp_path: Path) -> None:
    from torchvision import models

    path = tmp_path / "googlenet.pth"
    torch.save(models.get_model("googlenet", aux_logits=True, init_weights=False).state_dict(), path)
    network = classifier("googlenet")
    load(network, {"_target_": "cnntrain.models.torchvision.classifier", "name": "googlenet"}, str(path), 7)
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_a_backbone_loads_weights_of_a_classifier_and_of_its_own_run(weights: Path, tmp_path: Path) -> None:
    node = {"_target_": "cnntrain.models.fcn.FCN", "backbone": "resnet18"}
    facts: dict[str, Any] = {"in_channels": 3, "num_outputs": 4, "image_size": (64, 64), "stem": "imagenet"}
    network = FCN(**facts)
    assert load(network, node, str(weights), outputs=4) == ("score.0", "score.1", "score.2")
    loaded = torch.load(weights)["layer3.0.conv1.weight"]
    assert torch.equal(network.get_parameter("backbone.layer3.0.conv1.weight"), loaded)
    torch.save(network.state_dict(), tmp_path / "own.pth")
    other = FCN(**facts)
    assert load(other, node, str(tmp_path / "own.pth"), outputs=4) == ()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_a_dense_layer_for_another_map_size_is_initialized_randomly(tmp_path: Path) -> None:
    """Another image size gives a flattened map of another length; the layer's bias is initialized too."""
    for side in (4, 6):
        torch.manual_seed(side)
        model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * side * side, 5), nn.Linear(5, 10))
        if side == 4:
            torch.save(model.state_dict(), tmp_path / "w.pth")
    bias = model[2].bias.clone()
    assert load(model, {"_target_": "mine.Net"}, str(tmp_path / "w.pth")) == ("2",)
    assert torch.equal(model[0].weight, torch.load(tmp_path / "w.pth")["0.weight"])
    assert torch.equal(model[2].bias, bias)


def test_a_file_without_matching_layers_is_rejected(tmp_path: Path) -> None:
    torch.save({"other.weight": torch.zeros(2, 2)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"model\.pretrained"):
        load(nn.Sequential(nn.Linear(3, 10)), {"_target_": "mine.Net"}, str(tmp_path / "w.pth"))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_file_formats_of_state_dicts(wrapper: str | None, ending: str, tmp_path: Path) -> None:
    """With the prefix of DataParallel, inside a checkpoint, and as safetensors."""
    source = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 7, 1))
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    path = tmp_path / f"w.{ending}"
    if ending == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, path)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 1))
    assert load(model, {"_target_": "mine.Net"}, str(path)) == ("1",)
    assert torch.equal(model[0].weight, source[0].weight)


@pytest.mark.parametrize("content", [b"", b"not tensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_safetensors_file_is_rejected(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.safetensors"):
        find_weights(RESNET18, str(tmp_path / "w.safetensors"), dict)


@pytest.mark.parametrize(
    "weight", [torch.zeros(64, 0, 7, 7), torch.zeros(0, 3, 7, 7), torch.zeros(64, 3, 7, 7, dtype=torch.complex64)]
)
def test_empty_or_complex_weights_are_rejected(weight: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({**resnet18(3, 64).state_dict(), "conv1.weight": weight}, path)
    with pytest.raises(UserError, match=r"model\.pretrained"):
        resnet18(1, 64, str(path))


def test_is_inside_compares_whole_names() -> None:
    """`fc_embed` is no part of the head `fc`."""
    assert is_inside("fc", ("fc",)) and is_inside("fc.weight", ("fc",))
    assert is_inside("classifier.3.bias", ("classifier",))
    assert not is_inside("fc_embed.weight", ("fc",)) and not is_inside("classifier_norm", ("classifier",))


def test_a_layer_with_the_heads_prefix_is_not_replaced(tmp_path: Path) -> None:
    class Net(nn.Module):
        head_names = ("fc",)

        def __init__(self, width: int) -> None:
            super().__init__()
            self.fc_embed = nn.Conv1d(4, width, 3)
            self.fc = nn.Linear(width, 10)

    torch.save(Net(5).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="fc_embed"):
        load(Net(6), {"_target_": "mine.Net"}, str(tmp_path / "w.pth"))
