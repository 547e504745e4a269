"""The watchdog of the workers does not count the time of a suspended run."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cnntrain.data import workers
from cnntrain.data.examples import Examples
from cnntrain.data.workers import WorkerPool, _Watchdog


class Clock:
    """A clock that advances by the given seconds on each wait; the event is set after the last one."""

    def __init__(self, *jumps: float) -> None:
        self.now, self.jumps = 0.0, list(jumps)

    def wait(self, seconds: float) -> bool:
        if not self.jumps:
            return True
        self.now += self.jumps.pop(0)
        return False

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("jumps", "expired"),
    [
        ([1.0] * 10, False),
        ([1.0] * 11, True),
        ([1.0, 1.0, 3600.0, 1.0], False),  # Ctrl-Z for an hour
        ([1.0] * 5 + [3600.0] + [1.0] * 5, True),
        ([2.5] * 10, False),  # a busy machine
        ([2.5] * 11, True),
    ],
)
def test_only_running_time_counts(monkeypatch: pytest.MonkeyPatch, jumps: list[float], expired: bool) -> None:
    killed: list[bool] = []
    worker = SimpleNamespace(kill=lambda: killed.append(True))
    loader: Any = SimpleNamespace(num_workers=0, _iterator=SimpleNamespace(_workers=[worker]))
    watchdog, clock = _Watchdog(loader, 10), Clock(*jumps)
    monkeypatch.setattr(workers, "time", clock)
    monkeypatch.setattr(watchdog, "ended", SimpleNamespace(wait=clock.wait, set=lambda: None))
    watchdog.waiting = True
    watchdog._watch()
    assert (watchdog.expired, bool(killed)) == (expired, expired)


def test_time_between_batches_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    loader: Any = SimpleNamespace(num_workers=0, _iterator=SimpleNamespace(_workers=[]))
    watchdog, clock = _Watchdog(loader, 10), Clock(*[1.0] * 100)
    monkeypatch.setattr(workers, "time", clock)
    monkeypatch.setattr(watchdog, "ended", SimpleNamespace(wait=clock.wait, set=lambda: None))
    with watchdog, watchdog.paused():
        watchdog._watch()
    assert not watchdog.expired


def test_a_loader_that_cannot_be_built_causes_only_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with pytest.raises(ValueError, match="num_workers"):
        WorkerPool(Examples(torch.zeros(1, 1, 2, 2), {}, ["a"]), -1, 10, pin_memory=False, with_matrices=False)
    assert not unraisable
