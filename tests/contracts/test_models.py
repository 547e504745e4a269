"""Contract of every network in conf/model: shapes, gradients, state dict, freezing; new files are included."""

import copy
import importlib
from collections.abc import Iterator

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from cnntrain.config.schema import ModelSettings
from cnntrain.errors import UserError
from cnntrain.models.modify import apply_model_settings, freeze_layers
from cnntrain.train.optim import layers_of
from tests.contracts.networks import COSTLY, FOLDER, MASKS, NAMES, SMALLEST_PX, header

# Each other network takes at least a second.
QUICK = (
    *("mlp", "lenet5", "lenet5_1998", "batchnorm_cnn", "fmnist_cnn", "sequential"),
    *("cifar_plain", "cifar_resnet", "resnet18", "torchvision", "unet_small"),
)


def build(name: str, channels: int, outputs: int, size: tuple[int, int], *overrides: str) -> nn.Module:
    common, own = OmegaConf.load(FOLDER.parent / "config.yaml").model, OmegaConf.load(FOLDER / f"{name}.yaml")
    config = OmegaConf.create({"model": OmegaConf.merge(common, own, OmegaConf.from_dotlist(list(overrides)))})
    node = OmegaConf.to_container(config, resolve=True)["model"]
    node.pop("defaults", None)
    common = {key: node.pop(key) for key in ("norm", "activation", "init", "freeze", "unfreeze")}
    node.pop("pretrained")
    module, _, attribute = node.pop("_target_").rpartition(".")
    target = getattr(importlib.import_module(module), attribute)
    if name == "timm":
        pytest.importorskip("timm")
    model = target(in_channels=channels, num_outputs=outputs, image_size=size, **node)
    return apply_model_settings(model, ModelSettings(**common))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


DEEP = ("densenet121", "densenet161", "densenet169", "densenet201", "resnet101", "resnet152", "timm", "xception")


def mark(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.long,) if name in COSTLY else () if name in QUICK else (pytest.mark.slow,)


MARKED = [pytest.param(name, marks=mark(name)) for name in NAMES]


def expected_shape(name: str, images: int, outputs: int, size: tuple[int, int]) -> tuple[int, ...]:
    return (images, outputs, *size) if name in MASKS else (images, outputs)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads are slower for maps this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in DEEP else ()) for n in NAMES])
def test_parameters_and_output_shape_at_the_native_size(name: str) -> None:
    native = header(name)
    with torch.device("meta"):
        model = build(name, native.channels, native.outputs, native.size)
        outputs = model.eval()(torch.empty(2, native.channels, *native.size))
    assert count(model) == native.parameters
    assert outputs.shape == expected_shape(name, 2, native.outputs, native.size)


@pytest.mark.parametrize("channels", [1, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", MARKED)
def test_gradients_at_a_small_size(name: str, channels: int) -> None:
    check_gradients(name, channels, (SMALLEST_PX.get(name, 8),) * 2, images=4)


@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in COSTLY else ()) for name in NAMES]
)
def test_gradients_at_the_native_size(name: str, channels: int) -> None:
    size = header(name).size
    check_gradients(name, channels, (188, 188) if name == "unet" else size, images=2)


def check_gradients(name: str, channels: int, size: tuple[int, int], images: int) -> None:
    """Check the output shape, and that every parameter has a finite gradient that is not zero."""
    torch.manual_seed(0)
    outputs = 3
    model = build(name, channels, outputs, size)
    for module in model.modules():  # a block initialized as the identity has no gradient
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.ones_(module.weight)
    output = model(torch.randn(images, channels, *size))
    assert output.shape == expected_shape(name, images, outputs, size)
    (output * torch.randn_like(output)).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALLEST_PX))
def test_images_one_pixel_below_the_smallest_size_are_rejected(name: str) -> None:
    size = (SMALLEST_PX[name] - 1,) * 2
    with pytest.raises((UserError, RuntimeError)), torch.device("meta"):
        build(name, 1, 3, size)(torch.empty(2, 1, *size))


