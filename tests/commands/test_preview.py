"""Preview draws what a training would see, and trains nothing."""

from pathlib import Path

import pytest
import torch

from cnntrain.cli import main
from cnntrain.commands.preview import epoch_positions
from cnntrain.config.compose import read_settings
from cnntrain.data.load import load_data
from cnntrain.data.loader import make_loader
from cnntrain.randomness import epoch_order
from cnntrain.train.setup import build_pipeline, build_source

SMALL = ["preview.images=2", "preview.epochs=2", "threads=1", "run_dir=out"]
FEW = ["data.train_count=6", "data.test_count=1"]
PNG = b"\x89PNG"


def drawn() -> set[str]:
    assert not Path("out/checkpoints").exists() or not any(Path("out/checkpoints").iterdir())
    return {path.name for path in Path("out/figures").iterdir() if path.read_bytes().startswith(PNG)}


def test_keypoints_and_their_flip(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", "data=toy_faces", *FEW, *SMALL]) == 0
    assert drawn() == {"augmented.png", "flip.png"}
    assert "out/figures/flip.png" in capsys.readouterr().out
    events = b"".join(path.read_bytes() for path in Path("out").glob("events.*"))
    assert b"preview/augmented" in events and b"preview/flip" in events


@pytest.mark.parametrize("overrides", [["data=toy_shapes", *FEW], ["data=digits"], ["data=digits", "augment=mixup"]])
def test_masks_and_labels(overrides: list[str]) -> None:
    assert main(["preview", *overrides, *SMALL]) == 0
    assert drawn() == {"augmented.png"}


def test_images_equal_those_of_the_training() -> None:
    """Draws depend on an image's position in the epoch: preview gives each image the position it will have."""
    settings = read_settings(["data=toy_faces", *FEW, "augment=faces", "seed=3"])
    source = build_source(settings)
    data = load_data(source)
    pipeline, loader = build_pipeline(settings, data.spec), make_loader(data.train, "cpu")
    rows = torch.tensor([0, 3])
    for epoch in range(2):
        positions = epoch_positions(rows, len(loader), settings.seed, epoch)
        shown = pipeline(next(loader.batches(rows, 2, positions=positions)), 3, epoch)
        trained = pipeline(next(loader.batches(epoch_order(3, epoch, len(loader)), len(loader))), 3, epoch)
        for i, row in enumerate(rows.tolist()):
            there = trained.index.tolist().index(row)
            assert torch.equal(shown.images[i], trained.images[there])
            assert torch.equal(shown.targets["points"][i], trained.targets["points"][there])


def test_a_flip_without_flip_pairs_is_rejected_before_output(capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save("one.png")
    Path("points.csv").write_text("image_name,a_x,a_y,b_x,b_y\none.png,1,2,5,2\n")
    assert main(["preview", "data=keypoint_csv", "data.file=points.csv", "augment=flip", *SMALL]) == 2
    assert "data.flip_pairs" in capsys.readouterr().err
    assert not Path("out").exists()


def test_words_are_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", "flip"]) == 2
    assert "is not an override" in capsys.readouterr().err
