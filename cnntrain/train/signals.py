"""Signal handling: SIGINT, SIGTERM and SIGHUP set a flag that the loop reads after every batch.

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

from cnntrain.errors import StoppedError


@dataclass
class StopFlag:
    """`number` of the signal that asked to stop, or None."""

    number: int | None = None

    def check(self) -> None:
        """Raises StoppedError when a signal has come."""
        if self.number is not None:
            raise StoppedError(self.number, f"stopped by {signal.Signals(self.number).name}")


@contextlib.contextmanager
def stop_flag(flag: StopFlag | None = None) -> Iterator[StopFlag]:
    """A flag (a new one unless given) that signals set while the block runs; the handlers before are restored after."""
    flag = StopFlag() if flag is None else flag

    def handle(number: int, frame: FrameType | None) -> None:
        flag.number = number
        if signal.SIGINT in before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next Ctrl-C terminates immediately

    before = {}
    asking = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in (*asking, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])):
        if signal.getsignal(number) is signal.SIG_IGN:
            continue
        with contextlib.suppress(ValueError):  # not in the main thread: whoever owns it handles signals
            before[number] = signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
