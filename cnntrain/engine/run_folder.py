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

from cnntrain.engine.checkpoint import remove_temporaries, versions
from cnntrain.engine.git import find_commit
from cnntrain.errors import MachineError, UserError
from cnntrain.files import exists, is_folder, open_lock, write_text, write_whole

log = logging.getLogger("cnntrain")


class RunFolder:
    """Paths inside a run's folder. Made by `open_run_folder`."""

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
    """Whether a run has been at work in this folder, or is, so that it must be locked before it is read."""
    there = (folder / "checkpoints").exists() or (folder / ".lock").exists()
    return there and os.access(folder, os.W_OK)  # an archived run can only be read


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder while the block runs; the system frees it when its holder dies.

    It consists of two: one on the file `.lock`, which other machines see too where the file system allows, and one on
    the folder itself, which still holds after somebody deleted the file.

    Raises:
        UserError: another process holds it.
        MachineError: the file can't be made.
    """
    with contextlib.ExitStack() as held:
        try:
            _lock_file(folder, held)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, descriptor)
            _take(descriptor)  # where only files can be locked (NFS), the file's lock alone has to do
        except BlockingIOError as error:
            raise UserError(
                f"run_dir: another process is at work in {folder}; wait for it, or choose another folder"
            ) from error
        except OSError as error:
            raise MachineError(f"{folder / '.lock'}: can't lock the folder: {error.strerror}") from error
        yield


def _lock_file(folder: Path, held: contextlib.ExitStack) -> None:
    """Lock the file `.lock`: the one that still has this name once it is locked."""
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
                    "run_dir: the file system of %s locks no files (%s), so a second process in this folder would not "
                    "be noticed; start none", folder, missing,
                )  # fmt: skip
            held.enter_context(opened.pop_all())
            return


def _take(descriptor: int) -> str | None:
    """Lock an open file or folder; what the system says where its file system has no locks.

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
def open_run_folder(
    path: Path | None, label: str, trains: bool = False, locked: bool = False
) -> Iterator[RunFolder]:
    """The run's folder, made if need be and locked while the block runs.

    Args:
        path: where the user wants it, or None for a new folder outputs/DATE/TIME-label.
        trains: it is a training's; whatever else is done does not write over one.
        locked: the caller holds its lock (`lock_folder`) already.

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
    except OSError as error:
        raise MachineError(f"{folder}: can't make the run's folder: {error.strerror}") from error
    with contextlib.nullcontext() if locked else lock_folder(folder):
        run = RunFolder(folder)
        for inner in (run.checkpoints, run.figures):
            if exists(inner) and not is_folder(inner, folder):
                raise UserError(
                    f"{inner}: is a link or a file, and must be a folder; links inside a run folder are not followed"
                )
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
    if commit := find_commit(Path.cwd()):
        described |= {"git": commit.name, "git_dirty": commit.dirty}
    return described
