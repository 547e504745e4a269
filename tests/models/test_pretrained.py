"""Other people's weights, and other people's networks."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cnntrain.errors import UserError
from cnntrain.models import timm as from_timm
from cnntrain.models import torchvision as from_torchvision
from cnntrain.models.fcn import FCN
from cnntrain.models.pretrained import adapt_first_conv, find_weights, in_head, load_pretrained
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


def test_a_gray_image_is_answered_like_the_same_image_in_color(weights: Path) -> None:
    """Summing the filters over color is exact: the backbone sees no difference."""
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


def test_a_small_stem_starts_afresh(weights: Path) -> None:
    network = resnet18(3, 32, stem="small")
    assert load(network, RESNET18, str(weights)) == ("conv1", "fc")
    assert torch.equal(network.layer4[1].conv2.weight, torch.load(weights)["layer4.1.conv2.weight"])


def test_weights_of_another_architecture_are_refused(weights: Path) -> None:
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


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import ResNet18_Weights

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", unreachable)
    with pytest.raises(UserError, match=r"cannot download https://.*model\.pretrained=FILE\.pth"):
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
    network = classifier("resnet18", channels=1)
    node = {"_target_": "cnntrain.models.torchvision.classifier", "name": "resnet18"}
    assert load(network, node, str(weights), outputs=7) == ("fc",)
    state = torch.load(weights)
    assert torch.equal(network.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(network.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])


@pytest.mark.slow
def test_auxiliary_heads_of_the_weights_are_left_out(tmp_path: Path) -> None:
    from torchvision import models

    path = tmp_path / "googlenet.pth"
    torch.save(models.get_model("googlenet", aux_logits=True, init_weights=False).state_dict(), path)
    network = classifier("googlenet")
    load(
        network,
        {"_target_": "cnntrain.models.torchvision.classifier", "name": "googlenet"},
        str(path),
        7,
    )
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_a_backbone_takes_the_weights_of_a_classifier_and_of_its_own_run(
    weights: Path, tmp_path: Path
) -> None:
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


def test_a_dense_layer_that_reads_another_size_starts_from_scratch(tmp_path: Path) -> None:
    """What a flattened map of another size feeds; the convolution before it is kept, the bias is new too."""
    for side in (4, 6):
        torch.manual_seed(side)
        model = nn.Sequential(
            nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * side * side, 5), nn.Linear(5, 10)
        )
        if side == 4:
            torch.save(model.state_dict(), tmp_path / "w.pth")
    bias = model[2].bias.clone()
    assert load(model, {"_target_": "mine.Net"}, str(tmp_path / "w.pth")) == ("2",)
    assert torch.equal(model[0].weight, torch.load(tmp_path / "w.pth")["0.weight"])
    assert torch.equal(model[2].bias, bias)


def test_a_file_for_no_layer_is_refused(tmp_path: Path) -> None:
    torch.save({"other.weight": torch.zeros(2, 2)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"model\.pretrained"):
        load(nn.Sequential(nn.Linear(3, 10)), {"_target_": "mine.Net"}, str(tmp_path / "w.pth"))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_ways_to_keep_a_state_dict(wrapper: str | None, ending: str, tmp_path: Path) -> None:
    """As DataParallel names the layers, beside other things, and without pickle."""
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
def test_a_damaged_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.safetensors"):
        find_weights(RESNET18, str(tmp_path / "w.safetensors"), dict)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(64, 0, 7, 7), torch.zeros(0, 3, 7, 7), torch.zeros(64, 3, 7, 7, dtype=torch.complex64)],
)
def test_weights_that_are_empty_or_complex_are_refused(weight: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({**resnet18(3, 64).state_dict(), "conv1.weight": weight}, path)
    with pytest.raises(UserError, match=r"model\.pretrained"):
        resnet18(1, 64, str(path))


def test_a_head_is_known_by_its_whole_name() -> None:
    """`fc_embed` is no part of the head `fc`."""
    assert (
        in_head("fc", ("fc",))
        and in_head("fc.weight", ("fc",))
        and in_head("classifier.3.bias", ("classifier",))
    )
    assert not in_head("fc_embed.weight", ("fc",)) and not in_head("classifier_norm", ("classifier",))


def test_a_layer_whose_name_begins_like_the_heads_is_not_replaced(tmp_path: Path) -> None:
    class Net(nn.Module):
        head_names = ("fc",)

        def __init__(self, width: int) -> None:
            super().__init__()
            self.fc_embed = nn.Conv1d(4, width, 3)
            self.fc = nn.Linear(width, 10)

    torch.save(Net(5).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="fc_embed"):
        load(Net(6), {"_target_": "mine.Net"}, str(tmp_path / "w.pth"))


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


def timm_classifier(name: str, **options: Any) -> nn.Module:
    return from_timm.classifier(
        **{"name": name, "in_channels": 3, "num_outputs": 7, "image_size": (64, 64), **options}
    )


def test_timm() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm_classifier("convnext_atto", in_channels=1)
        assert network(torch.empty(2, 1, 64, 64)).shape == (2, 7)
    assert network.head_names == ("head.fc",)
    with pytest.raises(UserError, match="did you mean 'convnext_atto'"):
        timm_classifier("convnext_ato")


@pytest.mark.parametrize(("channels", "outputs"), [(3, 1000), (3, 7), (1, 7)])
def test_timms_network_from_a_file_for_other_classes(channels: int, outputs: int, tmp_path: Path) -> None:
    """Its features are those of the network of the file; only the head is new, where the classes differ."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    donor = timm.create_model("test_efficientnet", num_classes=1000).eval()
    torch.save(donor.state_dict(), tmp_path / "donor.pth")
    node = {"_target_": "cnntrain.models.timm.classifier", "name": "test_efficientnet"}
    network = timm_classifier("test_efficientnet", in_channels=channels, num_outputs=outputs).eval()
    new = load(network, node, str(tmp_path / "donor.pth"), outputs)
    assert new == (() if outputs == 1000 else ("classifier",))
    images = torch.randn(2, 1, 96, 96)
    with torch.no_grad():
        features = network.forward_features(images.expand(-1, channels, -1, -1))  # type: ignore[operator]
        torch.testing.assert_close(features, donor.forward_features(images.expand(-1, 3, -1, -1)))


