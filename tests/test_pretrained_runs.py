"""Effects of `model.pretrained` in a run: stem, image size, normalization, head, and frozen layers."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from cnntrain import compose, train
from cnntrain.checks.lint import lint
from cnntrain.cli import main
from cnntrain.errors import UserError
from cnntrain.train import checkpoint
from cnntrain.train.prepare import resolve_plan
from cnntrain.train.setup import Components, build_components

QUICK = (
    "log.figures=false",
    "log.tensorboard=false",
    "threads=1",
    "device=cpu",
    "epochs=1",
    "batch_size=16",
)
FREEZE = "model.freeze=backbone"


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in torchvision's format, for 1000 classes."""
    from torchvision import models

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(models.get_model("resnet18").state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """Return data.root of an image folder with 2 classes of 12 images."""
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        folder = tmp_path / "photos" / "train" / name
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return f"data.root={tmp_path / 'photos'}"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function that trains on digits, cached by overrides."""
    runs: dict[tuple[str, ...], str] = {}

    def run(*overrides: str) -> str:
        if overrides not in runs:
            folder = tmp_path_factory.mktemp("digits") / "run"
            train(compose("data=digits", "data.limit=64", *QUICK, *overrides, f"run_dir={folder}"))
            runs[overrides] = str(folder)
        return runs[overrides]

    return run


def best_weights(run: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(Path(run) / "checkpoints" / "best.pt")["state"]["model"]


def last_weights(run: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(Path(run) / "checkpoints" / "last.pt")["state"]["model"]


def trainable_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def lint_keys(components: Components) -> list[str]:
    """Return the config keys of lint's findings."""
    data = components.load()
    plan = resolve_plan(components, data)
    return [key for finding in lint(components, data, plan, "") for key in finding.keys]


def test_imagenet_weights_set_stem_size_and_normalization(resnet: Path, photos: str) -> None:
    """Images of 64 px would otherwise get a random 3x3 stem, which `model.freeze` would freeze."""
    components = build_components(
        compose("model=resnet18", f"model.pretrained={resnet}", FREEZE, "data=image_folder", photos)
    )
    assert components.spec.image_size == (224, 224)
    assert components.spec.mean == (0.485, 0.456, 0.406) and components.spec.std == (0.229, 0.224, 0.225)
    assert torch.equal(components.model.get_parameter("conv1.weight"), torch.load(resnet)["conv1.weight"])
    assert trainable_names(components.model) == ["fc.weight", "fc.bias"]


def test_explicit_settings_override_those_of_the_weights(resnet: Path, photos: str) -> None:
    explicit = ("data.size=64", "data.mean=[0.1,0.2,0.3]", "data.std=[0.5,0.5,0.5]")
    components = build_components(
        compose("model=resnet18", f"model.pretrained={resnet}", "data=image_folder", photos, *explicit)
    )
    assert components.spec.image_size == (64, 64) and components.spec.mean == (0.1, 0.2, 0.3)
    assert components.settings.model["stem"] == "imagenet"
    assert "data.mean" in lint_keys(components)


@pytest.mark.parametrize(("size", "warns"), [(32, True), (64, False)])
def test_images_much_smaller_than_in_pretraining_are_warned_about(
    size: int, warns: bool, resnet: Path, photos: str
) -> None:
    settings = ("model=resnet18", f"model.pretrained={resnet}", "data=image_folder", photos, "batch_size=8")
    assert ("data.size" in lint_keys(build_components(compose(*settings, f"data.size={size}")))) == warns


def test_a_high_learning_rate_is_accepted_for_the_head_alone(resnet: Path, photos: str) -> None:
    settings = ("model=resnet18", f"model.pretrained={resnet}", "data=image_folder", photos, "batch_size=8")
    high_rate = (*settings, "optimizer.lr=0.02")
    assert "optimizer.lr" in lint_keys(build_components(compose(*high_rate)))
    assert "optimizer.lr" in lint_keys(build_components(compose(*high_rate, FREEZE, "model.unfreeze=2")))
    assert "optimizer.lr" not in lint_keys(build_components(compose(*high_rate, FREEZE)))


def test_without_pretrained_weights_size_and_normalization_follow_the_dataset(photos: str) -> None:
    components = build_components(compose("data=image_folder", photos))
    assert components.spec.image_size == (64, 64) and components.spec.mean is None


def test_randomly_initialized_layers_cannot_be_frozen(resnet: Path, photos: str) -> None:
    small = ("model=resnet18", "model.stem=small", f"model.pretrained={resnet}", "data=image_folder", photos)
    with pytest.raises(UserError, match=r"model\.freeze: conv1 "):
        build_components(compose(*small, FREEZE))
    with pytest.raises(UserError, match=r"model\.freeze: fc "):
        build_components(compose(*small, "model.freeze=[layer1,fc]"))
    model = build_components(compose(*small, "model.freeze=[layer1,layer2]")).model
    assert {"conv1.weight", "fc.weight", "layer3.0.conv1.weight"} < set(trainable_names(model))
    assert not [name for name in trainable_names(model) if name.startswith(("layer1.", "layer2."))]


def test_a_frozen_random_backbone_is_warned_about_with_parameter_counts(
    resnet: Path, photos: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "cnntrain"):
        build_components(compose("model=resnet18", "data=digits", FREEZE))
    assert "5,130 of 11,172,810" in caplog.text and "model.pretrained" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "cnntrain"):
        build_components(compose("model=resnet18", f"model.pretrained={resnet}", FREEZE, "data=image_folder", photos))
    assert "513 of 11,177,025" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_norms_and_initialization_that_would_replace_weights_are_refused(resnet: Path, photos: str) -> None:
    settings = ("model=resnet18", f"model.pretrained={resnet}", "data=image_folder", photos)
    for key, value in (("model.norm", "group"), ("model.init", "he")):
        with pytest.raises(UserError, match=key.replace(".", r"\.")):
            build_components(compose(*settings, f"{key}={value}"))


