"""Mask sources: pairs of files, ids, padding and errors."""

import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cnntrain.cli import main
from cnntrain.config.compose import read_settings
from cnntrain.config.schema import DataSettings
from cnntrain.data.load import load_data
from cnntrain.data.loader import make_loader
from cnntrain.data.sources.mask_folder import MaskFolder, OxfordIIITPet, VOCSegmentation
from cnntrain.errors import UserError
from cnntrain.train.setup import build_source


@pytest.fixture
def root(tmp_path, save, pixels):
    """Three training and one test image of 24 x 16, the left half class 1; id 255 in a corner."""
    for split, count in (("train", 3), ("test", 1)):
        for i in range(count):
            save(tmp_path / split / "images" / f"{i}.jpg", pixels(16, 24, seed=i))
            ids = np.zeros((16, 24), np.uint8)
            ids[:, :12] = 1
            ids[0, 0] = 255
            save(tmp_path / split / "masks" / f"{i}.png", ids)
    return tmp_path


def folder(root, **arguments) -> MaskFolder:
    return MaskFolder(str(root), **{"classes": ["ground", "thing"], "size": [16, 24], **arguments})


def test_mask_values_are_read_unchanged(root):
    data = load_data(folder(root))
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (2, 1, 1)
    mask = data.test.targets["mask"][0]
    assert mask.dtype == torch.uint8
    assert mask[0, 0] == 255
    assert (mask[1:, :12] == 1).all()
    assert (mask[:, 12:] == 0).all()
    assert data.spec.ignore_index == 255


def test_streamed_and_cached_masks_are_equal(root):
    order = torch.tensor([1, 0])
    cached = load_data(folder(root, size=[20, 20], resize="letterbox"))
    streamed = load_data(folder(root, size=[20, 20], resize="letterbox"), DataSettings(cache="none"))
    expected = next(make_loader(cached.train, "cpu").batches(order, 2))
    assert (expected.targets["mask"][:, 0] == 255).all()
    assert cached.fingerprint == streamed.fingerprint
    for workers in (0, 1):
        loader = make_loader(streamed.train, "cpu", workers=workers)
        found = next(loader.batches(order, 2))
        loader.close()
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.targets["mask"], expected.targets["mask"])
        assert torch.equal(found.source_to_image, expected.source_to_image)


def test_all_errors_are_reported_together(root, save, pixels):
    masks = root / "train" / "masks"
    save(masks / "0.png", np.full((16, 24), 7, np.uint8))
    save(masks / "1.png", np.zeros((16, 23), np.uint8))
    (masks / "2.png").unlink()
    save(masks / "other.png", np.zeros((4, 4), np.uint8))
    Image.fromarray(pixels(16, 24)).save(root / "test" / "masks" / "0.png")
    with pytest.raises(UserError) as caught:
        folder(root).load()
    for part in (
        "train/masks/0.png: has values that are not class ids: 7",
        "train/masks/1.png: is 23 x 16 pixels, but its image is 24 x 16",
        "train/images/2.jpg: has no mask",
        "train/masks/other.png: has no image",
        "test/masks/0.png: must contain class ids (gray or palette), but is RGB",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("mode", ["P", "1", "I;16"])
def test_palette_and_rgb_masks_contain_ids(root, mode):
    ids = np.zeros((16, 24), np.uint8)
    ids[4:8] = 1
    mask = Image.fromarray(ids)
    if mode == "P":
        mask = Image.frombytes("P", (24, 16), ids.tobytes())
        mask.putpalette([255, 0, 0, 0, 255, 0] + [9] * 762)
    elif mode == "1":
        mask = Image.fromarray(ids.astype(bool))
    else:
        mask = Image.fromarray(ids.astype(np.uint16))
    mask.save(root / "test" / "masks" / "0.png")
    data = load_data(folder(root))
    assert data.test is not None
    assert data.test.targets["mask"][0].tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"classes": None}, "data.classes"),
        ({"classes": ["a"]}, "data.classes"),
        ({"classes": ["a", "a"]}, "data.classes"),
        ({"ignore_index": 256}, "data.ignore_index"),
    ],
)
def test_invalid_arguments_name_their_key(root, arguments, part):
    with pytest.raises(UserError) as caught:
        folder(root, **arguments)
    assert part in str(caught.value)


