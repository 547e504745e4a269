"""What TensorBoard shows of finished runs, read from its server over HTTP."""

import contextlib
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cnntrain import compose, train

pytestmark = pytest.mark.slow  # a server and two trainings: half a minute

Get = Callable[..., Any]
Serve = Callable[[Path, int], contextlib.AbstractContextManager[str]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve: Serve) -> Iterator[str]:
    """Address of a TensorBoard server that shows two finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("one", 0.001), ("two", 0.003)):
        settings = ("data.limit=200", "epochs=2", "log.every_steps=2")
        train(compose(*settings, f"optimizer.lr={rate}", f"run_dir={folder / name}"))
    with serve(folder, 2) as address:
        yield address


def test_scalars(server: str, get: Get) -> None:
    tags = get(server, "plugin/scalars/tags")["one"]
    expected = {"train/loss", "train/top1", "val/loss", "val/top1", "test/top1", "lr", "images_per_s"}
    assert expected | {"steps/loss", "steps/lr", "steps/grad_norm", "steps/images_per_s"} <= set(tags)
    points = get(server, "plugin/scalars/scalars?run=one&tag=val/top1")
    assert len(points) == 2 and 0 <= points[-1][2] <= 1


def test_images(server: str, get: Get) -> None:
    tags = get(server, "plugin/images/tags")["one"]
    assert {"first_batch", "curves", "confusion_matrix", "mistakes", "filters"} <= set(tags)
    images = get(server, "plugin/images/images?run=one&tag=confusion_matrix&sample=0")
    with urllib.request.urlopen(f"{server}/data/plugin/images/individualImage?{images[0]['query']}") as response:
        assert response.read(4) == b"\x89PNG"


def test_hparams_have_one_row_per_run_with_its_metrics(server: str, hparams: Callable[..., Any]) -> None:
    names, rows = hparams(server)
    assert {"optimizer.lr", "batch_size", "choices.model"} <= names
    assert sorted(row["optimizer.lr"] for row, _ in rows) == pytest.approx([0.001, 0.003])
    assert all({"val/top1", "best/top1", "test/top1"} <= set(metrics) for _, metrics in rows)


def test_config_is_logged_as_text(server: str, get: Get) -> None:
    assert "config" in str(get(server, "plugin/text/tags"))
