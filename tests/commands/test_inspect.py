"""`cnntrain inspect`."""

import csv
import json
from pathlib import Path

import pytest

from cnntrain.cli import main


def test_summary_of_one_network_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "model=lenet5", "data=fashion_mnist", "data.root=nowhere", "run_dir=one"]) == 0
    summary = json.loads(Path("one/summary.json").read_text())
    assert summary["totals"]["parameters"] == 1_256_080
    with Path("one/layers.csv").open(newline="") as file:
        assert sum(int(row["parameters"]) for row in csv.DictReader(file)) == 1_256_080
    assert Path("one/summary.png").exists()
    assert "1,256,080" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "total", "trainable"),
    [
        (["model.freeze=backbone"], 11_172_810, 5_130),
        (["model.freeze=[layer1,layer2]"], 11_172_810, 10_499_274),
        (["model.freeze=backbone", "inspect.convention=keras"], 11_182_410, 5_130),
        ([], 11_172_810, 11_172_810),
    ],
)
def test_trainable_parameters(
    overrides: list[str], total: int, trainable: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Non-trainable parameters in Keras: the frozen ones and the 9,600 running statistics of ResNet-18."""
    from torchvision.models import resnet18

    arguments = ["model=resnet18", "data=digits", "log.figures=false", *overrides, "run_dir=here"]
    assert main(["inspect", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    values = [int(line.split(": ")[1].replace(",", "")) for line in lines if "arameters: " in line]
    assert values == [total, trainable, total - trainable]
    totals = json.loads(Path("here/summary.json").read_text())["totals"]
    assert (totals["parameters"], totals["trainable"]) == (total, trainable)
    if "layer1" in str(overrides):
        other = resnet18()
        parts = [*other.layer1.parameters(), *other.layer2.parameters()]
        assert total - trainable == sum(p.numel() for p in parts)


@pytest.mark.slow
def test_comparison_at_another_size() -> None:
    size = ["inspect.image_size=224", "inspect.channels=3", "inspect.num_outputs=1000"]
    assert main(["inspect", "model=resnet18,resnet34", *size, "run_dir=two"]) == 0
    rows = {row["network"]: row for row in json.loads(Path("two/comparison.json").read_text())}
    assert rows["resnet18"]["parameters"] == 11_689_512 and rows["resnet34"]["parameters"] == 21_797_672


@pytest.mark.parametrize(
    ("models", "files"),
    [("lenet5", ["layers.csv", "summary.json"]), ("lenet5,mlp", ["comparison.csv", "comparison.json"])],
)
def test_without_figures(models: str, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"model={models}", "run_dir=here", "log.figures=false"]) == 0
    assert sorted(path.name for path in Path("here").iterdir() if not path.name.startswith(".")) == files
    assert "png" not in capsys.readouterr().out


def test_networks_that_do_not_fit_are_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "model=torchvision", "model.name=alexnet", "data=mnist"]) == 2
    assert "model.features" in capsys.readouterr().err
    assert main(["inspect", "inspect.image_size=0"]) == 2