def test_a_folder_without_images_is_rejected_with_the_layout(tmp_path):
    with pytest.raises(UserError, match="has no train/ "):
        folder(tmp_path).load()
    (tmp_path / "train" / "masks").mkdir(parents=True)
    with pytest.raises(UserError, match="has no train/images/"):
        folder(tmp_path).load()


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_each_name_of_the_validation_folder_is_accepted(root, name):
    (root / "test").rename(root / name)
    splits = folder(root).load()
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 3, "val": 1}
    shutil.copytree(root / name, root / "val")
    with pytest.raises(UserError, match=f"'val' and '{name}'|'{name}' and 'val'"):
        folder(root).load()


def test_an_unknown_folder_with_images_is_rejected(root):
    (root / "test").rename(root / "testing")
    with pytest.raises(UserError, match="testing is not a split"):
        folder(root).load()


CAMVID = "sky building pole road pavement tree sign fence car pedestrian bicyclist"


def test_camvid(shared, tmp_path):
    for split in ("train", "val"):
        for image in sorted((shared("camvid") / split / "images").iterdir())[:: {"train": 40, "val": 12}[split]][:8]:
            for file in (image, image.parent.parent / "masks" / f"{image.stem}.png"):
                copy = tmp_path / split / file.parent.name / file.name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
    source = MaskFolder(str(tmp_path), classes=CAMVID.split(), ignore_index=11, size=[180, 240])
    data = load_data(source)
    assert (len(data.train), len(data.val), data.test) == (8, 8, None)
    assert data.train.source_to_image.equal(torch.eye(3, dtype=torch.float64).expand(8, 3, 3))
    share = torch.bincount(data.train.targets["mask"].flatten().long(), minlength=12) / (8 * 180 * 240)
    assert share[1] > 0.2  # buildings
    with pytest.raises(UserError, match="not class ids: 11"):
        MaskFolder(str(tmp_path), classes=CAMVID.split(), ignore_index=255).load()


def test_pets_and_voc_in_the_layout_of_torchvision(tmp_path, save, pixels):
    pet, voc = tmp_path / "oxford-iiit-pet", tmp_path / "VOCdevkit" / "VOC2012"
    trimap = np.array([[1, 2, 3], [1, 2, 3]], np.uint8)
    for file in ("trainval", "test"):
        (pet / "annotations").mkdir(parents=True, exist_ok=True)
        (pet / "annotations" / f"{file}.txt").write_text(f"# comment\n{file}_1 1 1 1\n")
        save(pet / "images" / f"{file}_1.jpg", pixels(2, 3))
        save(pet / "annotations" / "trimaps" / f"{file}_1.png", trimap)
    for split in ("train", "val"):
        (voc / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"{split}_1\n")
        save(voc / "JPEGImages" / f"{split}_1.jpg", pixels(2, 3))
        save(voc / "SegmentationClass" / f"{split}_1.png", np.array([[0, 20, 255]] * 2, np.uint8))
    splits = OxfordIIITPet(str(tmp_path), size=[2, 3]).load()
    assert set(splits) == {"train", "test"}
    assert splits["train"].lazy_targets["mask"][0].tolist() == [[1, 0, 255]] * 2
    splits = VOCSegmentation(str(tmp_path), size=[2, 3]).load()
    assert set(splits) == {"train", "val"}
    assert splits["val"].lazy_targets["mask"][0].tolist() == [[0, 20, 255]] * 2


def write_masks(root, save, pixels, split: str, *masks: np.ndarray, ending: str = "png") -> None:
    for i, mask in enumerate(masks):
        save(root / split / "images" / f"{i}.png", pixels(*mask.shape[:2], seed=i))
        save(root / split / "masks" / f"{i}.{ending}", mask)


def halves(left: int, right: int) -> np.ndarray:
    """(8, 12) uint8."""
    return np.repeat(np.array([[left] * 6 + [right] * 6], np.uint8), 8, 0)


