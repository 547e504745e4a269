"""What `model.pretrained` decides in a run: stem, image size, normalization, head, and what may be frozen."""

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
from cnntrain.train.prepare import build_training_parts
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
    """A file like torchvision's, for 1000 classes."""
    from torchvision import models

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(models.get_model("resnet18").state_dict(), path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """`data=image_folder` with 2 classes of 12 images."""
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
    """Runs on digits, made once each."""
    made: dict[tuple[str, ...], str] = {}

    def run(*overrides: str) -> str:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("digits") / "run"
            train(compose("data=digits", "data.limit=64", *QUICK, *overrides, f"run_dir={folder}"))
            made[overrides] = str(folder)
        return made[overrides]

    return run


def best(run: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(Path(run) / "checkpoints" / "best.pt")["state"]["model"]


def last(run: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(Path(run) / "checkpoints" / "last.pt")["state"]["model"]


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def warnings(assembly: Components) -> list[str]:
    """Keys of lint's findings."""
    data = assembly.load()
    plan, _, _ = build_training_parts(assembly, data)
    return [key for finding in lint(assembly, data, plan, "") for key in finding.keys]


def test_weights_of_imagenet_bring_their_stem_size_and_normalization(resnet: Path, photos: str) -> None:
    """64 px would get a new random 3x3 stem, which `freeze` froze."""
    assembly = build_components(
        compose("model=resnet18", f"model.pretrained={resnet}", FREEZE, "data=image_folder", photos)
    )
    assert assembly.spec.image_size == (224, 224)
    assert assembly.spec.mean == (0.485, 0.456, 0.406) and assembly.spec.std == (0.229, 0.224, 0.225)
    assert torch.equal(assembly.model.get_parameter("conv1.weight"), torch.load(resnet)["conv1.weight"])
    assert trainable(assembly.model) == ["fc.weight", "fc.bias"]


def test_what_the_user_gives_wins(resnet: Path, photos: str) -> None:
    own = ("data.size=64", "data.mean=[0.1,0.2,0.3]", "data.std=[0.5,0.5,0.5]")
    assembly = build_components(
        compose("model=resnet18", f"model.pretrained={resnet}", "data=image_folder", photos, *own)
    )
    assert assembly.spec.image_size == (64, 64) and assembly.spec.mean == (0.1, 0.2, 0.3)
    assert assembly.settings.model["stem"] == "imagenet"
    assert "data.mean" in warnings(assembly)


@pytest.mark.parametrize(("size", "told"), [(32, True), (64, False)])
def test_images_far_smaller_than_those_of_the_weights_are_told(
    size: int, told: bool, resnet: Path, photos: str
) -> None:
    asked = ("model=resnet18", f"model.pretrained={resnet}", "data=image_folder", photos, "batch_size=8")
    assert ("data.size" in warnings(build_components(compose(*asked, f"data.size={size}")))) == told


def test_a_head_alone_may_learn_fast(resnet: Path, photos: str) -> None:
    asked = ("model=resnet18", f"model.pretrained={resnet}", "data=image_folder", photos, "batch_size=8")
    fast = (*asked, "optimizer.lr=0.02")
    assert "optimizer.lr" in warnings(build_components(compose(*fast)))
    assert "optimizer.lr" in warnings(build_components(compose(*fast, FREEZE, "model.unfreeze=2")))
    assert "optimizer.lr" not in warnings(build_components(compose(*fast, FREEZE)))


def test_without_pretrained_weights_size_and_normalization_are_the_data_sets(photos: str) -> None:
    assembly = build_components(compose("data=image_folder", photos))
    assert assembly.spec.image_size == (64, 64) and assembly.spec.mean is None


def test_nothing_new_is_frozen(resnet: Path, photos: str) -> None:
    small = ("model=resnet18", "model.stem=small", f"model.pretrained={resnet}", "data=image_folder", photos)
    with pytest.raises(UserError, match=r"model\.freeze: conv1 "):
        build_components(compose(*small, FREEZE))
    with pytest.raises(UserError, match=r"model\.freeze: fc "):
        build_components(compose(*small, "model.freeze=[layer1,fc]"))
    model = build_components(compose(*small, "model.freeze=[layer1,layer2]")).model
    assert {"conv1.weight", "fc.weight", "layer3.0.conv1.weight"} < set(trainable(model))
    assert not [name for name in trainable(model) if name.startswith(("layer1.", "layer2."))]


def test_a_frozen_random_backbone_is_told_with_its_counts(
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


def test_norms_and_initialization_that_would_throw_weights_away_are_refused(resnet: Path, photos: str) -> None:
    asked = ("model=resnet18", f"model.pretrained={resnet}", "data=image_folder", photos)
    for key, value in (("model.norm", "group"), ("model.init", "he")):
        with pytest.raises(UserError, match=key.replace(".", r"\.")):
            build_components(compose(*asked, f"{key}={value}"))


def test_timms_weights_bring_their_normalization_and_are_not_drawn_anew(photos: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    name = "test_efficientnet"
    torch.save(timm.create_model(name).state_dict(), tmp_path / "w.pth")
    asked = (
        "model=timm",
        f"model.name={name}",
        f"model.pretrained={tmp_path / 'w.pth'}",
        "data=image_folder",
        photos,
    )
    config = timm.get_pretrained_cfg(name)
    assembly = build_components(compose(*asked, FREEZE))
    assert assembly.spec.mean == tuple(config.mean) and assembly.spec.std == tuple(config.std)
    assert assembly.spec.image_size == config.input_size[1:]
    assert trainable(assembly.model) == ["classifier.weight", "classifier.bias"]
    for extra in ("model.init=he", "model.norm=group"):
        with pytest.raises(UserError, match=r"model\.(init|norm)"):
            build_components(compose(*asked, extra))
    assert "data.mean" in warnings(
        build_components(compose(*asked, "data.mean=[0.2,0.2,0.2]", "data.std=[0.1,0.1,0.1]"))
    )
    assert warnings(build_components(compose(*asked, "batch_size=8"))) == []


def test_a_run_that_goes_on_or_is_judged_needs_no_pretrained_file(resnet: Path, photos: str, tmp_path: Path) -> None:
    """Stem, size and normalization are in the checkpoint's config; the file may be gone."""
    file = tmp_path / "copy.pth"
    shutil.copy(resnet, file)
    asked = ("model=resnet18", f"model.pretrained={file}", FREEZE, "data=image_folder", photos, *QUICK)
    train(compose(*asked, "data.size=32", "run_dir=run"))
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["model"]["stem"] == "imagenet" and config["data"]["mean"] == [0.485, 0.456, 0.406]
    file.unlink()
    assert main(["evaluate", "checkpoint=run", "split=val"]) == 0
    before = last("run")
    train(compose(*asked, "data.size=32", "run_dir=run", "resume=auto", "epochs=2"))
    after = last("run")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}
    assert checkpoint.load(Path("run/checkpoints/last.pt"))["spec"]["mean"] == (0.485, 0.456, 0.406)


def test_a_run_is_fine_tuned_on_other_classes(digits: Callable[..., str], photos: str) -> None:
    """Part of it is kept bit by bit, statistics of norms included; the head is new, though its shape is the same."""
    kept = ("layers.0", "layers.3", "layers.4")  # conv, norm, relu, conv, norm, ...
    conv = "{conv: {out: 4, kernel: 3}}"
    layers = f"[{conv}, relu, {{max_pool: 2}}, {conv}, batch_norm, flatten, output]"
    net = ("model=sequential", f"model.layers={layers}")
    run = digits(*net, "task.label_smoothing=0.1")
    asked = (*net, f"model.pretrained={run}", "model.freeze=[layers.0,layers.3,layers.4]", *QUICK)
    folder = ("data=image_folder", photos, "data.channels=1")
    assembly = build_components(compose(*asked, *folder))
    assert assembly.spec.image_size == (8, 8)
    train(compose(*asked, *folder, "optimizer.weight_decay=0.1", "run_dir=fine"))
    before, after = best(run), last("fine")
    old = [name for name in before if name.startswith(tuple(f"{layer}." for layer in kept))]
    assert "layers.4.running_mean" in old and "layers.4.num_batches_tracked" in old
    assert all(torch.equal(before[name], after[name]) for name in old)


def test_the_head_is_kept_for_the_same_classes_alone(digits: Callable[..., str], photos: str, tmp_path: Path) -> None:
    run = digits("model=mlp")
    head = "layers.3"
    same = build_components(compose("model=mlp", "data=digits", f"model.pretrained={run}")).model
    head = same.head_names[0]
    assert torch.equal(same.get_parameter(f"{head}.weight").detach(), best(run)[f"{head}.weight"])
    for i in range(10):
        shutil.copytree(tmp_path / "photos" / "train" / "cat", tmp_path / "ten" / "train" / f"class{i}")
    folder = ("data=image_folder", f"data.root={tmp_path / 'ten'}", "data.channels=1")
    other = build_components(compose("model=mlp", f"model.pretrained={run}/checkpoints/best.pt", *folder)).model
    assert torch.equal(other.get_parameter("layers.1.weight").detach(), best(run)["layers.1.weight"])
    assert other.get_parameter(f"{head}.weight").shape == best(run)[f"{head}.weight"].shape
    assert not torch.equal(other.get_parameter(f"{head}.weight").detach(), best(run)[f"{head}.weight"])


def test_the_average_is_taken_where_a_run_has_one(digits: Callable[..., str]) -> None:
    run = digits("model=mlp", "ema_decay=0.9")
    model = build_components(compose("model=mlp", "data=digits", f"model.pretrained={run}")).model
    average = checkpoint.load(Path(run) / "checkpoints" / "best.pt")["state"]["ema"]
    assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())


def test_a_run_with_other_norms_is_taken_with_those(digits: Callable[..., str]) -> None:
    net = ("model=cifar_resnet", "model.depth=8")
    run = digits(*net, "model.norm=group")
    asked = (*net, "data=digits", f"model.pretrained={run}")
    assert build_components(compose(*asked, "model.norm=group")).model.state_dict().keys() == best(run).keys()
    for norm in ("null", "instance"):
        with pytest.raises(UserError, match=r"model\.norm=group"):
            build_components(compose(*asked, f"model.norm={norm}"))


def test_a_run_with_a_small_stem_gives_a_small_stem(digits: Callable[..., str], photos: str) -> None:
    network = build_components(compose("model=resnet18", "data=digits")).model
    saved = checkpoint.load(Path(digits("model=mlp")) / "checkpoints" / "best.pt")
    saved["state"]["model"] = network.state_dict()
    saved["config"]["model"] = dict(build_components(compose("model=resnet18", "data=digits")).settings.model)
    torch.save(saved, "run.pt")
    asked = (
        "model=resnet18",
        "model.pretrained=run.pt",
        FREEZE,
        "data=image_folder",
        photos,
        "data.size=128",
    )
    model = build_components(compose(*asked)).model
    assert model.get_parameter("conv1.weight").shape == (64, 3, 3, 3)
    assert trainable(model) == ["fc.weight", "fc.bias"]


WRONG: dict[str, tuple[tuple[str | int, ...], object]] = {
    "an infinite height": (("spec", "height"), float("inf")),
    "an average that is a tensor": (("state", "ema"), torch.ones(3)),
    "a whole number as a name": (("state", "model", 5), torch.ones(3)),
    "complex weights": (("state", "model", "layers.1.weight"), torch.ones(2, 2, dtype=torch.complex64)),
    "empty weights": (("state", "model", "layers.1.weight"), torch.ones(0, 64)),
    "a norm that is a tensor": (("config", "model", "norm"), torch.ones(3)),
    "no spec": (("spec",), None),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_run_that_is_not_as_a_training_writes_it_is_refused(kind: str, digits: Callable[..., str]) -> None:
    (*above, key), value = WRONG[kind]
    place = saved = checkpoint.load(Path(digits("model=mlp")) / "checkpoints" / "best.pt")
    for name in above:
        place = place[name]
    place[key] = value
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
def test_what_cannot_be_had_is_refused(model: str, pretrained: str, message: str) -> None:
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
def test_layers_to_freeze_must_be_there(freeze: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(compose("data=digits", *QUICK, f"model.freeze={freeze}"))


def test_a_network_that_loads_its_weights_by_itself_is_left_to_it(tmp_path: Path) -> None:
    """A class of the user's whose constructor takes `pretrained`, whatever its default."""
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "selfmade.py").write_text(
        "from torch import nn\n\n\n"
        "class Net(nn.Module):\n"
        "    head_names = ('fc',)\n\n"
        "    def __init__(self, num_outputs, pretrained=True):\n"
        "        super().__init__()\n"
        "        self.given = pretrained\n"
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

    def given(*overrides: str) -> Any:
        return build_components(
            compose("model=mine", "data=digits", *overrides, config_dir=tmp_path / "conf")
        ).model.given

    assert given() is True
    assert given("model.pretrained=somewhere.pt", FREEZE) == "somewhere.pt"
    assert given("model.pretrained=false") is None
    with pytest.raises(UserError, match=r"model\.init=he\b"):
        given("model.pretrained=somewhere.pt", "model.init=he")
    with pytest.raises(UserError, match=r"model\._target_: selfmade\.nothing returns a int"):
        build_components(compose("model=none", "data=digits", config_dir=tmp_path / "conf"))


def test_inspect_opens_the_network_that_is_trained(
    resnet: Path, photos: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "model=resnet18",
        f"model.pretrained={resnet}",
        FREEZE,
        "data=image_folder",
        photos,
        "log.figures=false",
    ]
    assert main(["inspect", *asked, "run_dir=here"]) == 0
    said = capsys.readouterr().out
    assert "on 3x224x224" in said and "Trainable parameters: 513\n" in said


def test_a_trunk_learned_on_digits_reads_fashion(shared_data: Path, digits: Callable[..., str]) -> None:
    """lenet5: its convolutions are kept bit by bit; the dense layer reads a larger map, and is new with the head."""
    run = digits("model=lenet5")
    frozen = "model.freeze=[layers.0,layers.1,layers.2,layers.3,layers.4,layers.5]"
    fashion = ("data=fashion_mnist", f"data.root={shared_data}", "data.limit=128")
    asked = ("model=lenet5", f"model.pretrained={run}", *fashion, *QUICK)
    with pytest.raises(UserError, match=r"model\.freeze: layers\.7 "):
        build_components(compose(*asked, FREEZE))
    assembly = build_components(compose(*asked, frozen))
    new = trainable(assembly.model)
    assert new == ["layers.7.weight", "layers.7.bias", "layers.9.weight", "layers.9.bias"]
    start = {name: value.clone() for name, value in assembly.model.state_dict().items()}
    train(compose(*asked, frozen, "run_dir=fashion"))
    before, after = best(run), last("fashion")
    for name in ("layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias"):
        assert torch.equal(before[name], after[name])
    assert not any(torch.equal(start[name], after[name]) for name in new)
