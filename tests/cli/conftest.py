"""A TensorBoard server, and queries of its HTTP interface."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Get = Callable[..., Any]


@contextlib.contextmanager
def tensorboard(folder: Path, num_runs: int) -> Iterator[str]:
    """Serve `folder` with TensorBoard; yield the address when it shows `num_runs` runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--logdir {folder} --port {port} --host 127.0.0.1"
    command = [sys.executable, "-m", "tensorboard.main", *options.split()]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    if len(get_data(address, "runs")) == num_runs:
                        break
                time.sleep(0.3)
            yield address
        finally:
            process.terminate()


def get_data(address: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/data/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def hparams_rows(address: str) -> tuple[set[str], list[tuple[dict[str, Any], dict[str, float]]]]:
    """Return the names of all hyperparameters of the HParams tab, and (hyperparameters, metrics) of each row."""
    experiment = get_data(address, "plugin/hparams/experiment", {"experimentName": ""})
    query = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_RUNNING", "STATUS_FAILURE"],
        "colParams": [{"metric": info["name"]} for info in experiment["metricInfos"]],
        "startIndex": 0,
        "sliceSize": 20,
    }
    groups = get_data(address, "plugin/hparams/session_groups", query)["sessionGroups"]
    names = {info["name"] for info in experiment["hparamInfos"]}
    return names, [
        (group["hparams"], {value["name"]["tag"]: value["value"] for value in group["metricValues"]})
        for group in groups
    ]


@pytest.fixture(scope="session")
def serve() -> Callable[[Path, int], contextlib.AbstractContextManager[str]]:
    return tensorboard


@pytest.fixture(scope="session")
def get() -> Get:
    return get_data


@pytest.fixture(scope="session")
def hparams() -> Callable[[str], tuple[set[str], list[tuple[dict[str, Any], dict[str, float]]]]]:
    return hparams_rows