def train_masks(source: MaskFolder) -> torch.Tensor:
    masks = source.load()["train"].lazy_targets["mask"]
    return torch.stack([masks[i] for i in range(len(masks))])


@pytest.mark.parametrize("kind", ["gray", "RGB", "RGBA", "palette"])
def test_masks_with_only_0_and_255_have_two_classes(tmp_path, save, pixels, caplog, kind):
    masks = [halves(255, 0), halves(0, 255), halves(0, 0)]
    files = masks
    if kind == "RGB":
        files = [np.stack([mask] * 3, -1) for mask in masks]
    elif kind == "RGBA":
        files = [np.stack([mask] * 3 + [np.full_like(mask, 255)], -1) for mask in masks]
    write_masks(tmp_path, save, pixels, "train", *files)
    if kind == "palette":
        for i, mask in enumerate(masks):
            image = Image.frombytes("P", (12, 8), mask.tobytes())
            image.putpalette([0, 0, 0] + [9] * 762 + [255, 255, 255])
            image.save(tmp_path / "train" / "masks" / f"{i}.png")
    with caplog.at_level(logging.INFO, "cnntrain"):
        found = train_masks(folder(tmp_path, size=[8, 12]))
    assert found.tolist() == [(mask // 255).tolist() for mask in masks]
    assert "255 means class thing" in caplog.text and "data.ids" in caplog.text


def test_a_run_on_0_255_masks_evaluates_the_object_class(tmp_path, save, pixels):
    write_masks(tmp_path, save, pixels, "train", *[halves(255, 0), halves(0, 255)] * 2)
    data = load_data(folder(tmp_path, size=[8, 12]))
    counts = torch.bincount(data.train.targets["mask"].flatten().long(), minlength=256)
    assert counts.nonzero().flatten().tolist() == [0, 1]
    assert counts[1] == len(data.train) * 48


@pytest.mark.parametrize("split", ["train", "test"])
def test_255_is_ignored_if_any_split_contains_1(tmp_path, save, pixels, split, caplog):
    write_masks(tmp_path, save, pixels, "train", halves(0, 1), halves(255, 0))
    if split == "test":
        write_masks(tmp_path, save, pixels, "train", halves(0, 1), halves(1, 0))
        write_masks(tmp_path, save, pixels, "test", halves(255, 0))
    with caplog.at_level(logging.WARNING, "cnntrain"):
        splits = folder(tmp_path, size=[8, 12]).load()
    assert splits[split].lazy_targets["mask"][int(split == "train")].tolist() == halves(255, 0).tolist()
    assert "masks have the value 1 and 1 others 255" in caplog.text


def test_a_border_of_255_around_objects_of_1_causes_no_warning(tmp_path, save, pixels, caplog):
    bordered = halves(0, 1)
    bordered[:, 5] = 255
    write_masks(tmp_path, save, pixels, "train", bordered, halves(0, 0), halves(255, 0), halves(0, 1))
    with caplog.at_level(logging.INFO, "cnntrain"):
        assert set(train_masks(folder(tmp_path, size=[8, 12])).flatten().tolist()) == {0, 1, 255}
    assert not caplog.records


@pytest.mark.parametrize("ignore_index", [0, 1])
def test_255_is_not_a_class_if_a_class_is_ignored(tmp_path, save, pixels, ignore_index):
    write_masks(tmp_path, save, pixels, "train", halves(255, 0))
    with pytest.raises(UserError, match="not class ids: 255"):
        folder(tmp_path, ignore_index=ignore_index).load()


def test_ids_map_values_to_classes(tmp_path, save, pixels):
    write_masks(tmp_path, save, pixels, "train", halves(7, 128), halves(255, 7))
    ids = {7: 1, "128": 0}
    found = train_masks(folder(tmp_path, size=[8, 12], ids=ids))
    assert found[:, 0].tolist() == [[1] * 6 + [0] * 6, [255] * 6 + [1] * 6]
    found = train_masks(folder(tmp_path, size=[8, 12], ids={**ids, 255: 0}))
    assert found[:, 0].tolist() == [[1] * 6 + [0] * 6, [0] * 6 + [1] * 6]


@pytest.mark.parametrize("ids", [{0: 2}, {256: 0}, {-1: 0}, {0: True}, {0: 0.5}, {"a": 0}, {0: None}, [0, 1], 5])
def test_invalid_ids_are_rejected(tmp_path, ids):
    with pytest.raises(UserError, match=r"data\.ids"):
        folder(tmp_path, ids=ids)


@pytest.mark.parametrize(
    ("masks", "classes", "parts"),
    [
        ([halves(0, 0)], 2, ["no pixels of c1", "their values are 0"]),
        ([halves(255, 255)], 2, ["no pixels of c0;"]),
        ([halves(0, 1)], 3, ["no pixels of c2"]),
        (
            [halves(0, 1), halves(255, 0)],
            3,
            ["no pixels of c2", "255 is ignored", "data.ids='{0: 0, 1: 1, 255: 2}'"],
        ),
        ([halves(1, 2)], 2, ["not class ids: 2", "data.ids='{1: 0, 2: 1}'"]),
        ([halves(0, 128), halves(255, 0)], 3, ["not class ids: 128", "data.ids='{0: 0, 128: 1, 255: 2}'"]),
        ([halves(0, 128), halves(255, 3)], 2, ["not class ids: 128", "losslessly"]),
    ],
)
def test_a_class_without_training_pixels_is_rejected(tmp_path, save, pixels, masks, classes, parts):
    write_masks(tmp_path, save, pixels, "train", *masks)
    with pytest.raises(UserError) as caught:
        folder(tmp_path, classes=[f"c{i}" for i in range(classes)]).load()
    for part in parts:
        assert part in str(caught.value)


def test_an_ignored_class_needs_no_pixels(tmp_path, save, pixels):
    write_masks(tmp_path, save, pixels, "train", halves(1, 2))
    source = folder(tmp_path, classes=["void", "a", "b"], ignore_index=0, size=[8, 12])
    assert train_masks(source)[0].tolist() == halves(1, 2).tolist()


@pytest.mark.parametrize(("shape", "found"), [((7, 12), "12 x 7"), ((8, 11), "11 x 8"), ((12, 8), "8 x 12")])
def test_a_mask_with_another_size_than_its_image_is_rejected(tmp_path, save, pixels, shape, found):
    write_masks(tmp_path, save, pixels, "train", halves(0, 1))
    save(tmp_path / "train" / "masks" / "0.png", np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match=f"is {found} pixels, but its image is 12 x 8"):
        folder(tmp_path).load()


def test_values_above_255_are_rejected(tmp_path, save, pixels):
    write_masks(tmp_path, save, pixels, "train", halves(0, 1))
    deep = halves(0, 1).astype(np.uint16)
    deep[0, 0] = 300
    Image.fromarray(deep).save(tmp_path / "train" / "masks" / "0.png")
    with pytest.raises(UserError, match="not class ids: above 255"):
        folder(tmp_path).load()


def test_transparent_masks_are_rejected(tmp_path, save, pixels):
    mask = np.stack([halves(0, 255)] * 4, -1)
    write_masks(tmp_path, save, pixels, "train", mask)
    with pytest.raises(UserError, match="class ids"):
        folder(tmp_path).load()


def test_ids_can_be_set_on_the_command_line(tmp_path, save, pixels):
    write_masks(tmp_path, save, pixels, "train", halves(7, 9))
    given = ["data=mask_folder", f"data.root={tmp_path}", "data.classes=[a,b]", "data.size=[8,12]"]
    source = build_source(read_settings([*given, "data.ids={7: 0, 9: 1}"]))
    assert source.load()["train"].lazy_targets["mask"][0].tolist() == halves(0, 1).tolist()
    source = build_source(read_settings(given))
    with pytest.raises(UserError, match=r"data\.ids='\{7: 0, 9: 1\}'"):
        source.load()


def test_class_names_of_masks_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data=mask_folder", "data.root=."]) == 2
    said = capsys.readouterr().err
    assert "data.classes: missing" in said and "data.classes=[background,object]" in said
