"""What processes that train together tell each other beside it: that they live, that one failed, when to stop.

A thread in each process speaks to one small store (torch's TCPStore) three times a second, so the training itself
never waits for it:

- Life: each counts up, and watches its predecessor's count. One that stands still for 15 s is dead or cut off, however
  it died; the rest then end, although they may be stuck in a transfer that will never come to its end.
- Failure: the first that fails says so with its exit code. The others leave by themselves when their next transfer
  breaks; those that are stuck are ended.
- Stopping: a signal reaches one process, but all must stop at the same step. Every process calls `check` at the same
  places, and counts the calls. Asked to stop, each promises not to pass the call it stands at before it knows what the
  others promised; the furthest promise is where all of them stop.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from cnntrain.errors import MachineError, StoppedError
from cnntrain.train.signals import StopFlag

PERIOD_S = 0.3
SILENCE_S = 15.0  # without a sign of life
SUSPENDED_S = 3.0  # a longer interval between two polls means that this process or the store was suspended
LAST_WORDS_S = 10.0  # for a process to end by itself once another has failed


class AgreedStop(StopFlag):
    """A flag whose `check` raises at the same call in all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.calls = 0
        self.promise: int | None = None  # the call that is not passed before the others' promises are known
        self.place: int | None = None  # the call at which all stop
        self.asked: int | None = None  # the signal that one of the processes got

    def check(self) -> None:
        with self.lock:
            here = self.calls
            if self.promise is None or here < self.promise:
                self.calls += 1
                return
        while self.place is None:  # a few tenths of a second, once in a training's life
            time.sleep(0.01)
        if here >= self.place:
            assert self.asked is not None
            raise StoppedError(self.asked, f"stopped by {signal.Signals(self.asked).name}")
        self.calls += 1

    def make_promise(self) -> int:
        with self.lock:
            self.promise = self.calls
            return self.promise


class Watch:
    """The thread, and what it knows.

    Args:
        store: numbers by name, shared; used by this thread and by `fail` alone.
        end: ends the process at once, with an exit code and a message (None where another process gives one).
    """

    def __init__(self, store: Any, rank: int, count: int, end: Callable[[int, str | None], None]) -> None:
        self.store, self.rank, self.count, self.end = store, rank, count, end
        self.flag = AgreedStop()
        self.lock = threading.Lock()
        self.failed: int | None = None  # the exit code of the process that failed first
        self._over = threading.Event()
        self._seen, self._seen_at = -1, time.monotonic()
        self._looked_at = self._seen_at
        self._failed_at = 0.0
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; the others must know that this process goes."""
        self._over.set()
        self._thread.join(timeout=5)

    def fail(self, code: int) -> bool:
        """Say that this process fails with exit code `code`; False when another one was faster."""
        with self.lock:
            if self.failed is not None:
                return False
            try:
                if self._add("failures", 1) == 1:
                    self._add("code", code + 1)
                    self.failed = code
                    return True
            except RuntimeError:  # the store has gone: so has the process that keeps it
                return True
        return self.await_failure(2.0) is None

    def await_failure(self, seconds: float, until: Callable[[], bool] = lambda: False) -> int | None:
        """The exit code of the process that failed first, as soon as it is known."""
        ends = time.monotonic() + seconds
        while self.failed is None and time.monotonic() < ends and not until():
            time.sleep(0.02)
        return self.failed

    def _add(self, name: str, number: int) -> int:
        return self.store.add(name, number)

    def _run(self) -> None:
        while not self._over.wait(PERIOD_S):
            try:
                with self.lock:
                    self._forgive_suspension()
                    self._look_after_life()
                    self._look_after_failure()
                    self._look_after_stopping()
            except RuntimeError:
                self._store_lost()
                return

    def _forgive_suspension(self) -> None:
        """Exclude time in which this thread was suspended (Ctrl-Z, SIGSTOP) from all timeouts."""
        now = time.monotonic()
        away_s = now - self._looked_at - PERIOD_S
        if away_s > SUSPENDED_S:
            self._seen_at += away_s
            self._failed_at += away_s * (self._failed_at > 0)
        self._looked_at = now

    def _look_after_life(self) -> None:
        self._add(f"life/{self.rank}", 1)
        before = (self.rank - 1) % self.count
        beat, now = self._add(f"life/{before}", 0), time.monotonic()
        if beat != self._seen:
            self._seen, self._seen_at = beat, now
        elif now - self._seen_at > SILENCE_S and self.failed is None and self._add("failures", 1) == 1:
            self._add("code", MachineError.exit_code + 1)
            self.end(MachineError.exit_code, lost(before, self.count))

    def _look_after_failure(self) -> None:
        if self.failed is None:
            if code := self._add("code", 0):
                self.failed, self._failed_at = code - 1, time.monotonic()
        elif self._failed_at and time.monotonic() - self._failed_at > LAST_WORDS_S:
            self.end(self.failed, None)

    def _look_after_stopping(self) -> None:
        flag = self.flag
        if flag.asked is None and flag.number is not None and self._add("asks", 1) == 1:
            self._add("stop", flag.number)
        if flag.asked is None and (number := self._add("stop", 0)):
            flag.asked = number
            self._add(f"promise/{self.rank}", flag.make_promise() + 1)
            self._add("promises", 1)
        if flag.asked is not None and flag.place is None and self._add("promises", 0) == self.count:
            flag.place = max(self._add(f"promise/{rank}", 0) for rank in range(self.count)) - 1

    def _store_lost(self) -> None:
        """Whoever keeps the store has gone; time for this process to notice by itself, then its end."""
        if not self._over.wait(LAST_WORDS_S):
            message = "the process that kept the others together has gone" if self.rank == 0 else None
            self.end(MachineError.exit_code, message)


def lost(rank: int | None, count: int) -> str:
    """What to say when a process has gone without a word."""
    who = "one of its processes" if rank is None else f"process {rank + 1} of {count}"
    return (
        f"{who} was killed or cut off (out of memory?); the last checkpoint is whole: "
        "the same command with run_dir=FOLDER resume=auto goes on"
    )


def end_process(code: int, message: str | None) -> None:
    """From a thread, at once, whatever the main thread is stuck in."""
    if message is not None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)


def connect(address: str, port: int, prefix: str) -> Any:
    """A connection of its own to the store, for a thread must not wait for the main one's."""
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    return PrefixStore(prefix, store)
