"""`inspect.convention=keras` against the table of keras.io/api/applications.

Parameters for 1000 classes, with the running mean and variance of BatchNorm. If the network differs from that of Keras,
the difference is derived from the network; docs/keras_table.md explains it.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cnntrain.cli import main
from cnntrain.commands.inspect import summarize_model
from cnntrain.config.compose import read_settings
from cnntrain.train.setup import make_model

KERAS = {
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "resnet50": 25_636_712,
    "resnet101": 44_707_176,
    "resnet152": 60_419_944,
    "inception_v3": 23_851_784,
    "xception": 22_910_480,
    "mobilenet_v1": 4_253_864,
    "mobilenet_v2": 3_538_984,
    "densenet121": 8_062_504,
    "densenet169": 14_307_880,
    "densenet201": 20_242_984,
}
OTHER_BIASES = ("resnet50", "resnet101", "resnet152")
OTHER_NORMS = ("inception_v3",)
DEEP = ("resnet101", "resnet152", "xception", "densenet169", "densenet201", "inception_v3")
SIZE = ("inspect.channels=3", "inspect.num_outputs=1000", "inspect.convention=keras")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "keras_table.md"


def px(name: str) -> int:
    return 299 if name in ("xception", "inception_v3") else 224


def network(name: str) -> nn.Module:
    with torch.device("meta"):
        return make_model(read_settings([f"model={name}"]), 3, 1000, (px(name), px(name)))


def biases_before_norms(model: nn.Module) -> int:
    """Number of biases if every convolution had one."""
    return sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is None)


def scales_of_norms(model: nn.Module) -> int:
    return sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in DEEP else ()) for n in KERAS])
def test_parameters_equal_the_keras_table(name: str) -> None:
    """Equal architectures have equal numbers; the other differences are derived exactly.

    The ResNets of Keras have a bias in every convolution, although a BatchNorm follows; its Inception v3 has norms
    without scales (`scale=False`).
    """
    summary = summarize_model(read_settings([f"model={name}", f"inspect.image_size={px(name)}", *SIZE]))
    difference = 0
    if name in OTHER_BIASES:
        difference = biases_before_norms(network(name))
        assert difference > 0
    if name in OTHER_NORMS:
        difference = -scales_of_norms(network(name))
        assert difference < 0
    assert summary.parameters("keras") + difference == KERAS[name]


def test_inspect_compares_several_networks() -> None:
    arguments = ["inspect", "model=vgg16,mobilenet_v1", "inspect.image_size=224", *SIZE, "run_dir=keras"]
    assert main(arguments) == 0
    rows = {row["network"]: row["parameters"] for row in json.loads(Path("keras/comparison.json").read_text())}
    assert rows == {"vgg16": KERAS["vgg16"], "mobilenet_v1": KERAS["mobilenet_v1"]}


def test_the_documentation_has_the_table() -> None:
    """The numbers of Keras and of cnntrain, and the difference."""
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    table = {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in rows}
    assert {name: int(cells[0].replace(",", "")) for name, cells in table.items()} == KERAS
    for name, (_, ours, difference, why) in table.items():
        same = name not in (*OTHER_BIASES, *OTHER_NORMS)
        assert int(ours.replace(",", "")) - KERAS[name] == int(difference.replace(",", ""))
        assert (int(difference.replace(",", "")) == 0) == same == (why == "")
