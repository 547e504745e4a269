"""Fixtures of all tests: a working folder per test, one thread, the folder of real data, and a fork server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fork_server import ForkServer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test its own working folder, because runs write to it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    return tmp_path


@pytest.fixture(autouse=True)
def allow_subnormal_numbers() -> None:
    """Hypothesis needs subnormal numbers, which a training in this process disables."""
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("there is no shared/data folder next to the repository")
    return SHARED


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()
