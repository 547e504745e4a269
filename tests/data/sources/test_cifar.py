"""CIFAR's classes, and data sets that cannot be downloaded."""

import pytest

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


def test_cifar100_class_names_are_a_hundred_and_sorted():
    assert len(set(CIFAR100_CLASSES)) == 100
    assert sorted(CIFAR100_CLASSES) == list(CIFAR100_CLASSES)
