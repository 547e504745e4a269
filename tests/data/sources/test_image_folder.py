"""Folders of images: layouts and errors."""

import os
import shutil

import pytest

from cnntrain.config.schema import DataSettings
from cnntrain.data.load import load_data
from cnntrain.data.sources.image_folder import ImageFolder
from cnntrain.errors import UserError


def test_cifar10_archive_as_an_image_folder(shared, tmp_path):
    import tarfile

    with tarfile.open(shared("cifar10_images.tar.gz")) as archive:
        for _ in range(400):
            member = archive.next()
            if member is not None and member.isfile():
                relative = member.name.replace("test/", "train/", 1)
                (tmp_path / relative).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / relative).write_bytes(archive.extractfile(member).read())
    if len(list((tmp_path / "train").iterdir())) < 2:
        shutil.copytree(next((tmp_path / "train").iterdir()), tmp_path / "train" / "other")
    data = load_data(ImageFolder(str(tmp_path), size=32))
    assert data.train.images.shape[1:] == (3, 32, 32)


def test_image_folder_lists_classes_from_train(make_folder):
    root = make_folder("train", "val", "test")
    shutil.rmtree(root / "test" / "dog")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "cat" / ".hidden.png").write_bytes(b"")
    (root / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    source = ImageFolder(str(root), size=[24, 32])
    assert source.spec().classes == ("cat", "dog")
    assert source.spec().image_size == (24, 32)
    data = load_data(source)
    assert len(data.train) == len(data.val) == 12
    assert data.test is not None
    assert data.test.targets["label"].tolist() == [0] * 6
    assert data.train.names[0] == "train/cat/0.png"
    assert data.train.source_to_image.shape == (12, 3, 3)


def test_without_test_folder_there_is_no_test_split(make_folder):
    data = load_data(ImageFolder(str(make_folder("train")), size=16), DataSettings(val_fraction=0.25))
    assert data.test is None
    assert (len(data.train), len(data.val)) == (9, 3)
    assert not set(data.train.names) & set(data.val.names)


def test_all_bad_files_are_reported_together(make_folder):
    root = make_folder("train", "val")
    (root / "train/cat/empty.png").write_bytes(b"")
    (root / "train/dog/page.png").write_text("<html>")
    whole = (root / "val/dog/0.png").read_bytes()
    (root / "val/dog/0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as caught:
        load_data(ImageFolder(str(root), size=16))
    message = str(caught.value)
    assert "3 of 26 files" in message
    for name in (
        "train/cat/empty.png: is empty",
        "train/dog/page.png: is not an image",
        "val/dog/0.png: is truncated",
    ):
        assert name in message


def test_layout_errors_are_reported_together(make_folder, save, pixels):
    root = make_folder("train", "val")
    (root / "train" / "bird").mkdir()
    save(root / "val" / "dgo" / "1.png", pixels(4, 4))
    os.mkfifo(root / "train" / "cat" / "pipe")
    (root / "train" / "dog" / "loop").symlink_to(root / "train")
    with pytest.raises(UserError) as caught:
        ImageFolder(str(root)).load()
    message = str(caught.value)
    for part in (
        "train/bird: is a class without images",
        "val/dgo: is not a class of train; did you mean 'dog'?",
        "train/cat/pipe: is not a regular file",
        "train/dog/loop: is a link to one of its parent folders",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"root": None}, "data.root: missing"),
        ({"root": "nowhere/at/all"}, "does not exist"),
        ({"channels": 2}, "data.channels: must be 1 or 3"),
        ({"resize": "letterbx"}, "did you mean 'letterbox'"),
        ({"size": 0}, "data.size must be"),
    ],
)
def test_invalid_arguments_name_their_key(make_folder, arguments, part):
    with pytest.raises(UserError) as caught:
        ImageFolder(**{"root": str(make_folder()), **arguments})
    assert part in str(caught.value)


def test_a_folder_without_train_is_rejected_with_its_content(tmp_path):
    (tmp_path / "training").mkdir()
    with pytest.raises(UserError, match=r"has no train/ \(its folders are training\b"):
        ImageFolder(str(tmp_path)).spec()


def test_an_empty_root_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"has no train/ \(it has no folders\)"):
        ImageFolder(str(tmp_path)).spec()


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_each_name_of_the_validation_folder_is_accepted(make_folder, name):
    root = make_folder("train", name, "test")
    source = ImageFolder(str(root), size=16)
    splits = source.load()
    assert list(splits) == ["train", "val", "test"]
    assert splits["val"].names[0] == f"{name}/cat/0.png"
    data = load_data(source)
    assert data.has_own_val
    assert len(data.train) == len(data.val) == 12


def test_two_names_of_one_split_are_rejected(make_folder):
    root = make_folder("train", "val", "valid")
    with pytest.raises(UserError, match="'val' and 'valid'"):
        ImageFolder(str(root)).spec()


@pytest.mark.parametrize("name", ["Valid", "test1", "dev"])
def test_an_unknown_folder_with_images_is_rejected(make_folder, name):
    root = make_folder("train", name)
    with pytest.raises(UserError, match=rf"{name} is not a split, but contains {name}/cat/0\.png"):
        ImageFolder(str(root)).load()


def test_other_folders_without_images_and_run_folders_are_ignored(make_folder, save, pixels):
    root = make_folder("train")
    (root / "annotations").mkdir()
    (root / "annotations" / "list.txt").write_text("cat\n")
    (root / "outputs" / "a").mkdir(parents=True)
    (root / "outputs" / "a" / "run.json").write_text("{}")
    save(root / "outputs" / "a" / "figures" / "curves.png", pixels(4, 4))
    save(root / ".thumbnails" / "0.png", pixels(4, 4))
    assert list(ImageFolder(str(root)).load()) == ["train"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_outside_the_class_folders_are_rejected(make_folder, save, pixels, split):
    root = make_folder("train")
    save(root / split / "x.jpg", pixels(4, 4))
    with pytest.raises(UserError, match=rf"{split}: has 1 image\(s\) outside the class folders, for example x\.jpg"):
        ImageFolder(str(root)).load()
