"""Loaders yield the same batches from memory and from any number of workers."""

import os
import signal
import time

import pytest
import torch

from cnntrain.config.schema import DataSettings
from cnntrain.data.load import load_data
from cnntrain.data.loader import CachedLoader, StreamingLoader, make_loader
from cnntrain.data.sources.digits import Digits
from cnntrain.data.sources.image_folder import ImageFolder
from cnntrain.errors import MachineError, UserError
from cnntrain.randomness import epoch_order, hash_seed


def collect(loader, order, **arguments):
    batches = list(loader.batches(order, 4, **arguments))
    loader.close()
    return batches


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images)
        and a.targets.keys() == b.targets.keys()
        and all(torch.equal(a.targets[name], b.targets[name]) for name in a.targets)
        and torch.equal(a.index, b.index)
        and torch.equal(a.position, b.position)
        and torch.equal(a.source_to_image, b.source_to_image)
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture
def source(make_folder):
    return ImageFolder(str(make_folder("train", "val")), size=[12, 16])


def test_cached_and_streamed_batches_are_equal_for_any_number_of_workers(source):
    cached, streamed = load_data(source), load_data(source, DataSettings(cache="none"))
    assert cached.fingerprint == streamed.fingerprint
    assert cached.spec == streamed.spec
    order = epoch_order(1, 2, len(cached.train))
    expected = collect(make_loader(cached.train, "cpu"), order)
    assert [len(batch) for batch in expected] == [4, 4, 4]
    for workers in (0, 1, 2):
        loader = make_loader(streamed.train, "cpu", workers=workers)
        assert isinstance(loader, StreamingLoader)
        assert same(expected, collect(loader, order))
    assert same(expected, collect(make_loader(streamed.train, "cpu", cache="ram"), order))
    assert same(expected, collect(make_loader(cached.train, "cpu", cache="none"), order))


def test_a_pass_can_skip_batches_and_drop_the_last():
    train = load_data(Digits()).train
    loader = make_loader(train, "cpu")
    assert isinstance(loader, CachedLoader)
    order = epoch_order(0, 0, 10)
    whole = collect(loader, order)
    assert [len(batch) for batch in whole] == [4, 4, 2]
    assert torch.cat([batch.index for batch in whole]).equal(order)
    assert torch.cat([batch.position for batch in whole]).equal(torch.arange(10))
    assert [b.position[0].item() for b in collect(loader, order, start_batch=1)] == [4, 8]
    assert [len(b) for b in collect(loader, order, drop_last=True)] == [4, 4]
    assert collect(loader, order, start_batch=9) == []
    places = torch.arange(10) * 2
    assert torch.cat([b.position for b in collect(loader, order, positions=places)]).equal(places)


def test_an_interrupted_pass_does_not_affect_the_next():
    train = load_data(Digits()).train
    loader = make_loader(train, "cpu", workers=2, cache="none")
    order = torch.arange(200)
    for _ in range(3):
        for i, batch in enumerate(loader.batches(order, 16)):
            assert batch.index[0] == 16 * i
            assert torch.equal(batch.images, train.images[batch.index])
            if i == 2:
                break
    loader.close()


def test_the_global_generator_is_not_used(source):
    before = torch.random.get_rng_state()
    data = load_data(source, DataSettings(cache="none"))
    for workers in (0, 1):
        collect(make_loader(data.train, "cpu", workers=workers), torch.arange(5))
    assert torch.equal(before, torch.random.get_rng_state())


class AddNoise:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, image, position):
        generator = torch.Generator().manual_seed(hash_seed(self.seed, position))
        return image // 2 + torch.randint(0, 50, image.shape, generator=generator, dtype=torch.uint8)


def test_transforms_are_functions_of_seed_and_position():
    train = load_data(Digits()).train
    order = torch.arange(10)

    def images(workers, seed):
        loader = make_loader(train, "cpu", workers, per_sample=True)
        return torch.cat([batch.images for batch in collect(loader, order, transform=AddNoise(seed))])

    first = images(0, 5)
    assert torch.equal(first, images(2, 5))
    assert not torch.equal(first, images(2, 6))
    assert torch.equal(first[3], AddNoise(5)(train.images[3], 3))


def refuse_three(image, position):
    if position == 3:
        raise UserError("no, not this one")
    return image


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_users_transform_keeps_its_type_and_message(workers):
    loader = make_loader(load_data(Digits()).train, "cpu", workers, per_sample=True)
    with pytest.raises(UserError, match=r"^no, not this one$"):
        collect(loader, torch.arange(8), transform=refuse_three)
    loader.close()


