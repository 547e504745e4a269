"""CIFAR's classes, and datasets that cannot be downloaded."""

from types import SimpleNamespace

import numpy as np
import pytest
import torchvision

from cnntrain.data.sources.cifar import CIFAR10, CIFAR100, CIFAR100_CLASSES
from cnntrain.data.sources.mnist import MNIST, FashionMNIST
from cnntrain.errors import UserError


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


def test_a_download_is_announced_only_if_the_data_are_missing(tmp_path, monkeypatch, caplog):
    def open_dataset(root, download, train):
        if download:
            (tmp_path / "data").touch()
        if not (tmp_path / "data").exists():
            raise RuntimeError("Dataset not found or corrupted")
        return SimpleNamespace(data=np.zeros((2, 32, 32, 3), np.uint8), targets=[0, 1])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", open_dataset)
    caplog.set_level("INFO")
    for _ in range(2):
        assert len(CIFAR10(str(tmp_path)).load()["train"]) == 2
    assert caplog.text.count("downloading CIFAR10") == 1


def test_cifar100_class_names_are_a_hundred_and_sorted():
    assert len(set(CIFAR100_CLASSES)) == 100
    assert sorted(CIFAR100_CLASSES) == list(CIFAR100_CLASSES)