def test_timm_weights_set_normalization_and_are_not_reinitialized(photos: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    name = "test_efficientnet"
    torch.save(timm.create_model(name).state_dict(), tmp_path / "w.pth")
    settings = (
        "model=timm",
        f"model.name={name}",
        f"model.pretrained={tmp_path / 'w.pth'}",
        "data=image_folder",
        photos,
    )
    config = timm.get_pretrained_cfg(name)
    components = build_components(compose(*settings, FREEZE))
    assert components.spec.mean == tuple(config.mean) and components.spec.std == tuple(config.std)
    assert components.spec.image_size == config.input_size[1:]
    assert trainable_names(components.model) == ["classifier.weight", "classifier.bias"]
    for extra in ("model.init=he", "model.norm=group"):
        with pytest.raises(UserError, match=r"model\.(init|norm)"):
            build_components(compose(*settings, extra))
    assert "data.mean" in lint_keys(
        build_components(compose(*settings, "data.mean=[0.2,0.2,0.2]", "data.std=[0.1,0.1,0.1]"))
    )
    assert lint_keys(build_components(compose(*settings, "batch_size=8"))) == []


def test_resume_and_evaluate_do_not_need_the_pretrained_file(resnet: Path, photos: str, tmp_path: Path) -> None:
    """Stem, size and normalization are stored in the checkpoint's config."""
    file = tmp_path / "copy.pth"
    shutil.copy(resnet, file)
    settings = ("model=resnet18", f"model.pretrained={file}", FREEZE, "data=image_folder", photos, *QUICK)
    train(compose(*settings, "data.size=32", "run_dir=run"))
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["model"]["stem"] == "imagenet" and config["data"]["mean"] == [0.485, 0.456, 0.406]
    file.unlink()
    assert main(["evaluate", "checkpoint=run", "split=val"]) == 0
    before = last_weights("run")
    train(compose(*settings, "data.size=32", "run_dir=run", "resume=auto", "epochs=2"))
    after = last_weights("run")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}
    assert checkpoint.load(Path("run/checkpoints/last.pt"))["spec"]["mean"] == (0.485, 0.456, 0.406)


def test_fine_tuning_on_other_classes(digits: Callable[..., str], photos: str) -> None:
    """Frozen layers keep their bits, including the statistics of norms; the head is new although its shape fits."""
    frozen = ("layers.0", "layers.3", "layers.4")  # conv, norm, relu, conv, norm, ...
    conv = "{conv: {out: 4, kernel: 3}}"
    layers = f"[{conv}, relu, {{max_pool: 2}}, {conv}, batch_norm, flatten, output]"
    net = ("model=sequential", f"model.layers={layers}")
    run = digits(*net, "task.label_smoothing=0.1")
    settings = (*net, f"model.pretrained={run}", "model.freeze=[layers.0,layers.3,layers.4]", *QUICK)
    folder = ("data=image_folder", photos, "data.channels=1")
    components = build_components(compose(*settings, *folder))
    assert components.spec.image_size == (8, 8)
    train(compose(*settings, *folder, "optimizer.weight_decay=0.1", "run_dir=fine"))
    before, after = best_weights(run), last_weights("fine")
    unchanged = [name for name in before if name.startswith(tuple(f"{layer}." for layer in frozen))]
    assert "layers.4.running_mean" in unchanged and "layers.4.num_batches_tracked" in unchanged
    assert all(torch.equal(before[name], after[name]) for name in unchanged)


