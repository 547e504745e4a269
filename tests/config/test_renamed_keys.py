"""Old config keys and values end with exit code 2 and the new name."""

from pathlib import Path

import pytest

from cnntrain.cli import main
from cnntrain.config.renamed_keys import KEYS, VALUES, renamed

GROUPS = {"task": ["data=toy_shapes", "model=unet_small"], "data": ["data=keypoint_csv", "data.file=x.csv"]}


@pytest.mark.parametrize("old", [key for key in KEYS if "*" not in key])
def test_old_keys_are_rejected(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GROUPS.get(old.partition(".")[0], []), f"{old}=1"]) == 2
    assert f"renamed to {KEYS[old]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "new"),
    [
        (["augment=random_erasing", "augment.random_erasing.area=[0,1]"], "augment.random_erasing.scale"),
        (["augment=crop", "augment.crop.padding_px=2"], "augment.crop.padding"),
        (["augment=[flip,erasing]"], "augment=random_erasing"),
        (["augment=random_erasing", "augment.erasing.probability=1"], "augment.random_erasing"),
        *(([f"{key}={old}"], f"{key}={new}") for key in ("augment", "data.cache") for old, new in VALUES[key].items()),
        (["data=toy_shapes", "model=unet_small", "task.loss=sum", "run_dir=r"], "task.loss=ce_dice"),
    ],
)
def test_old_options_arguments_and_values_are_rejected(
    typed: list[str], new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(typed) == 2
    assert f"renamed to {new}" in capsys.readouterr().err


def test_old_arguments_in_user_files_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "conf/augment/mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("mine:\n  _target_: cnntrain.augment.geometry.Crop\n  padding_px: 2\n")
    assert main(["--config-dir", "conf", "augment=mine", "run_dir=r"]) == 2
    assert "augment.mine.padding_px" in (message := capsys.readouterr().err) and "augment.mine.padding" in message


def test_new_names_give_no_hint() -> None:
    assert not any(renamed(new) for new in KEYS.values())
    assert not any(renamed(key, new) for key, values in VALUES.items() for new in values.values())
