"""Composed configs, and the messages about invalid overrides and files."""

from pathlib import Path

import pytest

from cnntrain.config.compose import compose, read_settings
from cnntrain.config.reference import group_options
from cnntrain.config.schema import Settings
from cnntrain.errors import UserError

INVALID = {
    "=3": r"'=3' has no key; write KEY=VALUE",
    "epohcs=3": r"epohcs: no such key; did you mean 'epochs'\?",
    "hydra.run.dir=x": r"hydra\.run\.dir: .*run_dir",
    "optimizer.lrr=3": r"optimizer\.lrr: no such key; did you mean 'optimizer\.lr'\?",
    "model=resnet81": r"model: no such option 'resnet81'; did you mean 'resnet18'\?",
    "modle=mlp": r"modle: no such key; did you mean 'model'\?",
    "epochs=2.5": r"epochs: must be a whole number >= 1, got 2\.5",
    "epochs=-1": r"epochs: must be a whole number >= 1, got -1",
    "epochs=many": r"epochs: must be a whole number >= 1, got 'many'",
    "batch_size=0": r"batch_size: must be a whole number >= 1 or auto, got 0",
    "steps=0": r"steps: must be a whole number >= 1 or null, got 0",
    "precision=fp8": r"precision: 'fp8' is not one of auto, fp32, bf16, fp16",
    "channels_last=maybe": r"channels_last: must be true or false, got 'maybe'",
    "checkpoint=3": r"checkpoint: needs keys below it",
    "log.every_steps=0": r"log\.every_steps: must be a whole number >= 1",
    "ema_decay=1.5": r"ema_decay: must be a number >= 0 and <= 0.999999 or null, got 1\.5",
    "epochs": r"an override is written KEY=VALUE",
    "augment=[flip,crob]": r"augment: no such option 'crob'; did you mean 'crop'\?",
    "model=lenet5,mlp": r"model=lenet5,mlp: several values; -m",
    "data.root=my photos]": r"data\.root=my photos\].*\n.*quotes",
    "model.layers[0].x=3": r"model\.layers\[0\]\.x=3.*model\.layers=\[",
    "lr=0.1": r"lr: no such key; did you mean 'optimizer\.lr'\?",
    "data.root=x": r"data\.root: data=digits has no such key; .*image_folder",
    f"seed={'1' * 400}": r"seed: must be a whole number >= 0 .* \(400 characters\)",
    f"seed={'1' * 5000}": r"seed: ",
}


@pytest.mark.parametrize("override", INVALID)
def test_invalid_overrides_are_reported_with_their_key(override: str) -> None:
    with pytest.raises(UserError, match=INVALID[override]):
        read_settings([override])


def test_the_default_settings() -> None:
    settings = read_settings([])
    assert isinstance(settings, Settings)
    assert settings.choices["model"] == "lenet5" and settings.choices["data"] == "digits"
    assert settings.label == "lenet5-digits"


def test_compose_returns_the_choices() -> None:
    assert compose("config", ["model=mlp"])["choices"]["model"] == "mlp"


def test_options_on_the_command_line_override_those_of_the_dataset() -> None:
    assert "shift" in read_settings(["data=digits"]).augment
    assert read_settings(["data=digits", "augment=none"]).augment == {"border": "zero"}
    assert set(read_settings(["augment=[flip,crop]"]).augment) >= {"flip", "crop"}


@pytest.mark.parametrize("option", group_options()["experiment"])
def test_every_experiment_composes(option: str) -> None:
    settings = read_settings([f"experiment={option}"])
    assert settings.expect is not None or settings.sweep.over


def test_trusted_packages_in_a_config_file_have_no_effect(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "sly.yaml").write_text("# @package _global_\ntrusted_packages: [os]\n")
    assert "os" not in read_settings(["experiment=sly"], tmp_path).trusted_packages
    assert read_settings(["trusted_packages=[mine]"]).trusted_packages == ["mine"]


@pytest.mark.parametrize("text", ["my photos/ünï#1", "a;b", "x=y", "naïve&co"])
def test_paths_need_no_quotes(text: str) -> None:
    assert read_settings(["data=image_folder", f"data.root={text}"]).data["root"] == text


def test_a_leading_tilde_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/homes/me")
    assert read_settings(["data=image_folder", "data.root=~/photos"]).data["root"] == "/homes/me/photos"
    assert read_settings(["data=image_folder", "data.root='~/photos'"]).data["root"] == "~/photos"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1e-3", 1e-3), ("null", None), ("true", True), ("[1,2]", [1, 2]), ("${seed}", 0), ("a/b.txt", "a/b.txt")],
)
def test_values_keep_their_types(value: str, expected: object) -> None:
    assert read_settings(["+expect={x: 0}", f"+expect.y={value}"]).expect == {"x": 0, "y": expected}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("5", r"five\.yaml: .*`key: value` lines, got 5"),
        ("defaults: 5", r"five\.yaml: defaults: must be a list"),
        ("_target_: x\n  hidden: 3\n", r"five\.yaml:2: not valid YAML"),
        ("a: [1\n", r"five\.yaml:\d: not valid YAML"),
    ],
)
def test_malformed_config_files_are_reported_with_name_and_line(tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "five.yaml").write_text(text)
    with pytest.raises(UserError, match=where):
        read_settings(["model=five"], tmp_path)


def test_evaluate_takes_its_groups_from_the_checkpoint() -> None:
    with pytest.raises(UserError, match="model: `evaluate` takes it from the checkpoint"):
        compose("evaluate", ["checkpoint=x", "model=mlp"])
    with pytest.raises(UserError, match="checkpoint: missing"):
        compose("evaluate", [])
