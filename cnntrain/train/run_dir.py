"""A run owns one folder, and a folder has one owner at a time."""

import contextlib
import datetime
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cnntrain.errors import MachineError, UserError
from cnntrain.io.safe_files import exists, is_folder, open_lock, write_text, write_whole
from cnntrain.train.checkpoint import remove_temporaries, versions
from cnntrain.train.git import find_commit

log = logging.getLogger("cnntrain")


class RunDir:
    """Paths inside a run's folder. Made by `open_run_dir`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.best = self.checkpoints / "best.pt"
        self.metrics = path / "metrics.csv"
        self.figures = path / "figures"

    def write_text(self, name: str, text: str) -> Path:
        target = self.path / name
        write_text(target, text)
        return target

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        target = self.path / name
        write_whole(target, (json.dumps(content, indent=2, allow_nan=True) + "\n").encode())
        return target


def holds_run(folder: Path) -> bool:
    """Return True if a run has written to this folder; it must then be locked before it is read."""
    there = (folder / "checkpoints").exists() or (folder / ".lock").exists()
    return there and os.access(folder, os.W_OK)  # an archived run may be read-only


@contextlib.contextmanager
def lock_run_dir(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder while the block runs; the system releases it if the process dies.

    There are two locks. The lock on the file `.lock` is visible to other machines if the file system supports it. The
    lock on the folder itself remains if somebody deletes the file.

    Raises:
        UserError: another process holds the lock.
        MachineError: the lock file cannot be created.
    """
    with contextlib.ExitStack() as held:
        try:
            _lock_file(folder, held)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, descriptor)
            _take(descriptor)  # file systems that cannot lock folders (NFS) rely on the file's lock
        except BlockingIOError as error:
            raise UserError(
                f"run_dir: another process is using {folder}; wait for it to finish, or choose another folder"
            ) from error
        except OSError as error:
            raise MachineError(f"{folder / '.lock'}: can't lock the folder: {error.strerror}") from error
        yield


def _lock_file(folder: Path, held: contextlib.ExitStack) -> None:
    """Lock the file `.lock`; retry if the file was replaced before the lock was acquired."""
    while True:
        with contextlib.ExitStack() as opened:
            lock = opened.enter_context(open_lock(folder / ".lock"))
            missing = _take(lock.fileno())
            try:
                replaced = not os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / ".lock"))
            except FileNotFoundError:
                replaced = True
            if replaced:
                continue
            if missing:
                log.warning(
                    "run_dir: the file system of %s does not support file locks (%s); do not start a second process "
                    "in this folder, it would not be detected", folder, missing,
                )  # fmt: skip
            held.enter_context(opened.pop_all())
            return


def _take(descriptor: int) -> str | None:
    """Lock an open file or folder; return the system's error message if the file system has no locks, else None.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        return error.strerror or str(error)
    return None


@contextlib.contextmanager
def open_run_dir(
    path: Path | None, label: str, trains: bool = False, locked: bool = False
) -> Iterator[RunDir]:
    """Create the run folder if it is missing, and lock it while the block runs.

    Args:
        path: the folder, or None for a new folder outputs/DATE/TIME-label.
        trains: the command is a training run; other commands do not write into the folder of a training run.
        locked: the caller already holds the lock (`lock_run_dir`).

    Raises:
        UserError: another process is using the folder, or it belongs to a training run.
    """
    folder = unused_run_dir(Path("outputs") / f"{datetime.date.today()}", label) if path is None else path
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir: {folder} is a file; choose another folder")
    if not trains and (folder / "checkpoints").exists():
        raise UserError(f"run_dir: {folder} holds a training, which stays as it is; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: can't make the run's folder: {error.strerror}") from error
    with contextlib.nullcontext() if locked else lock_run_dir(folder):
        run = RunDir(folder)
        for inner in (run.checkpoints, run.figures):
            if exists(inner) and not is_folder(inner, folder):
                raise UserError(
                    f"{inner}: must be a folder, but is a link or a file; links inside a run folder are not followed"
                )
        remove_temporaries(folder)
        yield run


def unused_run_dir(parent: Path, label: str) -> Path:
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
    if commit := find_commit(Path.cwd()):
        described |= {"git": commit.name, "git_dirty": commit.dirty}
    return described