class SleepLong:
    def __call__(self, image, position):
        time.sleep(60)
        return image


def test_a_stuck_worker_ends_the_run_in_time():
    train = load_data(Digits()).train
    loader = make_loader(train, "cpu", workers=1, timeout_s=1, per_sample=True)
    start = time.monotonic()
    with pytest.raises(MachineError, match=r"data\.timeout_s"):
        next(loader.batches(torch.arange(8), 4, transform=SleepLong()))
    assert time.monotonic() - start < 15


def test_a_killed_worker_ends_the_run():
    train = load_data(Digits()).train
    loader = make_loader(train, "cpu", workers=2, cache="none")
    assert isinstance(loader, StreamingLoader)

    def go_through():
        for i, _ in enumerate(loader.batches(torch.arange(len(train)), 2)):
            if i == 1:
                os.kill(loader.pool.loader._iterator._workers[0].pid, signal.SIGKILL)

    with pytest.raises(MachineError, match="worker process died"):
        go_through()


def test_a_worker_that_stops_while_sending_a_batch_ends_the_run():
    train = load_data(Digits()).train
    loader = make_loader(train, "cpu", workers=2, cache="none", timeout_s=1)
    assert isinstance(loader, StreamingLoader)

    def go_through():
        for i, _ in enumerate(loader.batches(torch.arange(len(train)), 2)):
            if i == 1:
                time.sleep(0.5)  # what was asked for in advance waits in the queue: to take it needs its worker
                for worker in loader.pool.loader._iterator._workers:
                    os.kill(worker.pid, signal.SIGSTOP)

    with pytest.raises(MachineError, match=r"a worker is stuck.*data\.timeout_s"):
        go_through()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_damaged_during_training_is_named(make_folder, workers):
    root = make_folder("train", "val")
    data = load_data(ImageFolder(str(root), size=16), DataSettings(cache="none"))
    (root / "train/cat/3.png").write_bytes(b"gone")
    loader = make_loader(data.train, "cpu", workers=workers)
    with pytest.raises(UserError, match=r"train/cat/3.png: is not an image"):
        collect(loader, torch.arange(len(data.train)))
    loader.close()


def test_headers_are_checked_before_streaming(make_folder):
    root = make_folder("train", "val")
    (root / "train/cat/3.png").write_bytes(b"")
    (root / "val/dog/1.png").write_bytes(b"text")
    with pytest.raises(
        UserError, match=r"(?s)2 of 24 files.*train/cat/3.png: is empty.*val/dog/1.png: is not an image"
    ):
        load_data(ImageFolder(str(root), size=16), DataSettings(cache="none"))


def test_fingerprints_depend_on_names_and_labels_but_not_on_the_split(make_folder):
    root = make_folder("train")
    first = load_data(ImageFolder(str(root), size=16), DataSettings(split_seed=0)).fingerprint
    assert first == load_data(ImageFolder(str(root), size=16), DataSettings(split_seed=1)).fingerprint
    assert first.startswith("12-")
    (root / "train/cat/3.png").rename(root / "train/dog/33.png")
    assert first != load_data(ImageFolder(str(root), size=16)).fingerprint


def test_limit_applies_per_split_before_validation_is_split_off(make_folder):
    data = load_data(ImageFolder(str(make_folder("train", "test")), size=16), DataSettings(limit=8, val_fraction=0.25))
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (6, 2, 8)


def test_folds_and_an_explicit_val_split_exclude_each_other(source):
    with pytest.raises(UserError, match=r"data\.folds"):
        load_data(source, DataSettings(folds=3))


def test_a_constant_channel_has_standard_deviation_1(tmp_path, save):
    import numpy as np

    from cnntrain.data.statistics import measure_statistics

    for label in ("a", "b"):
        for i in range(3):
            array = np.zeros((8, 8, 3), np.uint8)
            array[:, :4, 0] = 255
            save(tmp_path / "train" / label / f"{i}.png", array)
    data = load_data(ImageFolder(str(tmp_path), size=8))
    assert data.spec.mean == (0.5, 0.0, 0.0)
    assert data.spec.std == (0.5, 1.0, 1.0)
    streamed = load_data(ImageFolder(str(tmp_path), size=8), DataSettings(cache="none"))
    assert measure_statistics(streamed.train, 0) == (data.spec.mean, data.spec.std)
