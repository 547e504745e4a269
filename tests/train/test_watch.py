"""A process that is silent is lost; one that was suspended together with this one is not."""

import pytest

from cnntrain.errors import MachineError
from cnntrain.train import watch
from cnntrain.train.watch import PERIOD_S, SILENCE_S, Watch


class Store:
    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def add(self, name: str, number: int) -> int:
        self.numbers[name] = self.numbers.get(name, 0) + number
        return self.numbers[name]


@pytest.mark.parametrize(
    ("gone_s", "then_s", "lost"), [(0, 14, False), (0, 16, True), (3600, 14, False), (3600, 16, True)]
)
def test_suspension_is_forgiven_and_silence_is_not(
    monkeypatch: pytest.MonkeyPatch, gone_s: float, then_s: float, lost: bool
) -> None:
    now, ended = [100.0], []
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    one = Watch(Store(), 0, 2, lambda code, message: ended.append(code))
    one.store.add("life/1", 5)

    def looks(seconds: float) -> None:
        for _ in range(int(seconds / PERIOD_S)):
            now[0] += PERIOD_S
            one._forgive_suspension()
            one._look_after_life()

    looks(PERIOD_S * 2)
    now[0] += gone_s  # SIGSTOP to all of them, SIGCONT
    looks(then_s)
    assert bool(ended) == lost and SILENCE_S == 15
    assert ended[:1] == [MachineError.exit_code] * lost
