"""The plan of a training run, and the search for `batch_size=auto`."""

from collections.abc import Callable

import pytest
import torch

from cnntrain import compose, train
from cnntrain.errors import MachineError, UserError
from cnntrain.train import prepare
from cnntrain.train.device import Compute
from cnntrain.train.distributed import World
from cnntrain.train.prepare import (
    fastest,
    power_of_two,
    resolve_plan,
    search_batch_size,
    smallest_batch,
)
from cnntrain.train.setup import build_components
from tests.runs import SMALL


def largest_that_fits(fits: Callable[[int], bool], max_size: int, min_size: int = 1) -> int:
    """Search as on a GPU."""
    return fastest(lambda size: size if fits(size) else None, max_size, min_size, min_size, "does not fit")[0]


def test_largest_batch_that_fits_is_a_power_of_two() -> None:
    assert largest_that_fits(lambda size: size <= 100, 1024) == 64
    assert largest_that_fits(lambda size: True, 128) == 128
    assert largest_that_fits(lambda size: size <= 1, 128) == 1
    with pytest.raises(MachineError, match="batch_size=1 "):
        largest_that_fits(lambda size: False, 128)
    assert [power_of_two(n) for n in (0, 1, 2, 3, 63, 64)] == [1, 1, 2, 2, 32, 64]


def test_on_a_cpu_the_batch_size_doubles_while_that_is_faster_and_fits() -> None:
    speeds = {32: 100.0, 64: 120.0, 128: 124.0, 256: 200.0}
    assert fastest(lambda size: speeds[size], 256)[0] == 64
    assert fastest(lambda size: None if size > 32 else 1.0, 256)[0] == 32
    assert fastest(lambda size: float(size), 8)[0] == 8
    size, reason = fastest(lambda size: None if size > 8 else 1.0, 256)
    assert size == 8 and reason.startswith("16 ")
    with pytest.raises(MachineError, match="batch_size=2 "):
        fastest(lambda size: None, 256, min_size=2)


def test_batch_norm_needs_two_images() -> None:
    components = build_components(compose("model=batchnorm_cnn", "data.limit=20", "batch_size=auto", "threads=1"))
    assert search_batch_size(components, components.load()) == 2
    tried: list[int] = []
    assert largest_that_fits(lambda size: bool(tried.append(size) or size < 5), 1, min_size=2) == 2
    assert tried == [2]


def test_auto_becomes_a_number_and_the_model_is_unchanged() -> None:
    components = build_components(compose("data.limit=600", "batch_size=auto", "threads=1"))
    data = components.load()
    before = {name: value.clone() for name, value in components.model.state_dict().items()}
    assert search_batch_size(components, data) in (16, 32)
    plan = resolve_plan(components, data)
    assert components.settings.batch_size == plan.batch_size
    assert all(value.equal(before[name]) for name, value in components.model.state_dict().items())
    with pytest.raises(UserError, match="a whole number >= 1 or auto"):
        compose("batch_size=automatic")


def test_the_loader_is_closed_if_the_search_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    components = build_components(compose(*SMALL, "model=mlp"))
    data, closed = components.load(), []
    loader = components.loader(data.train, augmented=True)
    monkeypatch.setattr(components, "loader", lambda *_, **__: loader)
    monkeypatch.setattr(loader, "close", lambda: closed.append(True))
    monkeypatch.setattr(prepare, "fastest", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        search_batch_size(components, data)
    assert closed


@pytest.mark.parametrize(
    ("model", "device", "size", "smallest"),
    [
        ("mlp", "cpu", 1, 1),
        ("mlp", "cpu", 4, 4),
        ("norm", "cpu", 1, 2),
        ("norm", "cpu", 4, 8),
        ("norm", "cuda", 1, 2),
        ("norm", "cuda", 4, 4),
    ],
)
def test_each_rank_needs_an_image_and_each_batch_norm_two(model: str, device: str, size: int, smallest: int) -> None:
    compute = Compute(torch.device(device), "fp32", False, World(0, size))
    assert smallest_batch(model == "norm", compute) == smallest


def test_fewer_training_images_than_ranks_are_refused() -> None:
    components = build_components(compose("model=mlp", "data.limit=3", "threads=1", "device=cpu"), world=World(0, 4))
    with pytest.raises(UserError, match=r"launch\.devices"):
        resolve_plan(components, components.load())


def test_a_last_batch_of_one_image_is_left_out_with_batch_norm(caplog: pytest.LogCaptureFixture) -> None:
    result = train(
        compose(*SMALL, "data.limit=290", "batch_size=26", "data.val_fraction=0.1", "epochs=1", "run_dir=one")
    )
    assert result["steps"] == 10  # 261 images: ten batches of 26 and one image
