"""How long workers are waited for: a suspended run's time does not count, a stuck worker's does."""

from types import SimpleNamespace
from typing import Any

import pytest

from cnntrain.data import workers as stream
from cnntrain.data.workers import _Patience


class Clock:
    """Moves by the seconds listed while somebody waits, and sets no event before they are used up."""

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
    ("jumps", "lost"),
    [
        ([1.0] * 10, False),
        ([1.0] * 11, True),
        ([1.0, 1.0, 3600.0, 1.0], False),  # Ctrl-Z for an hour
        ([1.0] * 5 + [3600.0] + [1.0] * 5, True),
        ([2.5] * 10, False),  # a busy machine: all is slow, and is waited for longer
        ([2.5] * 11, True),
    ],
)
def test_what_counts(monkeypatch: pytest.MonkeyPatch, jumps: list[float], lost: bool) -> None:
    killed: list[bool] = []
    worker = SimpleNamespace(kill=lambda: killed.append(True))
    loader: Any = SimpleNamespace(num_workers=0, _iterator=SimpleNamespace(_workers=[worker]))
    patience, clock = _Patience(loader, 10), Clock(*jumps)
    monkeypatch.setattr(stream, "time", clock)
    monkeypatch.setattr(patience, "ended", SimpleNamespace(wait=clock.wait, set=lambda: None))
    patience.waiting = True
    patience._watch()
    assert (patience.lost, bool(killed)) == (lost, lost)


def test_time_in_the_training_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    loader: Any = SimpleNamespace(num_workers=0, _iterator=SimpleNamespace(_workers=[]))
    patience, clock = _Patience(loader, 10), Clock(*[1.0] * 100)
    monkeypatch.setattr(stream, "time", clock)
    monkeypatch.setattr(patience, "ended", SimpleNamespace(wait=clock.wait, set=lambda: None))
    with patience, patience.suspended():
        patience._watch()
    assert not patience.lost
