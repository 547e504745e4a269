"""What a user sees in TensorBoard, asked of its own server over HTTP."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from cnntrain import compose, train


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a TensorBoard server over two finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("one", 0.001), ("two", 0.003)):
        train(
            compose(
                "data.limit=200",
                "epochs=2",
                "log.every_steps=2",
                f"optimizer.lr={rate}",
                f"run_dir={folder / name}",
            )
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    if len(json.load(urllib.request.urlopen(f"{address}/data/runs"))) == 2:
                        break
                except OSError:
                    pass
                time.sleep(0.3)
            yield address
        finally:
            process.terminate()


def get(address: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/data/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def test_scalars(server: str) -> None:
    tags = get(server, "plugin/scalars/tags")["one"]
    wanted = {"train/loss", "train/top1", "val/loss", "val/top1", "test/top1", "lr", "images_per_s"}
    assert wanted | {"steps/loss", "steps/lr", "steps/grad_norm", "steps/images_per_s"} <= set(tags)
    points = get(server, "plugin/scalars/scalars?run=one&tag=val/top1")
    assert len(points) == 2 and 0 <= points[-1][2] <= 1


def test_images(server: str) -> None:
    tags = get(server, "plugin/images/tags")["one"]
    assert {"first_batch", "curves", "confusion_matrix", "mistakes", "filters"} <= set(tags)
    listed = get(server, "plugin/images/images?run=one&tag=confusion_matrix&sample=0")
    with urllib.request.urlopen(
        f"{server}/data/plugin/images/individualImage?{listed[0]['query']}"
    ) as response:
        assert response.read(4) == b"\x89PNG"


def test_hparams_have_one_row_a_run_with_its_metrics(server: str) -> None:
    experiment = get(server, "plugin/hparams/experiment", {"experimentName": ""})
    names = {info["name"] for info in experiment["hparamInfos"]}
    assert {"optimizer.lr", "batch_size", "choices.model"} <= names
    wanted = [info["name"] for info in experiment["metricInfos"]]
    query = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_RUNNING", "STATUS_FAILURE"],
        "colParams": [{"metric": name} for name in wanted],
        "startIndex": 0,
        "sliceSize": 10,
    }
    groups = get(server, "plugin/hparams/session_groups", query)["sessionGroups"]
    assert len(groups) == 2
    assert sorted(group["hparams"]["optimizer.lr"] for group in groups) == pytest.approx([0.001, 0.003])
    for group in groups:
        values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        assert {"val/top1", "best/top1", "test/top1"} <= set(values)


def test_config_is_there_as_text(server: str) -> None:
    assert "config" in str(get(server, "plugin/text/tags"))
