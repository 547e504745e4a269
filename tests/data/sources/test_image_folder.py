"""Sources of labeled images: layouts and errors."""

import gzip
import os
import shutil
import tracemalloc

import numpy as np
import pytest
import torch

from cnntrain.config.schema import DataSettings
from cnntrain.data.load import load_data
from cnntrain.data.sources import mnist
from cnntrain.data.sources.cifar import CIFAR10, CIFAR100, CIFAR100_CLASSES
from cnntrain.data.sources.digits import Digits
from cnntrain.data.sources.image_csv import ImageCsv
from cnntrain.data.sources.image_folder import ImageFolder
from cnntrain.data.sources.mnist import MNIST, FashionMNIST
from cnntrain.errors import UserError


def test_digits_equal_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    splits = Digits().load()
    train, test = splits["train"], splits["test"]
    assert (len(train), len(test)) == (1438, 359)
    reference = load_digits()
    rows = [int(name.removeprefix("digits/")) for name in train.names + test.names]
    assert sorted(rows) == list(range(1797))
    images = torch.cat([train.images, test.images])[:, 0]
    assert np.array_equal(images.numpy(), (reference.images[rows] * 15).astype(np.uint8))
    assert torch.cat([train.targets["label"], test.targets["label"]]).tolist() == reference.target[rows].tolist()
    assert not Digits().spec().hflip_ok
    counts = torch.bincount(test.targets["label"])
    assert int(counts.max() - counts.min()) <= 2


def test_digits_import_neither_scikit_learn_nor_torchvision():
    import subprocess
    import sys

    code = (
        "import sys; from cnntrain.data.sources.digits import Digits; from cnntrain.data.load import load_data;"
        "import cnntrain.data.loader; load_data(Digits());"
        "print([m for m in ('sklearn', 'torchvision', 'PIL', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fashion_mnist_statistics_equal_the_published_ones(shared):
    data = load_data(FashionMNIST(str(shared("FashionMNIST").parent)))
    assert (len(data.train), len(data.val), len(data.test)) == (54000, 6000, 10000)
    assert torch.bincount(data.val.targets["label"]).tolist() == [600] * 10
    assert data.spec.mean == (0.2860,)
    from cnntrain.data.statistics import measure_statistics

    mean, std = measure_statistics(data.train, 0)
    assert mean[0] == pytest.approx(0.2860, abs=5e-4)
    assert std[0] == pytest.approx(0.3530, abs=5e-4)


@pytest.mark.parametrize("layout", ["FashionMNIST/raw", "raw", "."])
def test_idx_files_are_found_unpacked_or_compressed(tmp_path, layout):
    folder = tmp_path / layout
    folder.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in mnist.FILES.items():
        count = 5 if split == "train" else 2
        array = np.arange(count * 784, dtype=np.uint16).astype(np.uint8)
        content = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28)) + array.tobytes()
        (folder / f"{images}.gz").write_bytes(gzip.compress(content))
        (folder / labels).write_bytes(bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + bytes(range(count)))
    splits = FashionMNIST(str(tmp_path)).load()
    assert splits["train"].images.shape == (5, 1, 28, 28)
    assert splits["train"].images.flatten()[:300].tolist() == [i % 256 for i in range(300)]
    assert splits["test"].targets["label"].tolist() == [0, 1]
    (folder / mnist.FILES["test"][1]).write_bytes(b"\0\0\x08\x01\0\0\0\x09")
    with pytest.raises(UserError, match="complete IDX file"):
        FashionMNIST(str(tmp_path)).load()


@pytest.mark.parametrize("sides", [(-1, -28, 28), (2**30, 2**30, 16), (2, 28, 28)])
def test_an_idx_file_of_impossible_size_is_rejected(tmp_path, sides):
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big", signed=True) for n in sides)
    (tmp_path / "images").write_bytes(header + bytes(784 if sides[0] == -1 else 0))
    with pytest.raises(UserError, match="complete IDX file"):
        mnist.read_idx(tmp_path / "images", 3)


@pytest.mark.parametrize("sides", [(2, 28, 28), (400_000, 28, 28)])
def test_unpacking_of_an_idx_file_is_bounded(tmp_path, sides):
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in sides)
    (tmp_path / "images.gz").write_bytes(gzip.compress(header + bytes(2**25), 1))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="images"):
            mnist.read_idx(tmp_path / "images", 3)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", [MNIST, FashionMNIST, CIFAR10, CIFAR100])