def test_the_head_is_loaded_only_for_the_same_classes(digits: Callable[..., str], photos: str, tmp_path: Path) -> None:
    run = digits("model=mlp")
    same = build_components(compose("model=mlp", "data=digits", f"model.pretrained={run}")).model
    head = same.head_names[0]
    assert torch.equal(same.get_parameter(f"{head}.weight").detach(), best_weights(run)[f"{head}.weight"])
    for i in range(10):
        shutil.copytree(tmp_path / "photos" / "train" / "cat", tmp_path / "ten" / "train" / f"class{i}")
    folder = ("data=image_folder", f"data.root={tmp_path / 'ten'}", "data.channels=1")
    other = build_components(compose("model=mlp", f"model.pretrained={run}/checkpoints/best.pt", *folder)).model
    assert torch.equal(other.get_parameter("layers.1.weight").detach(), best_weights(run)["layers.1.weight"])
    assert other.get_parameter(f"{head}.weight").shape == best_weights(run)[f"{head}.weight"].shape
    assert not torch.equal(other.get_parameter(f"{head}.weight").detach(), best_weights(run)[f"{head}.weight"])


def test_the_moving_average_of_a_run_is_loaded(digits: Callable[..., str]) -> None:
    run = digits("model=mlp", "ema_decay=0.9")
    model = build_components(compose("model=mlp", "data=digits", f"model.pretrained={run}")).model
    average = checkpoint.load(Path(run) / "checkpoints" / "best.pt")["state"]["ema"]
    assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())


def test_weights_with_other_norms_need_the_same_norms(digits: Callable[..., str]) -> None:
    net = ("model=cifar_resnet", "model.depth=8")
    run = digits(*net, "model.norm=group")
    settings = (*net, "data=digits", f"model.pretrained={run}")
    assert (
        build_components(compose(*settings, "model.norm=group")).model.state_dict().keys() == best_weights(run).keys()
    )
    for norm in ("null", "instance"):
        with pytest.raises(UserError, match=r"model\.norm=group"):
            build_components(compose(*settings, f"model.norm={norm}"))


def test_weights_with_a_small_stem_set_the_small_stem(digits: Callable[..., str], photos: str) -> None:
    network = build_components(compose("model=resnet18", "data=digits")).model
    saved = checkpoint.load(Path(digits("model=mlp")) / "checkpoints" / "best.pt")
    saved["state"]["model"] = network.state_dict()
    saved["config"]["model"] = dict(build_components(compose("model=resnet18", "data=digits")).settings.model)
    torch.save(saved, "run.pt")
    settings = (
        "model=resnet18",
        "model.pretrained=run.pt",
        FREEZE,
        "data=image_folder",
        photos,
        "data.size=128",
    )
    model = build_components(compose(*settings)).model
    assert model.get_parameter("conv1.weight").shape == (64, 3, 3, 3)
    assert trainable_names(model) == ["fc.weight", "fc.bias"]


INVALID: dict[str, tuple[tuple[str | int, ...], object]] = {
    "an infinite height": (("spec", "height"), float("inf")),
    "an average that is a tensor": (("state", "ema"), torch.ones(3)),
    "a whole number as a name": (("state", "model", 5), torch.ones(3)),
    "complex weights": (("state", "model", "layers.1.weight"), torch.ones(2, 2, dtype=torch.complex64)),
    "empty weights": (("state", "model", "layers.1.weight"), torch.ones(0, 64)),
    "a norm that is a tensor": (("config", "model", "norm"), torch.ones(3)),
    "no spec": (("spec",), None),
}


