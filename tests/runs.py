"""Short runs for tests; comparing run folders without elapsed times and throughput."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cnntrain.errors import StoppedError
from cnntrain.train import checkpoint, loop

CLOCK = ("wall_s", "images_per_s")
PLACE = ("run_dir", "resume", "run")  # where a run lies and what it descends from


def values(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of nested containers; tensors as their type, shape and bytes."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key not in (*CLOCK, *PLACE):
                yield from values(value, f"{name}/{key}")
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from values(value, f"{name}/{number}")
    elif isinstance(content, torch.Tensor):
        whole = content.detach().contiguous().cpu()
        yield name, (whole.dtype, tuple(whole.shape), whole.reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        yield name, repr(content)  # NaN is NaN


def saved(path: Path) -> dict[str, Any]:
    return dict(values(checkpoint.load(path)))


def metrics(run: Path) -> list[list[str]]:
    """metrics.csv, cell by cell, without throughput."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    clock = rows[0].index("images_per_s")
    return [[cell for i, cell in enumerate(row) if i != clock] for row in rows]


def results(run: Path) -> dict[str, Any]:
    return dict(values(json.loads((run / "results.json").read_text())))


def assert_same_run(run: Path | str, other: Path | str, checkpoints: tuple[str, ...] = ("last", "best")) -> None:
    """Require that two finished runs agree in every value: tensors bit for bit, metrics cell by cell."""
    run, other = Path(run), Path(other)
    assert metrics(run) == metrics(other)
    assert results(run) == results(other)
    for name in checkpoints:
        one, two = (saved(each / "checkpoints" / f"{name}.pt") for each in (run, other))
        assert one.keys() == two.keys()
        assert [key for key in one if one[key] != two[key]] == [], name


SMALL = (
    "data.limit=300 epochs=3 batch_size=32 log.figures=false log.tensorboard=false threads=1 model=fmnist_cnn"
).split()


def weights(run_dir: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(Path(run_dir) / "checkpoints" / "last.pt")["state"]["model"]


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def rows(run_dir: str) -> str:
    """metrics.csv without what depends on the clock."""
    lines = [line.split(",") for line in (Path(run_dir) / "metrics.csv").read_text().splitlines()]
    skip = lines[0].index("images_per_s")
    return "\n".join(",".join(cell for i, cell in enumerate(line) if i != skip) for line in lines)


def column(run_dir: str, name: str) -> list[float]:
    with (Path(run_dir) / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Stop the training once, before the batch after `step`, as a signal would."""
    original = loop.set_learning_rate

    def stopping(optimizer: Any, schedule: Any, now: int) -> float:
        if now == step:
            monkeypatch.setattr(loop, "set_learning_rate", original)
            raise StoppedError(15, "stopped")
        return original(optimizer, schedule, now)

    monkeypatch.setattr(loop, "set_learning_rate", stopping)


def change_checkpoint(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = checkpoint.load(path)
    change(content)
    checkpoint.save(content, path)
