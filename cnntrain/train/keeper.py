"""Which checkpoints a run keeps: the last, the best, and where asked for the newest few by their epoch."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

from cnntrain.train import checkpoint
from cnntrain.train.run_dir import RunDir
from cnntrain.train.state import TrainState


class CheckpointWriter:
    """Write checkpoints by name in the background: `keeper("last")` or `keeper("last", "best")`.

    What is written is the state of the call's instant. Files come to the disk one after the other, in the order of the
    calls, one at a time; all of them by the end of the `with` block.

    Args:
        facts: what a checkpoint says beside the state.
        keep: how many checkpoints of ended epochs to keep beside last.pt and best.pt.
        writes: whether this process does; of several that train together only the leader.

    Raises:
        MachineError: by a call or at the end, a file could not be written; the one before is intact.
    """

    def __init__(
        self, run: RunDir, state: TrainState, facts: Mapping[str, Any], keep: int, writes: bool = True
    ) -> None:
        self.run, self.state, self.facts, self.keep, self.writes = run, state, facts, keep, writes
        self._last_good = self._place() if run.last.exists() else "none was written yet"
        self._writer = ThreadPoolExecutor(1, "cnntrain-checkpoint")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.flush()
        finally:
            self._writer.shutdown()

    def __call__(self, *names: str) -> None:
        if not self.writes:
            if "last" in names:
                self._last_good = self._place()
            return
        packed = checkpoint.pack({"state": self.state.state_dict(), **self.facts})
        self.flush()
        numbered = None
        if "last" in names and self.keep and not self.state.progress.batch:  # an epoch has ended
            numbered = f"epoch-{self.state.progress.epoch:05}"
        self._under_way = self._writer.submit(self._write, packed, names, numbered, self._place())

    def flush(self) -> None:
        """Wait until all is on the disk."""
        under_way, self._under_way = self._under_way, None
        if under_way:
            under_way.result()

    @property
    def last_good(self) -> str:
        """Where the newest last.pt is and of which step, for messages."""
        self.flush()
        return self._last_good

    def _write(self, packed: memoryview, names: tuple[str, ...], numbered: str | None, place: str) -> None:
        """Write the files in an order that tolerates a kill between them.

        If last.pt was not written, the epoch is trained again. If best.pt was not written, last.pt has the weights.
        """
        if numbered:
            checkpoint.write(packed, self.run.checkpoints / f"{numbered}.pt")
            checkpoint.keep_newest(self.run.checkpoints, self.keep)
        for name in names:
            checkpoint.write(packed, self.run.checkpoints / f"{name}.pt")
            if name == "last":
                self._last_good = place

    def _place(self) -> str:
        return f"{self.run.last} (step {self.state.progress.step})"
