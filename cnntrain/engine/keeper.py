"""Which checkpoints a run keeps: the last, the best, and where asked for the newest few by their epoch."""

from collections.abc import Mapping
from typing import Any

from cnntrain.engine import checkpoint
from cnntrain.engine.run_folder import RunFolder
from cnntrain.engine.state import TrainState


class Keeper:
    """Writes checkpoints by name, `keeper("last")` or `keeper("best")`.

    Args:
        facts: what a checkpoint says beside the state.
        keep: how many checkpoints of ended epochs to keep beside last.pt and best.pt.
        writes: whether this process does; of several that train together only the leader.

    Attributes:
        last_good: where the last one is and of which step, for messages.
    """

    def __init__(
        self, run: RunFolder, state: TrainState, facts: Mapping[str, Any], keep: int, writes: bool = True
    ) -> None:
        self.run, self.state, self.facts, self.keep, self.writes = run, state, facts, keep, writes
        self.last_good = self._place() if run.last.exists() else "none was written yet"

    def __call__(self, name: str) -> None:
        """Raises MachineError when the file can't be written; the one before is intact."""
        self._write(name)
        if name == "last":
            self.last_good = self._place()
            if self.keep and self.writes and not self.state.progress.batch:  # an epoch has ended
                self._write(f"epoch-{self.state.progress.epoch:05}")
                checkpoint.keep_newest(self.run.checkpoints, self.keep)

    def _write(self, name: str) -> None:
        if not self.writes:
            return
        content = {"state": self.state.state_dict(), **self.facts}
        checkpoint.save(content, self.run.checkpoints / f"{name}.pt")

    def _place(self) -> str:
        return f"{self.run.last} (step {self.state.progress.step})"
