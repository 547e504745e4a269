"""A TensorBoard server over a folder, and what it answers."""

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

Ask = Callable[..., Any]


@contextlib.contextmanager
def tensorboard(folder: Path, runs: int) -> Iterator[str]:
    """The address of TensorBoard's own server over `folder`, once it has found so many runs."""
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
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    if len(ask(address, "runs")) == runs:
                        break
                time.sleep(0.3)
            yield address
        finally:
            process.terminate()


def ask(address: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/data/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


@pytest.fixture(scope="session")
def serve() -> Callable[[Path, int], contextlib.AbstractContextManager[str]]:
    return tensorboard


@pytest.fixture(scope="session")
def get() -> Ask:
    return ask
