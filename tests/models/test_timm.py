"""Networks of timm and their weights."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cnntrain.errors import UserError
from cnntrain.models import timm as from_timm
from cnntrain.models.pretrained import find_weights, load_pretrained


def load(model: nn.Module, node: dict[str, Any], pretrained: object, outputs: int = 10) -> tuple[str, ...]:
    weights = find_weights(node, pretrained, dict)
    assert weights is not None
    return load_pretrained(model, weights, num_outputs=outputs)


def timm_classifier(name: str, **options: Any) -> nn.Module:
    return from_timm.classifier(**{"name": name, "in_channels": 3, "num_outputs": 7, "image_size": (64, 64), **options})


def test_classifier() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm_classifier("convnext_atto", in_channels=1)
        assert network(torch.empty(2, 1, 64, 64)).shape == (2, 7)
    assert network.head_names == ("head.fc",)
    with pytest.raises(UserError, match="did you mean 'convnext_atto'"):
        timm_classifier("convnext_ato")


@pytest.mark.parametrize(("channels", "outputs"), [(3, 1000), (3, 7), (1, 7)])
def test_weights_from_a_file_for_other_classes(channels: int, outputs: int, tmp_path: Path) -> None:
    """The features equal those of the saved network; the head is new only if the number of classes differs."""
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


def test_published_weights_are_downloaded_or_the_error_suggests_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_head_with_one_output_has_small_weights() -> None:
    """timm initializes the head of an EfficientNet in +-1/sqrt(outputs)."""
    pytest.importorskip("timm")
    head = timm_classifier("test_efficientnet", num_outputs=1).get_classifier()  # type: ignore[operator]
    assert head.weight.abs().max() <= head.in_features**-0.5


def test_real_weights_recognize_photographs(shared_data: Path) -> None:
    """All layers of the file are loaded, and scikit-learn's two photographs get their ImageNet classes."""
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