@pytest.mark.parametrize("name", MARKED)
def test_state_dict_round_trip_and_memory_formats(name: str) -> None:
    """A second instance with the same state has the same output, also in channels last; bf16 outputs are finite."""
    size = (SMALLEST_PX.get(name, 8),) * 2
    torch.manual_seed(0)
    first, second = build(name, 3, 3, size).eval(), build(name, 3, 3, size).eval()
    second.load_state_dict(first.state_dict())
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        output = first(images)
        assert torch.equal(second(images), output)
        last = first.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.testing.assert_close(
            last(images.contiguous(memory_format=torch.channels_last)), output, rtol=1e-3, atol=1e-4
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert first(images).isfinite().all()


@pytest.mark.parametrize("name", MARKED)
def test_a_frozen_backbone_leaves_the_head_trainable(name: str) -> None:
    size = (SMALLEST_PX.get(name, 8),) * 2
    with torch.device("meta"):
        model = build(name, 3, 3, size)
    freeze_layers(model, "backbone")
    heads = [model.get_submodule(head) for head in model.head_names]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < trainable == sum(count(head) for head in heads) < count(model)
    copy.deepcopy(model)


@pytest.mark.parametrize("name", MARKED)
def test_layers_contain_every_parameter_once_and_end_with_the_head(name: str) -> None:
    """`optimizer.layer_decay` depends on these layers."""
    size = (SMALLEST_PX.get(name, 8),) * 2
    with torch.device("meta"):
        model = build(name, 3, 3, size)
    layers = layers_of(model)
    ids = [id(parameter) for layer in layers for parameter in layer]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in model.parameters()}
    heads = [model.get_submodule(head) for head in model.head_names]
    assert {id(p) for p in layers[-1]} == {id(p) for head in heads for p in head.parameters()}
    assert len(layers) > 1


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "layer", "instance", "group", "none"])
@pytest.mark.parametrize("name", ["fmnist_cnn", "resnet18", "cifar_resnet", "googlenet", "mobilenet_v1", "densenet121"])
def test_other_norms(name: str, norm: str) -> None:
    size = (64, 64)
    with torch.device("meta"):
        model = build(name, 3, 10, size, f"norm={norm}", "activation=gelu")
        assert model(torch.empty(2, 3, *size)).shape == (2, 10)
    kinds = {type(module).__name__ for module in model.modules()}
    assert (norm == "batch") == any(kind.startswith("BatchNorm") for kind in kinds)
    assert "GELU" in kinds
    assert "ReLU" not in kinds


def test_alexnet_in_two_groups() -> None:
    """Lecture: 60,965,224 parameters with two groups, as in the paper."""
    with torch.device("meta"):
        assert count(build("alexnet", 3, 1000, (227, 227), "values.groups=2")) == 60_965_224


def test_googlenet_parameters() -> None:
    """With biases in place of norms 6,998,552 (Szegedy et al. 2015, table 1); the naive module is wider."""
    with torch.device("meta"):
        model = build("googlenet", 3, 1000, (224, 224))
        naive = build("googlenet", 3, 1000, (224, 224), "values.inception=naive")
        assert naive(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    norms = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert count(model) - norms == 6_998_552
    assert count(naive) > 10 * count(model)


@pytest.mark.parametrize(
    ("name", "statistics", "keras"),
    [
        ("fmnist_cnn", 1408, 1_679_082),
        ("batchnorm_cnn", 448, 1_200_778),
        ("mobilenet_v1", 21_888, 4_253_864),
        ("xception", 54_528, 22_910_480),
    ],
)
def test_parameters_with_running_statistics(name: str, statistics: int, keras: int) -> None:
    """The lecture's table and keras.io/api/applications count BatchNorm's running mean and variance too."""
    native = header(name)
    with torch.device("meta"):
        model = build(name, native.channels, native.outputs, native.size)
    running = sum(buffer.numel() for key, buffer in model.named_buffers() if "running" in key)
    assert running == statistics
    assert count(model) + running == keras


def test_dogs_cats_parameters_by_layer() -> None:
    """The lecture's table, row by row."""
    rows = [896, 18496, 73856, 147584, 295168, 1180160, 2359808, 2359808, 16777728, 513]
    with torch.device("meta"):
        model = build("dogs_cats_cnn", 3, 1, (150, 150))
    assert [count(m) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))] == rows
