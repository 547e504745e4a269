"""Fixtures of all tests: one thread (the machine may have two), a folder per test, and the folder of the real data."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fork_server import ForkServer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs write below the working folder, so every test has its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    return tmp_path


@pytest.fixture(autouse=True)
def subnormal_numbers() -> None:
    """A training in this process ends them, and Hypothesis wants them."""
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the development data are not beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()
