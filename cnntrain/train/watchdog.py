"""A thread in each rank that ends the process if another rank failed, stalled or disappeared.

The main thread can be stuck in a collective that never finishes, so it cannot notice this itself. torch's own timeouts
count the time in which all ranks were suspended (Ctrl-Z, SIGSTOP, Slurm's suspend) and would end such a run when it is
continued. This thread counts only the time in which it runs.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from cnntrain.errors import MachineError

PERIOD_S = 0.5
SILENCE_S = 15.0  # without a heartbeat, a rank counts as lost
LAST_WORDS_S = 10.0  # for the main thread to end by itself after another rank has failed


class Watchdog:
    """Exchange heartbeats and failures through a store, and limit the time of a collective.

    Args:
        connect: opens a connection to the store, for this thread alone: `add(name, number)` returns the new sum.
        timeout_s: longest time between `begin` and `end_wait`.
        end: ends the process immediately, with an exit code and a message (None if another rank prints one).

    Attributes:
        failed: exit code of the rank that failed first; None while there is none.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        rank: int,
        size: int,
        timeout_s: float,
        end: Callable[[int, str | None], None],
    ) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self.failed: int | None = None
        self._connect, self._exit = connect, end
        self._store = connect()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._now_s, self._ticked_at = 0.0, time.monotonic()  # `_now_s`: time without suspensions
        self._waits_since_s: float | None = None
        self._failed_at_s: float | None = None
        self._beat, self._beat_at_s = -1, 0.0  # of the predecessor

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=5)

    def begin(self) -> None:
        """Start the time limit of a collective, unless it has started already."""
        if self._waits_since_s is None:
            self._waits_since_s = self._now_s

    def done(self) -> None:
        """All ranks have answered."""
        self._waits_since_s = None

    def claim_failure(self, code: int) -> bool:
        """Announce that this rank fails with exit code `code`; False if another rank was first."""
        with self._lock:
            try:
                if self.failed is None and self._store.add("failures", 1) == 1:
                    self._store.add("code", code + 1)
                    self.failed = code
                    return True
            except RuntimeError:  # the host of the store has ended, and nobody can know who was first
                return True
        self.wait_for_failure(2)
        return False

    def wait_for_failure(self, seconds: float) -> int | None:
        """Wait until the exit code of the rank that failed first is known; None if it is not within `seconds`."""
        deadline = time.monotonic() + seconds
        while self.failed is None and time.monotonic() < deadline:
            with self._lock, contextlib.suppress(RuntimeError):
                self._read_failure()
            time.sleep(0.02)
        return self.failed

    def _read_failure(self) -> None:
        if self.failed is None and (code := self._store.add("code", 0)):
            self.failed = code - 1

    def _run(self) -> None:
        while not self._closed.wait(PERIOD_S):
            self._tick()

    def _tick(self) -> None:
        now = time.monotonic()
        self._now_s += min(now - self._ticked_at, 2 * PERIOD_S)
        self._ticked_at = now
        try:
            with self._lock:
                self._exchange()
        except RuntimeError:
            if not self._reconnect(time.monotonic() - now) and not self._closed.wait(LAST_WORDS_S):
                self._exit(MachineError.exit_code, "rank 0 or the launcher has ended" if self.rank == 1 else None)
            return
        if self.failed is not None:
            self._failed_at_s = self._now_s if self._failed_at_s is None else self._failed_at_s
            if self._now_s - self._failed_at_s > LAST_WORDS_S:
                self._exit(self.failed, None)
        elif self._waits_since_s is not None and self._now_s - self._waits_since_s > self.timeout_s:
            self._end(
                f"a collective operation did not finish within launch.timeout_s={self.timeout_s:g}: another rank is "
                "stuck, or the ranks disagree about what to compute"
            )
        elif self._now_s - self._beat_at_s > SILENCE_S:
            self._end(describe_lost(self._predecessor, self.size))

    def _reconnect(self, seconds: float) -> bool:
        """Connect again after a request that failed in `seconds`: a suspension can outlast the request's timeout."""
        with contextlib.suppress(RuntimeError):
            if seconds > 2 * PERIOD_S:  # else the host of the store has closed the connection
                self._store = self._connect()
                return True
        return False

    def _exchange(self) -> None:
        """Send a heartbeat, and read the predecessor's heartbeat and the first failure."""
        self._store.add(f"beat/{self.rank}", 1)
        if (beat := self._store.add(f"beat/{self._predecessor}", 0)) != self._beat:
            self._beat, self._beat_at_s = beat, self._now_s
        self._read_failure()

    @property
    def _predecessor(self) -> int:
        return (self.rank - 1) % self.size

    def _end(self, message: str) -> None:
        first = self.claim_failure(MachineError.exit_code)
        self._exit(
            MachineError.exit_code if first or self.failed is None else self.failed,
            message if first else None,
        )


def describe_lost(rank: int | None, count: int, cause: str = "killed or cut off (out of memory?)") -> str:
    """Return the message for a rank that ended without a message of its own."""
    who = "one of its processes" if rank is None else f"process {rank + 1} of {count}"
    return (
        f"{who} was {cause}; the last checkpoint is complete: run the same command with run_dir=FOLDER resume=auto to "
        "continue"
    )


def end_process(code: int, message: str | None) -> None:
    """Print `message` and end the process, from any thread."""
    if message is not None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)
