"""Answers about files of any size, in the files' own pixels, without the dataset."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cnntrain.cli import main
from cnntrain.config.compose import read_settings
from cnntrain.data.decoder import resize_geometry
from cnntrain.report.mask_files import mask_names, outside_image, write_mask
from cnntrain.train import checkpoint
from cnntrain.train.checkpoint import checkpoint_metadata
from cnntrain.train.setup import build_components
from cnntrain.train.state import Progress

FEW = ["data.train_count=4", "data.test_count=1", "data.size=32"]


def make_checkpoint(*overrides: str, data: dict[str, Any] | None = None) -> Path:
    """A checkpoint whose weights are all 0, so that its answers are known: even odds, the canvas's center."""
    assembly = build_components(read_settings([*overrides, "threads=1", "device=cpu"]))
    with torch.no_grad():
        for parameter in assembly.model.parameters():
            parameter.zero_()
    facts = checkpoint_metadata(assembly, assembly.load(), run={})
    facts["config"]["data"] |= data or {}
    rest = {"optimizer": {}, "schedule": {}, "progress": asdict(Progress()), "meter": {}}
    state = {"model": assembly.model.state_dict(), "ema": None, **rest}
    Path("run").mkdir()
    checkpoint.save({"state": state, **facts}, Path("run/checkpoints/best.pt"))
    return Path("run")


