"""Processes decode the same pixels as threads, report all bad files, and leave no child process."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from cnntrain.data import parallel
from cnntrain.data.examples import LazyImages
from cnntrain.data.sources.image_folder import ImageFolder
from cnntrain.errors import MachineError


@pytest.fixture
def lazy(make_folder) -> LazyImages:
    images = ImageFolder(str(make_folder("train", count=20)), size=[12, 16]).load()["train"].images
    assert isinstance(images, LazyImages)
    return images


def decoded(lazy: LazyImages):
    images = parallel.shared_zeros(lazy.shape, torch.uint8)
    matrices = parallel.shared_zeros((len(lazy), 3, 3), torch.float64)
    bad = parallel.decode_into(images, matrices, lazy, "")
    return images, matrices, sorted((problem.path, problem.reason) for problem in bad)


def test_processes_and_threads_decode_the_same_pixels(lazy, monkeypatch):
    with open(lazy.paths[7], "wb"):
        pass
    with open(lazy.paths[30], "wb") as file:
        file.write(b"text")
    by_threads = decoded(lazy)
    monkeypatch.setattr(parallel, "MANY_FILES", 1)
    monkeypatch.setattr(parallel, "CHUNK_SIZE", 3)
    monkeypatch.setattr(parallel, "usable_cores", lambda: 3)
    monkeypatch.setattr(parallel, "thread_map", None)
    by_processes = decoded(lazy)
    assert torch.equal(by_threads[0], by_processes[0]) and torch.equal(by_threads[1], by_processes[1])
    assert by_threads[2] == by_processes[2] and len(by_processes[2]) == 2
    assert not multiprocessing.active_children()


def test_process_map_returns_all_results(monkeypatch):
    monkeypatch.setattr(parallel, "usable_cores", lambda: 2)
    found = parallel.process_map(lambda item: item if item % 5 == 0 else None, 2000)
    assert sorted(found) == list(range(0, 2000, 5))
    assert parallel.process_map(lambda item: item, 0) == []


def test_a_dead_process_raises_an_error_and_ends_the_others(monkeypatch):
    monkeypatch.setattr(parallel, "usable_cores", lambda: 2)

    def work(item: int) -> None:
        if item == 300:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.001)

    with pytest.raises(MachineError, match="-9"):
        parallel.process_map(work, 100_000)
    assert not multiprocessing.active_children()
