"""Settings and helpers for short runs, and comparison of run folders without elapsed times and throughput."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cnntrain.errors import StoppedError
from cnntrain.train import checkpoint, loop

TIMINGS = ("wall_s", "images_per_s")
LOCATIONS = ("run_dir", "resume", "run")  # of a run and of its origin


def leaves(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) of nested containers; tensors as their type, shape and bytes."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key not in (*TIMINGS, *LOCATIONS):
                yield from leaves(value, f"{name}/{key}")
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from leaves(value, f"{name}/{number}")
    elif isinstance(content, torch.Tensor):
        tensor = content.detach().contiguous().cpu()
        yield name, (tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        yield name, repr(content)  # so that NaN equals NaN


def checkpoint_leaves(path: Path) -> dict[str, Any]:
    return dict(leaves(checkpoint.load(path)))


def metrics(run: Path) -> list[list[str]]:
    """Return the cells of metrics.csv without throughput."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    speed_column = rows[0].index("images_per_s")
    return [[cell for i, cell in enumerate(row) if i != speed_column] for row in rows]


def results(run: Path) -> dict[str, Any]:
    return dict(leaves(json.loads((run / "results.json").read_text())))


def assert_same_run(run: Path | str, other: Path | str, checkpoints: tuple[str, ...] = ("last", "best")) -> None:
    """Assert that two finished runs have the same values: tensors bit for bit, metrics cell by cell."""
    run, other = Path(run), Path(other)
    assert metrics(run) == metrics(other)
    assert results(run) == results(other)
    for name in checkpoints:
        one, two = (checkpoint_leaves(each / "checkpoints" / f"{name}.pt") for each in (run, other))
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
    """Return the text of metrics.csv without throughput."""
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
