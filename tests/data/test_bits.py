"""12 bits in files of 16: scaled by what they use where that is given, and noticed where it is not."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from cnntrain.cli import main
from cnntrain.config.compose import read_settings
from cnntrain.data.image_reader import BadFile, Decoder
from cnntrain.data.load import load_data
from cnntrain.data.sources.digits import Digits
from cnntrain.data.sources.image_folder import ImageFolder
from cnntrain.errors import UserError
from cnntrain.train.setup import assemble


def ramp(path: Path, highest: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.linspace(0, highest, 256).round().astype(np.uint16)[None].repeat(2, 0)).save(path)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label in ("a", "b"):
        for number in range(5):
            ramp(tmp_path / "train" / label / f"{number}.png", 4095 - number)
    return tmp_path


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 16])
def test_the_bits_that_are_used_fill_the_gray_levels(tmp_path: Path, bits: int) -> None:
    path = ramp(tmp_path / "a.png", 2**bits - 1)
    assert Decoder(2, 256, 1, bits=bits)(path)[0][0, 0].tolist() == list(range(256))


def test_eight_bits_and_floats_are_left_alone(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 77).save(tmp_path / "l.png")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "f.tif")
    assert int(Decoder(4, 4, 1, bits=12)(str(tmp_path / "l.png"))[0].max()) == 77
    assert int(Decoder(4, 4, 1, bits=12)(str(tmp_path / "f.tif"))[0].max()) == 128


def test_values_that_need_more_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="4096"):
        Decoder(2, 256, 1, bits=12)(ramp(tmp_path / "a.png", 4096))


def levels(data) -> int:
    assert isinstance(data.train.images, Tensor)
    return len(data.train.images.unique())


def test_files_that_use_few_of_their_bits_are_noticed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = ImageFolder(str(folder), size=[2, 256], channels=1, resize="stretch")
    with caplog.at_level(logging.WARNING, "cnntrain"):
        assert levels(load_data(source)) == 17
    assert "data.bits=12" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cnntrain"):
        assert levels(load_data(source, bits=12)) == 256
    assert not caplog.text


@pytest.mark.parametrize(("highest", "said"), [(5, "data.bits=9"), (4095, "data.bits=12"), (4096, None)])
def test_the_bits_that_are_named_are_those_that_are_needed(
    tmp_path: Path, highest: int, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    for label in ("a", "b"):
        for number in range(5):
            ramp(tmp_path / "train" / label / f"{number}.png", highest)
    with caplog.at_level(logging.WARNING, "cnntrain"):
        load_data(ImageFolder(str(tmp_path), size=8, channels=1))
    assert (said in caplog.text and f"no value above {highest}," in caplog.text) if said else not caplog.text


@pytest.mark.parametrize("other", ["16 bits", "8 bits"])
def test_nothing_is_said_of_sound_files(folder: Path, other: str, caplog: pytest.LogCaptureFixture) -> None:
    """One bright image of many is enough, in the sample or not."""
    if other == "16 bits":
        ramp(folder / "train" / "b" / "3.png", 30_000)
    else:
        for path in folder.rglob("*.png"):
            Image.new("L", (4, 4), 9).save(path)
    for sampled in (2, 100):
        with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "cnntrain"):
            patch.setattr("cnntrain.data.bits.SAMPLED_FILES", sampled)
            load_data(ImageFolder(str(folder), size=8, channels=1))
    assert "data.bits" not in caplog.text


def test_images_that_are_not_in_files_have_no_bits_to_choose() -> None:
    with pytest.raises(UserError, match=r"data\.bits"):
        load_data(Digits(), bits=12)
    for wrong in ("8", "17", "many"):
        settings = read_settings([f"data.bits={wrong}", "model=mlp"])
        with pytest.raises(UserError, match=r"data\.bits"):
            assemble(settings)


def test_predict_reads_files_as_the_training_did(folder: Path) -> None:
    quick = [
        "model=mlp",
        "model.values.width=4",
        "threads=1",
        "device=cpu",
        "log.figures=false",
        "log.tensorboard=false",
    ]
    data = [
        "data=image_folder",
        f"data.root={folder}",
        "data.size=8",
        "data.channels=1",
        "data.bits=12",
        "augment=none",
    ]
    assert main([*quick, *data, "epochs=1", "run_dir=run"]) == 0
    (folder / "asked").mkdir()
    sixteen = np.linspace(0, 65535, 256).round().astype(np.uint16)
    Image.fromarray((sixteen // 16)[None].repeat(2, 0)).save(folder / "asked" / "twelve.png")
    Image.fromarray((sixteen // 257).astype(np.uint8)[None].repeat(2, 0)).save(folder / "asked" / "eight.png")
    assert (
        main(
            ["predict", "checkpoint=run", f"images={folder / 'asked'}", "threads=1", "draw=0", "run_dir=out"]
        )
        == 0
    )
    rows = json.loads(Path("out/predictions.json").read_text())["images"]
    one, other = (row["probabilities"]["a"] for row in rows)
    assert one == pytest.approx(other, abs=0.01)
