"""Untrusted checkpoints in evaluate and predict: they start no download, no compiler, no code and no huge network."""

import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from cnntrain.cli import main
from cnntrain.errors import UserError
from cnntrain.train.restore import limited_construction

QUICK = ["threads=1", "data.limit=40", "log.figures=false", "log.tensorboard=false", "device=cpu", "epochs=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main([*QUICK, "model=mlp", "model.values.width=4", f"run_dir={run}"]) == 0
    return run


Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def both(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int]]:
    """The exit codes of evaluate and predict once the checkpoint has been changed; no network is used."""

    def refuse(*words: object, **more: object) -> None:
        raise AssertionError(f"the network was used: {words}")

    def commands(change: Change, predicts: bool = True) -> tuple[int, int]:
        shutil.copytree(trained, "run")
        saved = torch.load("run/checkpoints/best.pt", weights_only=True)
        change(saved)
        torch.save(saved, "run/checkpoints/best.pt")
        Image.new("RGB", (12, 10), (90, 120, 30)).save("image.png")
        common = ("checkpoint=run", "threads=1", "device=cpu")
        evaluated = main(["evaluate", *common])
        return evaluated, main(["predict", *common, "images=image.png", "run_dir=out"]) if predicts else evaluated

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return commands


def test_an_unchanged_checkpoint_is_evaluated(both: Callable[..., tuple[int, int]]) -> None:
    assert both(lambda saved: None) == (0, 0)


@pytest.mark.parametrize("margin", [-1, 11, float("nan"), float("inf"), "x", [1], True, torch.ones(2)])
def test_invalid_crop_margins_are_rejected(margin: object, both: Callable[..., tuple[int, int]]) -> None:
    assert both(lambda s: s["config"]["data"].update(crop="box", crop_margin=margin)) == (2, 2)


def test_a_valid_crop_margin_is_accepted(both: Callable[..., tuple[int, int]]) -> None:
    """The dataset of the checkpoint has no crop margin, so evaluate rejects it."""
    assert both(lambda s: s["config"]["data"].update(crop="box", crop_margin=0.2)) == (2, 0)


REFUSED: dict[str, Change] = {
    "a function of torchvision": lambda s: s["config"].update(
        model={"_target_": "torchvision.models.resnet18", "weights": "DEFAULT"}
    ),
    "a function of timm": lambda s: s["config"].update(
        model={"_target_": "timm.models.load_state_dict", "checkpoint_path": "evil.pt", "weights_only": False}
    ),
    "packages it trusts": lambda s: s["config"].update(
        model={"_target_": "os.mkdir", "path": "touched"}, trusted_packages=["os", "posix"]
    ),
    "endless layers": lambda s: s["config"]["model"].update(
        layers=[{"repeat": {"times": 1e9, "layers": ["relu"]}}, "flatten", "output"]
    ),
    "endless width": lambda s: s["config"]["model"].update(
        layers=["flatten", {"dense": 10**7}, "relu", {"dense": 10**7}, "output"]
    ),
    "no standard deviation": lambda s: s["spec"].update(mean=(0.5,), std=(0.0,)),
    "a network that is a number": lambda s: s["config"].update(model=5),
    "a network that is none": lambda s: s["config"]["model"].update(_target_="torch.nn.Identity", layers=None),
    "an image that is too large": lambda s: s["spec"].update(height=2**40),
    "half of the weights": lambda s: s["state"]["model"].popitem(),
    "weights of another type": lambda s: s["state"].update(
        model={name: value.to(torch.int64) for name, value in s["state"]["model"].items()}
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_untrusted_configs_are_rejected(kind: str, both: Callable[..., tuple[int, int]]) -> None:
    assert (
        both(REFUSED[kind], kind in ("a function of timm", "half of the weights")) == (2, 2)
        and not Path("touched").exists()
    )


def test_nothing_is_downloaded_or_compiled(
    both: Callable[..., tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: object, **more: object) -> None:
        raise AssertionError("it was compiled")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(torch.nn.Module, "compile", refuse)

    def change(saved: dict[str, Any]) -> None:
        saved["config"]["compile"] = "default"
        saved["config"]["model"]["pretrained"] = "DEFAULT"

    assert both(change) == (0, 0)


@pytest.mark.parametrize("name", ["mnist.MNIST", "cifar.CIFAR10", "mask_folder.OxfordIIITPet"])
def test_a_checkpoint_does_not_choose_the_folder_of_downloads(name: str, both: Callable[..., tuple[int, int]]) -> None:
    def change(saved: dict[str, Any]) -> None:
        common = {k: v for k, v in saved["config"]["data"].items() if k not in ("_target_", "root")}
        saved["config"]["data"] = {**common, "_target_": f"cnntrain.data.sources.{name}", "root": "elsewhere/deep"}

    code, _ = both(change, False)
    assert code == 2 and not Path("elsewhere").exists()


@pytest.mark.parametrize("name", ["mnist.MNIST", "cifar.CIFAR10"])
def test_a_checkpoint_starts_no_download(
    name: str, both: Callable[..., tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")

    def change(saved: dict[str, Any]) -> None:
        common = {k: v for k, v in saved["config"]["data"].items() if k not in ("_target_", "root")}
        saved["config"]["data"] = {**common, "_target_": f"cnntrain.data.sources.{name}", "root": None}

    code, _ = both(change, False)
    assert code == 2 and not Path("cache").exists()


def test_interpolations_in_a_checkpoint_are_not_resolved(
    both: Callable[..., tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")

    def change(saved: dict[str, Any]) -> None:
        saved["config"]["task"]["label_smoothing"] = "${oc.env:SECRET}"

    assert both(change) == (2, 2)
    assert "hunter2" not in "".join(capfd.readouterr())


ONE_TENSOR = {"state": {"model": {"weight": torch.zeros(1)}}}
NODES = {
    "layers of an LSTM": {"_target_": "torch.nn.LSTM", "input_size": 1, "hidden_size": 1, "num_layers": 10**7},
    "copies of a layer": {"_target_": "torch.nn.Transformer", "num_encoder_layers": 10**7},
    "fewer layers": {"_target_": "torch.nn.LSTM", "input_size": 1, "hidden_size": 1, "num_layers": 9_999},
}


@pytest.mark.parametrize("node", NODES)
def test_networks_far_larger_than_the_weights_are_rejected(
    node: str, both: Callable[..., tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert both(lambda saved: saved["config"].update(model=NODES[node])) == (2, 2)
    assert capsys.readouterr().err.count("checkpoint: its") == 2


def test_construction_is_limited_by_the_number_of_tensors() -> None:
    with limited_construction(ONE_TENSOR):
        nn.Sequential(*(nn.ReLU() for _ in range(1000)))
    with pytest.raises(UserError, match="far larger than its 1 tensors"), limited_construction(ONE_TENSOR):
        nn.Sequential(*(nn.ReLU() for _ in range(1100)))
    nn.Sequential(*(nn.ReLU() for _ in range(1100)))  # the limit has ended
