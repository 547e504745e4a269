"""Signal handling: SIGINT, SIGTERM and SIGHUP set a flag that the loop reads after every step.

A second SIGINT terminates the process immediately. SIGHUP is sent when a terminal or an ssh session closes. Under
Slurm, SIGUSR1 sets the flag too; `sbatch --signal=USR1@60` sends it one minute before the time limit. A signal that was
ignored when the process started (SIGHUP under `nohup`, SIGINT under a shell script's `&`) stays ignored.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from torch import Tensor

from cnntrain.errors import StoppedError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass
class StopFlag:
    """A request to stop.

    Attributes:
        number: signal number that this process received, or None.
        second_interrupt_kills: whether a second SIGINT terminates the process immediately.
        shared: all ranks of a training stop at the same step, with the signal that they have agreed on.
        agreed: number of that signal, or None.
    """

    number: int | None = None
    second_interrupt_kills: bool = True
    shared: bool = False
    agreed: int | None = None

    def check(self) -> None:
        """Raise StoppedError if a signal was received."""
        number = self.agreed if self.shared else self.number
        if number is not None:
            raise StoppedError(number, f"stopped by {signal.Signals(number).name}")

    @property
    def requests(self) -> list[float]:
        """For each of `STOP_SIGNALS`, 1 if this rank received it; the sum over ranks is for `agree`."""
        return [float(number == self.number) for number in STOP_SIGNALS]

    def agree(self, requests: Tensor) -> None:
        """Take note of the `requests` (4,) of all ranks."""
        received = [number for number, count in zip(STOP_SIGNALS, requests.tolist(), strict=True) if count]
        if self.agreed is None and received:
            self.agreed = received[0]


@contextlib.contextmanager
def stop_flag(flag: StopFlag | None = None) -> Iterator[StopFlag]:
    """Let signals set `flag` (a new one by default) inside the context, then restore the previous handlers."""
    flag = StopFlag() if flag is None else flag

    def handle(number: int, frame: FrameType | None) -> None:
        flag.number = number
        if signal.SIGINT in before and flag.second_interrupt_kills:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next Ctrl-C terminates immediately

    before = {}
    for number in STOP_SIGNALS if "SLURM_JOB_ID" in os.environ else STOP_SIGNALS[:-1]:
        if signal.getsignal(number) is signal.SIG_IGN:
            continue
        with contextlib.suppress(ValueError):  # not in the main thread: the embedding program handles signals
            before[number] = signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
