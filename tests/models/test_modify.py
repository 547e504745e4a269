"""Modifying a built network: norms, activations, initialization, freezing, deterministic pooling."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from cnntrain.config.schema import ModelSettings
from cnntrain.errors import UserError
from cnntrain.models.cifar_resnet import CifarResNet
from cnntrain.models.modify import (
    apply_model_settings,
    deterministic_adaptive_avg_pool2d,
    freeze_layers,
    initialize,
    initialize_lazy_modules,
    make_pooling_deterministic,
    unfreeze,
)
from cnntrain.models.sequential.parser import Sequential


def network(depth: int = 8) -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(depth=depth, in_channels=3, num_outputs=10, image_size=(32, 32))


def apply(model: nn.Module, **settings: Any) -> nn.Module:
    return apply_model_settings(model, ModelSettings(**settings))


def layer_list(*layers: object) -> Sequential:
    torch.manual_seed(0)
    return Sequential(layers=[*layers, "flatten", "output"], in_channels=3, num_outputs=10, image_size=(32, 32))


def test_defaults_change_nothing() -> None:
    before = network()
    after = apply(network())
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_networks_with_layer_norms_keep_all_their_norms() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm(30))
    with pytest.raises(UserError, match="layer norms"):
        apply(model, norm="group")
    assert isinstance(model[1], nn.BatchNorm2d)


@pytest.mark.parametrize("norm", ["layer", "instance", "group"])
def test_per_image_norms_do_not_depend_on_the_batch(norm: str) -> None:
    model = apply(network(), norm=norm).train()
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=1e-3, atol=1e-4)


def test_swapping_norms_twice_keeps_the_parameter_count() -> None:
    count = sum(p.numel() for p in network().parameters())
    assert sum(p.numel() for p in apply(apply(network(), norm="group"), norm="batch").parameters()) == count


def test_an_activation_with_two_names_is_replaced_under_both() -> None:
    relu = nn.ReLU()
    model = apply(nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu), activation="gelu")
    assert isinstance(model[1], nn.GELU)
    assert model[3] is model[1]


def test_norm_subclasses_that_compute_more_are_rejected() -> None:
    """A class derived from BatchNorm may contain an activation; only those of timm are supported."""

    class NormThenReLU(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).relu()

    with pytest.raises(UserError, match=r"model\.norm=group: NormThenReLU"):
        apply(nn.Sequential(nn.Conv2d(3, 4, 3), NormThenReLU(4)), norm="group")


def test_timm_norms_keep_their_activations() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=3)
    activations = [type(module).__name__ for module in model.modules() if isinstance(module, nn.SiLU)]
    swapped = apply(model, norm="group")
    assert activations == [type(module).__name__ for module in swapped.modules() if isinstance(module, nn.SiLU)]
    assert not [m for m in swapped.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert swapped(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_errors_name_the_key_and_suggest_a_similar_value() -> None:
    with pytest.raises(UserError, match=r"model\.norm: 'bach' .*did you mean 'batch'"):
        apply(network(), norm="bach")
    with pytest.raises(UserError, match=r"model\.activation: 'rellu' .*did you mean 'relu'"):
        apply(network(), activation="rellu")
    with pytest.raises(UserError, match=r"model\.init: 'xaver' .*did you mean 'xavier'"):
        apply(network(), init="xaver")
    with pytest.raises(UserError, match=r"model\.freeze: 'backbon' .*did you mean 'backbone'"):
        apply(network(), freeze="backbon")
    with pytest.raises(UserError, match="no norm to replace"):
        apply(layer_list({"conv": 8}), norm="group")
    with pytest.raises(UserError, match="no activation module"):
        apply(layer_list({"conv": 8}), activation="gelu")
    with pytest.raises(UserError, match="does not define its head"):
        freeze_layers(nn.Sequential(nn.Linear(3, 2)), "backbone")


@pytest.mark.parametrize(("init", "std"), [("he", (2 / 576) ** 0.5), ("xavier", (2 / 1152) ** 0.5)])
def test_initialization(init: str, std: float) -> None:
    """Of a 3x3 convolution from 64 to 64 channels: fan in and fan out are 576."""
    model = layer_list({"conv": 64}, {"conv": 64})
    initialize(model, init)
    conv = model.layers[1]
    assert conv.weight.std().item() == pytest.approx(std, rel=0.02)
    assert not conv.bias.any()


def test_he_initialization_keeps_the_variance() -> None:
    """He et al. 2015, section 2.2: the variance survives the layers; with std 0.01 it dies."""
    sizes = {}
    for init in ("he", "std 0.01"):
        model = layer_list(*[{"conv": {"out": 32, "padding": "same"}}, "relu"] * 10)
        initialize(model, "he")
        for module in model.modules():
            if init == "std 0.01" and isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
        sizes[init] = model.layers[:20](torch.randn(4, 3, 32, 32)).std().item()
    assert 0.1 < sizes["he"] < 10
    assert sizes["std 0.01"] < 1e-6


def test_unknown_initialization() -> None:
    with pytest.raises(UserError, match=r"model\.init: 'lecture'"):
        apply(network(), init="lecture")


def test_initialization_of_pretrained_weights_is_rejected() -> None:
    model = network()
    model.pretrained_from = "somewhere"  # type: ignore[assignment]
    with pytest.raises(UserError, match="pretrained weights"):
        apply(model, init="he")


def test_only_the_head_changes_with_a_frozen_backbone() -> None:
    model = apply(network(), freeze="backbone")
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model.train()
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"fc.weight", "fc.bias"}


def test_copies_stay_frozen_until_unfreeze() -> None:
    model = pickle.loads(pickle.dumps(copy.deepcopy(apply(network(), freeze="backbone"))))
    model.train()
    model(torch.randn(4, 3, 32, 32))
    assert not model.bn1.training
    unfreeze(model)
    before = model.bn1.running_mean.clone()
    model(torch.randn(4, 3, 32, 32))
    assert model.bn1.training
    assert not torch.equal(model.bn1.running_mean, before)
    assert all(p.requires_grad for p in model.parameters())


def test_parameters_frozen_by_the_network_stay_frozen() -> None:
    """In the backbone and in the head, before and after `unfreeze`."""
    model = network()
    own = (model.conv1.weight, model.fc.bias)
    for parameter in own:
        parameter.requires_grad_(False)
    apply(model, freeze="backbone")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["fc.weight"]
    copied = copy.deepcopy(model)
    unfreeze(copied)
    assert [n for n, p in copied.named_parameters() if not p.requires_grad] == ["conv1.weight", "fc.bias"]
    unfreeze(network())  # nothing was frozen, nothing to do


def test_freezing_listed_layers_includes_submodules_and_norms() -> None:
    """`stage1` is no part of `stage10`, and norms in a frozen layer keep their statistics."""
    model = network()
    model.add_module("stage10", nn.Linear(2, 2))
    apply(model, freeze=["stage1", "bn1"])
    still = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert still == {"stage1", "bn1"}
    before = copy.deepcopy(model.state_dict())
    model.train()
    model(torch.randn(4, 3, 32, 32))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not [name for name in changed if name.startswith(("stage1.", "bn1."))]


def test_only_lazy_layers_are_initialized() -> None:
    def lazy(outputs: int = 10) -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(outputs))

    model = lazy()
    initialize_lazy_modules(model, 3, (8, 12))
    assert model.training
    assert [tuple(p.shape) for p in model.parameters()] == [(4, 3, 3, 3), (4,), (4,), (4,), (10, 240), (10,)]
    assert int(model[1].num_batches_tracked) == 0
    other = lazy()
    initialize_lazy_modules(other, 3, (8, 12))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(UserError, match=r"lazy layers .* \(2, 3, 2, 2\): RuntimeError: .*[Kk]ernel"):
        initialize_lazy_modules(lazy(), 3, (2, 2))


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (14, 10), (3, 2), (2, 9), (6, 20), (None, 4), (5, None)])
def test_deterministic_pooling_has_the_values_and_gradients_of_torch(size):
    images = torch.randn(2, 3, 14, 10, dtype=torch.float32)
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    result, expected = (deterministic_adaptive_avg_pool2d(ours, *size), functional.adaptive_avg_pool2d(theirs, size))
    torch.testing.assert_close(result, expected)
    weights = torch.randn_like(expected)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_deterministic_pooling_in_bf16_is_not_biased():
    images = torch.ones(1, 1, 7, 7, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(deterministic_adaptive_avg_pool2d(images, 3, 3), torch.ones(1, 1, 3, 3).bfloat16())


@pytest.mark.parametrize("size", [1, 3, (2, 5), (None, 2)])
def test_a_network_with_deterministic_pooling_keeps_its_parameters_and_outputs(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(size), nn.Flatten()).eval()
    images, names = torch.randn(2, 1, 12, 12), list(model.state_dict())
    expected = model(images)
    make_pooling_deterministic(model)
    assert list(model.state_dict()) == names
    for network in (model, copy.deepcopy(model)):
        torch.testing.assert_close(network(images), expected)
        assert "AdaptiveAvgPool" not in str(network(images).grad_fn.next_functions)
