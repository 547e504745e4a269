"""IDX files: layouts, damage, and limits of unpacking."""

import gzip
import tracemalloc

import numpy as np
import pytest
import torch

from cnntrain.data.load import load_data
from cnntrain.data.sources import mnist
from cnntrain.data.sources.mnist import FashionMNIST
from cnntrain.errors import UserError


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
