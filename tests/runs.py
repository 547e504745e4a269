"""Comparing run folders: everything that a run leaves behind, except elapsed time and throughput."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cnntrain.train import checkpoint

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