def test_missing_data_without_network_name_the_remedy(tmp_path, monkeypatch, source):
    import socket

    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    with pytest.raises(UserError) as caught:
        source(str(tmp_path)).load()
    for part in (str(tmp_path), "data.root=", "data=digits"):
        assert part in str(caught.value)


def test_cifar100_class_names_are_a_hundred_and_sorted():
    assert len(set(CIFAR100_CLASSES)) == 100
    assert sorted(CIFAR100_CLASSES) == list(CIFAR100_CLASSES)


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
    assert data.own_val
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


def test_each_name_of_the_validation_split_is_accepted(make_folder):
    root = make_folder("train")
    rows = [
        f"train/{label}/{i}.png,{label},{'valid' if i > 3 else 'train'}" for label in ("cat", "dog") for i in range(6)
    ]
    text = "path,label,split\n" + "\n".join(rows)
    splits = ImageCsv(write_csv(root, text), size=16).load()
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 8, "val": 4}
    with pytest.raises(UserError, match="'valid' and 'val'"):
        ImageCsv(write_csv(root, text + "\ntrain/cat/3.png,cat,val"), size=16).load()


@pytest.mark.parametrize("label", ["--5", "9" * 5000, "\u0663"])
def test_labels_that_resemble_numbers_are_names(make_folder, label):
    text = f"path,label\ntrain/cat/0.png,{label}\ntrain/cat/1.png,7\n"
    assert set(ImageCsv(write_csv(make_folder("train"), text), size=16).spec().classes) == {"7", label}


def write_csv(root, text: str, encoding: str = "utf-8") -> str:
    (root / "list.csv").write_text(text, encoding=encoding)
    return str(root / "list.csv")


def test_image_csv_with_splits_groups_and_a_byte_order_mark(make_folder):
    root = make_folder("train")
    rows = [f"train/cat/{i}.png,{10 if i % 2 else 9},train,g{i // 2}" for i in range(6)]
    text = "path,label,split,group\n" + "\n".join(rows) + "\ntrain/dog/0.png,9,test,h\n"
    source = ImageCsv(write_csv(root, text, "utf-8-sig"), size=16)
    assert source.spec().classes == ("9", "10")
    data = load_data(source, DataSettings(val_fraction=0.4))
    assert data.test is not None
    assert len(data.test) == 1
    assert set(data.train.groups).isdisjoint(data.val.groups)


CSV_FAULTS = {
    "path,lable\na,b\n": ":1: unknown column 'lable'; did you mean 'label'?",
    "path\na\n": ":1: no column 'label'",
    "path,label\ntrain/cat/0.png,1\ntrain/cat/0.png,2\n": ":3: duplicate path 'train/cat/0.png'",
    "path,label\ntrain/cat/0.png,1\nmissing.png,2\n": ":3: no file 'missing.png'",
    "path,label\ntrain/cat/0.png,1,2\ntrain/cat/1.png\n": ":3: has 1 columns",
    "path,label\ntrain/cat/0.png,\n": ":2: has no label",
    "path,label,split\ntrain/cat/0.png,1,trian\n": "; did you mean 'train'?",
    "path,label,split\ntrain/cat/0.png,1,train\ntrain/cat/1.png,2,val\n": "label '2'",
    "path,label\n": "has no rows",
    "": "has no header line",
    'path,label\n"a,b\n': "can't be read as a UTF-8 CSV",
    "path,label\ntrain/cat/0.png,1\ntrain/cat/1.png,1\n": "at least 2 are needed",
    "path,path\n1,2\n": "'path'",
    f"path,label\n{'a' * 5000},1\n": ":2: no file",
}


@pytest.mark.parametrize("text", CSV_FAULTS)
def test_csv_errors_name_file_and_line(make_folder, text):
    source = ImageCsv(write_csv(make_folder("train"), text))
    with pytest.raises(UserError) as caught:
        source.spec()
    assert CSV_FAULTS[text] in str(caught.value)
    assert "list.csv" in str(caught.value)


def test_a_moved_csv_file_is_found_in_the_new_root(make_folder):
    root = make_folder("train")
    write_csv(root, "path,label\ntrain/cat/0.png,a\ntrain/cat/1.png,b\n")
    moved = ImageCsv("/where/it/was/list.csv", root=str(root))
    assert moved.spec().classes == ("a", "b")
    assert ImageCsv(root=str(root)).spec().classes == ("a", "b")