@pytest.mark.parametrize("kind", INVALID)
def test_an_invalid_checkpoint_is_refused(kind: str, digits: Callable[..., str]) -> None:
    (*parents, key), value = INVALID[kind]
    node = saved = checkpoint.load(Path(digits("model=mlp")) / "checkpoints" / "best.pt")
    for name in parents:
        node = node[name]
    node[key] = value
    torch.save(saved, "run.pt")
    with pytest.raises(UserError, match=r"model\.pretrained"):
        build_components(compose("model=mlp", "data=digits", "model.pretrained=run.pt"))


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("lenet5", "DEFAULT", r"model\.pretrained: there are no published weights .*folder of a run"),
        ("lenet5", "nothere", r"model\.pretrained: .*nothere"),
        ("lenet5", "empty", r"model\.pretrained: .*empty has no checkpoints/best\.pt"),
        ("lenet5", "5", r"model\.pretrained: .*must be"),
        ("lenet5", "odd.pt", r"model\.pretrained: .*odd\.pt"),
        ("lenet5", "strange.pt", r"model\.pretrained: .*strange\.pt.*not a valid training checkpoint"),
        ("resnet18", "IMAGENET1K_V", r"did you mean 'IMAGENET1K_V1'"),
        ("resnet18 model.depth=19", "DEFAULT", r"model\.depth: 19"),
        ("torchvision model.name=mobilenetv2", "DEFAULT", r"did you mean 'mobilenet_v2'"),
    ],
)
def test_unavailable_weights_are_refused(model: str, pretrained: str, message: str) -> None:
    Path("empty").mkdir()
    torch.save([1, 2], "odd.pt")
    spec = {"mean": [0.0], "std": [0.0], "height": 8, "width": 8, "classes": ["a"]}
    torch.save({"state": {"model": {}}, "spec": spec, "config": {"model": {}}}, "strange.pt")
    with pytest.raises(UserError, match=message):
        build_components(compose(*f"model={model}".split(), "data=digits", f"model.pretrained={pretrained}"))


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("backbon", r"model\.freeze: 'backbon' .*did you mean 'backbone'"),
        ("[layers.0,layer.3]", r"model\.freeze: 'layer\.3' .*did you mean 'layers\.3'"),
        ("[]", r"model\.freeze: must be"),
        ("5", r"model\.freeze: must be"),
        ("[layers]", r"no parameter is trainable"),
    ],
)
def test_unknown_layers_to_freeze_are_refused(freeze: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(compose("data=digits", *QUICK, f"model.freeze={freeze}"))


def test_a_custom_network_with_a_pretrained_parameter_loads_its_own_weights(tmp_path: Path) -> None:
    """The constructor gets the value of `model.pretrained`."""
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "selfmade.py").write_text(
        "from torch import nn\n\n\n"
        "class Net(nn.Module):\n"
        "    head_names = ('fc',)\n\n"
        "    def __init__(self, num_outputs, pretrained=True):\n"
        "        super().__init__()\n"
        "        self.argument = pretrained\n"
        "        self.body = nn.Conv2d(1, 2, 3)\n"
        "        self.fc = nn.Linear(2, num_outputs)\n\n"
        "    def forward(self, x):\n"
        "        return self.fc(self.body(x).mean((2, 3)))\n\n\n"
        "def nothing():\n"
        "    return 5\n"
    )
    yaml_text = "_target_: selfmade.{}\n"
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(yaml_text.format("Net"))
    (tmp_path / "conf" / "model" / "none.yaml").write_text(yaml_text.format("nothing"))

    def pretrained_argument(*overrides: str) -> Any:
        return build_components(
            compose("model=mine", "data=digits", *overrides, config_dir=tmp_path / "conf")
        ).model.argument

    assert pretrained_argument() is True
    assert pretrained_argument("model.pretrained=somewhere.pt", FREEZE) == "somewhere.pt"
    assert pretrained_argument("model.pretrained=false") is None
    with pytest.raises(UserError, match=r"model\.init=he\b"):
        pretrained_argument("model.pretrained=somewhere.pt", "model.init=he")
    with pytest.raises(UserError, match=r"model\._target_: selfmade\.nothing returns a int"):
        build_components(compose("model=none", "data=digits", config_dir=tmp_path / "conf"))


def test_inspect_shows_the_network_that_is_trained(
    resnet: Path, photos: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        "model=resnet18",
        f"model.pretrained={resnet}",
        FREEZE,
        "data=image_folder",
        photos,
        "log.figures=false",
    ]
    assert main(["inspect", *settings, "run_dir=here"]) == 0
    printed = capsys.readouterr().out
    assert "on 3x224x224" in printed and "Trainable parameters: 513\n" in printed


def test_frozen_convolutions_of_digits_on_fashion_mnist(shared_data: Path, digits: Callable[..., str]) -> None:
    """The convolutions of lenet5 keep their bits; the dense layer has a larger input, so it is new like the head."""
    run = digits("model=lenet5")
    frozen = "model.freeze=[layers.0,layers.1,layers.2,layers.3,layers.4,layers.5]"
    fashion = ("data=fashion_mnist", f"data.root={shared_data}", "data.limit=128")
    settings = ("model=lenet5", f"model.pretrained={run}", *fashion, *QUICK)
    with pytest.raises(UserError, match=r"model\.freeze: layers\.7 "):
        build_components(compose(*settings, FREEZE))
    components = build_components(compose(*settings, frozen))
    new = trainable_names(components.model)
    assert new == ["layers.7.weight", "layers.7.bias", "layers.9.weight", "layers.9.bias"]
    start = {name: value.clone() for name, value in components.model.state_dict().items()}
    train(compose(*settings, frozen, "run_dir=fashion"))
    before, after = best_weights(run), last_weights("fashion")
    for name in ("layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias"):
        assert torch.equal(before[name], after[name])
    assert not any(torch.equal(start[name], after[name]) for name in new)