def test_timms_own_weights_are_fetched_or_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    donor = timm.create_model("test_efficientnet")
    reachable = True

    def create(name: str, **options: Any) -> nn.Module:
        if not reachable:
            raise OSError("Name or service not known")
        return donor if options.get("pretrained") else create_fresh(name, **options)

    create_fresh = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    node = {"_target_": "cnntrain.models.timm.classifier", "name": "test_efficientnet"}
    network = timm_classifier("test_efficientnet")
    assert load(network, node, True, 7) == ("classifier",)
    assert torch.equal(network.get_parameter("conv_stem.weight"), donor.conv_stem.weight)
    reachable = False
    with pytest.raises(UserError, match=r"model\.pretrained: .*not known.*model\.pretrained=FILE"):
        load(network, node, "DEFAULT", 7)


def test_a_timm_head_of_one_output_starts_small() -> None:
    """timm draws that of an EfficientNet from +-1/sqrt(outputs)."""
    pytest.importorskip("timm")
    head = timm_classifier("test_efficientnet", num_outputs=1).get_classifier()  # type: ignore[operator]
    assert head.weight.abs().max() <= head.in_features**-0.5


def test_real_weights_recognize_photographs(shared_data: Path) -> None:
    """All layers of the published file are taken, and scikit-learn's two photographs get their ImageNet classes."""
    pytest.importorskip("timm")
    from sklearn.datasets import load_sample_images

    name = "tf_efficientnet_lite0"
    node = {"_target_": "cnntrain.models.timm.classifier", "name": name}
    weights = find_weights(node, str(shared_data / "pretrained" / f"{name}.pth"), dict)
    assert weights is not None and weights.preprocessing is not None
    assert (weights.preprocessing.mean, weights.preprocessing.size) == ((0.5, 0.5, 0.5), (224, 224))
    network = timm_classifier(name, num_outputs=1000, image_size=(224, 224)).eval()
    assert load_pretrained(network, weights, num_outputs=1000) == ()
    photographs = torch.stack([torch.tensor(image) for image in load_sample_images().images]).movedim(-1, 1)
    middle = photographs[..., 106:533].float() / 255  # 427 x 427 of 427 x 640
    images = torch.nn.functional.interpolate(middle, (224, 224), mode="bicubic", antialias=True)
    with torch.no_grad():
        assert network((images - 0.5) / 0.5).argmax(1).tolist() == [698, 985]  # palace, daisy


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install cnntrain\[timm\]"):
        from_timm.classifier(name="convnext_atto", in_channels=1, num_outputs=7, image_size=(64, 64))