def make_images() -> Path:
    """Images of several sizes and modes, one in a folder below, and a file that is none."""
    folder = Path("mine")
    (folder / "below").mkdir(parents=True)
    Image.new("RGB", (60, 40), (200, 10, 10)).save(folder / "wide.png")
    Image.new("RGBA", (40, 80), (0, 10, 10, 90)).save(folder / "below" / "tall.png")
    Image.new("P", (9, 9)).save(folder / "tiny.gif")
    Image.fromarray(np.full((30, 50), 40_000, dtype=np.uint16)).save(folder / "sixteen.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "paper.pdf").write_bytes(b"%PDF-1.4")  # which Pillow writes and does not read
    return folder


def predict(*arguments: str) -> tuple[list[dict[str, str]], dict[str, Any]]:
    assert main(["predict", "checkpoint=run", "run_dir=out", "threads=1", "device=cpu", *arguments]) == 0
    with Path("out/predictions.csv").open() as file:
        return list(csv.DictReader(file)), json.loads(Path("out/predictions.json").read_text())


def test_points_are_in_source_pixels() -> None:
    make_checkpoint("data=toy_faces", *FEW, "model=mlp")
    make_images()
    rows, told = predict("images=mine")
    sizes = {"wide.png": (60, 40), "below/tall.png": (40, 80), "tiny.gif": (9, 9), "sixteen.png": (50, 30)}
    assert {row["image_name"] for row in rows} == set(sizes)
    for row, nested in zip(rows, told["images"], strict=True):
        width, height = sizes[row["image_name"]]
        back = resize_geometry(width, height, (32, 32), "letterbox").matrix().inverse()
        center = (back @ torch.tensor([15.5, 15.5, 1]).double())[:2].tolist()
        assert center == pytest.approx([(width - 1) / 2, (height - 1) / 2], abs=1)  # borders are whole pixels
        assert [float(row["left_eye_x"]), float(row["left_eye_y"])] == pytest.approx(center, abs=1e-3)
        assert nested["points"]["mouth"] == pytest.approx(center) and set(nested) == {"image_name", "points"}
    assert Path("out/figures/predictions-001.png").stat().st_size > 5000


def test_probabilities_and_a_single_file() -> None:
    make_checkpoint("data=digits", "model=mlp")
    Image.new("RGB", (20, 31)).save("one.jpg")
    rows, told = predict("images=one.jpg", "draw=0")
    assert rows[0]["image_name"] == "one.jpg" and float(rows[0]["probability/3"]) == pytest.approx(0.1)
    assert sum(told["images"][0]["probabilities"].values()) == pytest.approx(1)
    assert "probability/3" not in told["images"][0] and told["images"][0]["probability"] == pytest.approx(0.1)
    assert not Path("out/figures").exists() or not any(Path("out/figures").iterdir())


def test_masks_have_the_size_of_the_image() -> None:
    make_checkpoint("data=toy_shapes", *FEW, "model=unet_small", data={"resize": "short_side"})
    make_images()
    rows, _ = predict("images=mine")
    masks = {row["image_name"]: np.asarray(Image.open(Path("out") / row["mask"])) for row in rows}
    assert masks["below/tall.png"].shape == (80, 40) and masks["wide.png"].shape == (40, 60)
    # short_side shows the middle square; the rest the network has not seen
    assert (masks["wide.png"][:, 10:50] == 0).all() and (masks["wide.png"][:, :10] == 255).all()
    assert float(rows[0]["share/background"]) == 1


@pytest.mark.parametrize("resize", ["letterbox", "short_side", "stretch"])
def test_masks_are_resampled_to_the_source(resize: Any) -> None:
    """Enlarged onto the canvas and back, ids are those of before, wherever the canvas reached."""
    ids = np.random.default_rng(0).integers(0, 5, (12, 20), dtype=np.uint8)
    placement = resize_geometry(20, 12, (96, 96), resize)
    matrix = placement.matrix()
    canvas_y, canvas_x = np.mgrid[0:96, 0:96]
    x = np.rint((canvas_x - float(matrix[0, 2])) / float(matrix[0, 0])).astype(int)
    y = np.rint((canvas_y - float(matrix[1, 2])) / float(matrix[1, 1])).astype(int)
    known = (x >= 0) & (x < 20) & (y >= 0) & (y < 12)
    on_canvas = np.where(known, ids[y.clip(0, 11), x.clip(0, 19)], 99).astype(np.uint8)
    write_mask(on_canvas, matrix, (20, 12), 255, Path("mask.png"))
    back = np.asarray(Image.open("mask.png"))
    assert back.shape == ids.shape
    assert ((back == ids) | (back == 255)).all() and (back == ids).mean() > (0.5 if resize == "short_side" else 0.99)


def test_mask_names_are_unique() -> None:
    assert mask_names(["a.jpg", "b/a.png", "c.jpg", "c.png"]) == ["a.png", "b/a.png", "c.jpg.png", "c.png.png"]


def test_the_dataset_is_not_needed() -> None:
    for name in ("cat", "dog"):
        Path(f"pets/train/{name}").mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(f"pets/train/{name}/{i}.png")
    make_checkpoint("data=image_folder", "data.root=pets", "data.size=16", "model=mlp")
    Path("pets").rename("gone")
    rows, _ = predict("images=gone/train/cat")
    assert [row["predicted"] for row in rows] == ["cat"] * 3  # even odds: the first one


def test_all_bad_images_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint("data=digits", "model=mlp")
    make_images()
    Path("mine/empty.png").touch()
    Path("mine/text.jpg").write_text("no image")
    whole = Path("mine/wide.png").read_bytes()
    Path("mine/half.png").write_bytes(whole[: len(whole) // 2])
    assert main(["predict", "checkpoint=run", "images=mine", "run_dir=out"]) == 2
    said = capsys.readouterr().err
    assert "empty.png" in said and "text.jpg" in said and "half.png" in said and "wide.png" not in said
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images=nowhere", "checkpoint=run"], "images: nowhere does not exist"),
        (["images=empty", "checkpoint=run"], "has no images"),
        (["checkpoint=run"], "images: missing"),
        (["images=one.png", "checkpoint=run"], "no checkpoint there"),
        (["images=one.png", "checkpoint=run", "drew=3"], "did you mean 'draw'"),
        (["here", "images=one.png"], "is not an override"),
    ],
)
def test_invalid_arguments_exit_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Image.new("L", (4, 4)).save("one.png")
    assert main(["predict", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_objects_are_cropped_by_given_boxes() -> None:
    make_checkpoint("data=toy_faces", *FEW, "model=mlp", data={"crop": "points", "crop_margin": 0.25})
    make_images()
    lines = ["wide.png,10,5,30,25", "wide.png,30,10,50,20", "below/tall.png,0,0,20,20"]
    Path("boxes.csv").write_text("image_name,box_left,box_top,box_right,box_bottom\n" + "\n".join(lines) + "\n")
    rows, told = predict("images=mine", "boxes=boxes.csv")
    assert [row["image_name"] for row in rows] == ["wide.png:0", "wide.png:1", "below/tall.png"]
    for row, center in zip(rows, [(19.5, 14.5), (39.5, 14.5), (9.5, 9.5)], strict=True):  # the canvas's center
        point = (float(row["left_eye_x"]), float(row["left_eye_y"]))
        assert point == pytest.approx(center, abs=1e-4)
    assert told["images"][1]["points"]["left_eye"] == pytest.approx([39.5, 14.5], abs=1e-4)


def test_all_invalid_lines_of_boxes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint("data=toy_faces", *FEW, "model=mlp")
    make_images()
    lines = ["wide.png,10,5,30,25", "nobody.png,1,1,2,2", "wide.png,5,5,5,9", "wide.png,a,1,2,3", "wide.png,1,2"]
    Path("boxes.csv").write_text("image_name,box_left,box_top,box_right,box_bottom\n" + "\n".join(lines) + "\n")
    assert main(["predict", "checkpoint=run", "images=mine", "boxes=boxes.csv", "run_dir=out"]) == 2
    told = capsys.readouterr().err
    for line, problem in ((3, "not one of the images"), (4, "the box is empty"), (5, "four sides"), (6, "3 columns")):
        assert any(f"boxes.csv:{line}: " in part and problem in part for part in told.splitlines()), told
    assert not Path("out").exists()


def test_outside_image_marks_the_borders() -> None:
    """A 20x10 image letterboxed onto 40x40: twice as large, with borders of 10 px above and below."""
    matrix = torch.tensor([[2.0, 0.0, 0.5], [0.0, 2.0, 10.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    outside = outside_image(matrix, (20, 10), (40, 40))
    assert outside[:10].all() and outside[30:].all() and not outside[10:30].any()
