"""A run owns one folder, and a folder has one owner at a time."""

import contextlib
import datetime
import fcntl
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cnntrain.engine.checkpoint import remove_temporaries, versions
from cnntrain.errors import MachineError, UserError
from cnntrain.files import write_whole


class RunFolder:
    """Paths inside a run's folder. Made by `open_run_folder`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.best = self.checkpoints / "best.pt"
        self.metrics = path / "metrics.csv"
        self.figures = path / "figures"

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        target = self.path / name
        write_whole(target, (json.dumps(content, indent=2, allow_nan=True) + "\n").encode())
        return target


@contextlib.contextmanager
def open_run_folder(path: Path | None, label: str, trains: bool = False) -> Iterator[RunFolder]:
    """The run's folder, made if need be and locked while the block runs.

    Args:
        path: where the user wants it, or None for a new folder outputs/DATE/TIME-label.
        trains: it is a training's; whatever else is done does not write over one.

    Raises:
        UserError: another process is at work in it, or it is a training's.
    """
    folder = unused_folder(Path("outputs") / f"{datetime.date.today()}", label) if path is None else path
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir: {folder} is a file; choose another folder")
    if not trains and (folder / "checkpoints").exists():
        raise UserError(f"run_dir: {folder} holds a training, which stays as it is; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise MachineError(f"{folder}: can't make the run's folder: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the system when its holder dies
        except OSError as error:
            raise UserError(
                f"run_dir: another process is at work in {folder}; choose another folder"
            ) from error
        run = RunFolder(folder)
        remove_temporaries(folder)
        yield run


def unused_folder(parent: Path, label: str) -> Path:
    """A folder parent/TIME-label that this call made: no two runs share one, started in the same instant or not."""
    base = parent / f"{datetime.datetime.now():%H-%M-%S}-{label}"
    for number in range(10_000):
        candidate = base if not number else base.with_name(f"{base.name}-{number + 1}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise MachineError(f"{candidate}: can't make the run's folder: {error.strerror}") from error
        return candidate
    raise MachineError(f"{base}: ten thousand runs in one second")


def provenance(command_line: str) -> dict[str, Any]:
    """Command, versions and the git commit of the working folder, for `run.json`."""
    described: dict[str, Any] = {"command": command_line, "started": datetime.datetime.now().isoformat()}
    described["versions"] = versions()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True)
        described["git"] = done.stdout.strip()
        status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=5)
        described["git_dirty"] = bool(status.stdout.strip())
    return described
