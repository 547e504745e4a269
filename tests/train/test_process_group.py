"""A rank that failed, stalled or disappeared ends the others; suspension of all ranks does not."""

import time
from typing import Any

import pytest

from cnntrain.errors import MachineError
from cnntrain.train import process_group
from cnntrain.train.process_group import HEARTBEAT_INTERVAL_S, HEARTBEAT_TIMEOUT_S, Watchdog


class Store:
    """The store, within one process."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.values: dict[str, bytes] = {}

    def add(self, name: str, number: int) -> int:
        self.numbers[name] = self.numbers.get(name, 0) + number
        return self.numbers[name]

    def compare_set(self, name: str, expected: str, value: str) -> bytes:
        assert not expected
        return self.values.setdefault(name, value.encode())

    def check(self, names: list[str]) -> bool:
        return all(name in self.values for name in names)

    def get(self, name: str) -> bytes:
        return self.values[name]


class Clock:
    """Replaces the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(process_group, "time", clock)
    monkeypatch.setattr(process_group, "EXIT_GRACE_S", 0)
    return clock


def run(clock: Clock, dog: Watchdog, seconds: float, predecessor_beats: bool) -> None:
    for _ in range(int(seconds / HEARTBEAT_INTERVAL_S)):
        clock.now += HEARTBEAT_INTERVAL_S
        if predecessor_beats:
            dog._store.add("beat/1", 1)
        dog._tick()


def make(store: Any, timeout_s: float = 1800, rank: int = 0) -> tuple[Watchdog, list[Any]]:
    ended: list[Any] = []
    return Watchdog(lambda: store, rank, 2, timeout_s, lambda *end: ended.append(end)), ended


@pytest.mark.parametrize("suspended_s", [0, 10_000])
@pytest.mark.parametrize(("silent_s", "lost"), [(HEARTBEAT_TIMEOUT_S - 2, False), (HEARTBEAT_TIMEOUT_S + 2, True)])
def test_a_silent_rank_is_lost_but_not_one_that_was_suspended_together(
    clock: Clock, suspended_s: float, silent_s: float, lost: bool
) -> None:
    dog, ended = make(Store())
    run(clock, dog, 2, predecessor_beats=True)
    clock.now += suspended_s
    run(clock, dog, silent_s, predecessor_beats=False)
    assert bool(ended) == lost
    if lost:
        code, message = ended[0]
        assert code == MachineError.exit_code and "process 2 of 2" in message


@pytest.mark.parametrize("suspended_s", [0, 10_000])
@pytest.mark.parametrize(("waits_s", "late"), [(55, False), (65, True)])
def test_a_collective_has_a_time_limit_without_suspensions(
    clock: Clock, suspended_s: float, waits_s: float, late: bool
) -> None:
    dog, ended = make(Store(), timeout_s=60)
    run(clock, dog, 100, predecessor_beats=True)
    dog.begin()
    run(clock, dog, 1, predecessor_beats=True)
    clock.now += suspended_s
    run(clock, dog, waits_s, predecessor_beats=True)
    assert bool(ended) == late
    if late:
        assert ended[0][0] == MachineError.exit_code and "launch.timeout_s=60" in ended[0][1]
    else:
        dog.done()
        run(clock, dog, 100, predecessor_beats=True)
        assert not ended


def test_the_first_rank_that_fails_gives_the_exit_code_and_a_stuck_rank_is_ended(clock: Clock) -> None:
    store = Store()
    (first, _), (second, ended) = make(store, rank=1), make(store)
    assert first.claim_failure(3) and not second.claim_failure(2)
    assert second.failed == 3 == second.wait_for_failure(0)
    run(clock, second, 20, predecessor_beats=True)
    assert ended[0] == (3, None)


class BrokenStore(Store):
    def __init__(self, clock: Clock, fails_after_s: float) -> None:
        super().__init__()
        self.clock, self.fails_after_s = clock, fails_after_s

    def add(self, name: str, number: int) -> int:
        self.clock.now += self.fails_after_s
        raise RuntimeError("Connection reset by peer")

    def compare_set(self, name: str, expected: str, value: str) -> bytes:
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_that_was_suspended_is_repeated_and_a_closed_connection_ends_the_rank(
    clock: Clock, rank: int
) -> None:
    stores: list[Any] = [BrokenStore(clock, 100), Store(), AssertionError]
    ended: list[Any] = []
    dog = Watchdog(lambda: stores.pop(0), rank, 2, 60, lambda *end: ended.append(end))
    dog._tick()
    dog._tick()
    assert not ended and dog._store.numbers
    dog._store = BrokenStore(clock, 0)
    dog._tick()
    assert ended[0][0] == MachineError.exit_code and (ended[0][1] is None) == (rank == 0)
    assert dog.claim_failure(5), "nobody can know who was first"


def test_the_thread_ends_when_closed() -> None:
    dog, ended = make(Store())
    dog.start()
    time.sleep(0.1)
    dog.close()
    assert not dog._thread.is_alive() and not ended
