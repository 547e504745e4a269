"""Images with masks: pairs, ids, borders, and how the sources say what is wrong."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from cnntrain.data.load import load_data
from cnntrain.data.mask_folder import MaskFolder
from cnntrain.data.store import make_loader
from cnntrain.data.torchvision_masks import OxfordIIITPet, VOCSegmentation
from cnntrain.errors import UserError


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


def test_masks_are_read_as_they_are(root):
    data = load_data(folder(root))
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (2, 1, 1)
    mask = data.test.targets["mask"][0]
    assert mask.dtype == torch.uint8
    assert mask[0, 0] == 255
    assert (mask[1:, :12] == 1).all()
    assert (mask[:, 12:] == 0).all()
    assert data.spec.ignore_index == 255


def test_streamed_and_resident_masks_agree(root):
    order = torch.tensor([1, 0])
    resident = load_data(folder(root, size=[20, 20], resize="letterbox"))
    streamed = load_data(folder(root, size=[20, 20], resize="letterbox"), store="stream")
    expected = next(make_loader(resident.train, "cpu").batches(order, 2))
    assert (expected.targets["mask"][:, 0] == 255).all()
    assert resident.fingerprint == streamed.fingerprint
    for workers in (0, 1):
        loader = make_loader(streamed.train, "cpu", workers=workers)
        found = next(loader.batches(order, 2))
        loader.close()
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.targets["mask"], expected.targets["mask"])
        assert torch.equal(found.to_canvas, expected.to_canvas)


def test_all_faults_are_reported_at_once(root, save, pixels):
    masks = root / "train" / "masks"
    save(masks / "0.png", np.full((16, 24), 7, np.uint8))
    save(masks / "1.png", np.zeros((16, 23), np.uint8))
    (masks / "2.png").unlink()
    save(masks / "other.png", np.zeros((4, 4), np.uint8))
    Image.fromarray(pixels(16, 24)).save(root / "test" / "masks" / "0.png")
    with pytest.raises(UserError) as caught:
        folder(root).load()
    for part in (
        "train/masks/0.png: has ids that are no class: 7",
        "train/masks/1.png: is 23 x 16 pixels, its image 24 x 16",
        "train/images/2.jpg: has no mask",
        "train/masks/other.png: has no image",
        "test/masks/0.png: must hold class ids (grey or palette), but is RGB",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("mode", ["P", "1", "I;16"])
def test_other_kinds_of_masks_hold_ids_too(root, mode):
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
def test_wrong_arguments_name_their_key(root, arguments, part):
    with pytest.raises(UserError) as caught:
        folder(root, **arguments)
    assert part in str(caught.value)


def test_a_folder_without_images_says_how_it_must_be(tmp_path):
    with pytest.raises(UserError, match="has no train/ "):
        folder(tmp_path).load()
    (tmp_path / "train" / "masks").mkdir(parents=True)
    with pytest.raises(UserError, match="has no train/images/"):
        folder(tmp_path).load()


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_a_validation_folder_is_used_under_each_of_its_names(root, name):
    (root / "test").rename(root / name)
    splits = folder(root).load()
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 3, "val": 1}
    shutil.copytree(root / name, root / "val")
    with pytest.raises(UserError, match=f"'val' and '{name}'|'{name}' and 'val'"):
        folder(root).load()


def test_a_folder_of_images_beside_train_that_is_no_split_is_refused(root):
    (root / "test").rename(root / "testing")
    with pytest.raises(UserError, match="testing is no split"):
        folder(root).load()


CAMVID = "sky building pole road pavement tree sign fence car pedestrian bicyclist"


def test_camvid(shared, tmp_path):
    for split in ("train", "val"):
        for image in sorted((shared("camvid") / split / "images").iterdir())[:8]:
            for file in (image, image.parent.parent / "masks" / f"{image.stem}.png"):
                copy = tmp_path / split / file.parent.name / file.name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
    source = MaskFolder(str(tmp_path), classes=CAMVID.split(), ignore_index=11, size=[180, 240])
    data = load_data(source)
    assert (len(data.train), len(data.val), data.test) == (8, 8, None)
    assert data.train.to_canvas.equal(torch.eye(3, dtype=torch.float64).expand(8, 3, 3))
    share = torch.bincount(data.train.targets["mask"].flatten().long(), minlength=12) / (8 * 180 * 240)
    assert share[1] > 0.2  # buildings
    with pytest.raises(UserError, match="no class: 11"):
        MaskFolder(str(tmp_path), classes=CAMVID.split(), ignore_index=255).load()


def test_pets_and_voc_from_their_own_layouts(tmp_path, save, pixels):
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
