"""The run folder: its paths, its lock, and the description of how a run was started."""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cnntrain.errors import MachineError, UserError
from cnntrain.io import safe_files as files
from cnntrain.io.git import find_commit

log = logging.getLogger("cnntrain")
TEMPORARY_NAME = re.compile(r"\..+\.[0-9]+\.tmp")  # as named by `safe_files.open_atomic`


class RunDir:
    """Paths inside a run folder. Created by `open_run_dir`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.best = self.checkpoints / "best.pt"
        self.metrics = path / "metrics.csv"
        self.figures = path / "figures"

    def write_text(self, name: str, text: str) -> Path:
        target = self.path / name
        files.write_text(target, text)
        return target

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        target = self.path / name
        files.write_atomic(target, (json.dumps(content, indent=2, allow_nan=True) + "\n").encode())
        return target


def needs_lock(folder: Path) -> bool:
    """Return True if a run has written to this folder and may still write; lock it before reading it."""
    used = (folder / "checkpoints").exists() or (folder / ".lock").exists()
    return used and os.access(folder, os.W_OK)  # an archived run may be read-only


@contextlib.contextmanager
def lock_run_dir(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder while the block runs; the system releases it if the process dies.

    There are two locks. The lock on the file `.lock` is visible to other machines if the file system supports it. The
    lock on the folder itself remains if somebody deletes the file.

    Raises:
        UserError: another process holds the lock.
        MachineError: the lock file cannot be created.
    """
    with contextlib.ExitStack() as locks:
        try:
            _lock_file(folder, locks)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            locks.callback(os.close, descriptor)
            _try_lock(descriptor)  # file systems that cannot lock folders (NFS) rely on the file's lock
        except BlockingIOError as error:
            raise UserError(
                f"run_dir: another process is using {folder}; wait for it to finish, or choose another folder"
            ) from error
        except OSError as error:
            raise MachineError(f"{folder / '.lock'}: can't lock the folder: {error.strerror}") from error
        yield


def _lock_file(folder: Path, locks: contextlib.ExitStack) -> None:
    """Lock the file `.lock`; retry if the file was replaced before the lock was acquired."""
    while True:
        with contextlib.ExitStack() as opened:
            lock = opened.enter_context(files.open_lock(folder / ".lock"))
            unsupported = _try_lock(lock.fileno())
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / ".lock")):
                    locks.enter_context(opened.pop_all())
                    break
    if unsupported:
        log.warning(
            "run_dir: the file system of %s does not support file locks (%s); do not start a second process in this "
            "folder, it would not be detected",
            folder,
            unsupported,
        )


def _try_lock(descriptor: int) -> str | None:
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
def open_run_dir(path: Path | str | None, label: str, trains: bool = False, locked: bool = False) -> Iterator[RunDir]:
    """Create the run folder if it is missing, and lock it while the block runs.

    Args:
        path: the folder, or None for a new folder outputs/DATE/TIME-label.
        trains: the command is a training run; other commands do not write into the folder of a training run.
        locked: the caller already holds the lock (`lock_run_dir`).

    Raises:
        UserError: another process is using the folder, or it belongs to a training run.
    """
    folder = Path(path) if path else create_run_dir(Path("outputs") / f"{datetime.date.today()}", label)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir: {folder} is a file; choose another folder")
    if not trains and (folder / "checkpoints").exists():
        raise UserError(f"run_dir: {folder} contains a training run; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: can't create the run folder: {error.strerror}") from error
    with contextlib.nullcontext() if locked else lock_run_dir(folder):
        run_dir = RunDir(folder)
        for inner in (run_dir.checkpoints, run_dir.figures):
            if files.exists(inner) and not files.is_folder(inner, folder):
                raise UserError(
                    f"{inner}: must be a folder, but is a link or a file; links inside a run folder are not followed"
                )
        remove_temporaries(folder)
        yield run_dir


def create_run_dir(parent: Path, label: str) -> Path:
    """Create a new folder parent/TIME-label; runs that start at the same time get different folders."""
    base = parent / f"{datetime.datetime.now():%H-%M-%S}-{label}"
    for number in range(10_000):
        candidate = base if not number else base.with_name(f"{base.name}-{number + 1}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise MachineError(f"{candidate}: can't create the run folder: {error.strerror}") from error
        return candidate
    raise MachineError(f"{base}: 10,000 folders of this name exist; set run_dir")


def remove_temporaries(folder: Path) -> None:
    """Delete partly written files that a killed process left in a run folder. The caller must hold its lock."""
    for inner in (folder, folder / "checkpoints", folder / "figures"):
        if inner != folder and not files.is_folder(inner, folder):
            continue
        for path in inner.glob(".*.tmp"):
            if TEMPORARY_NAME.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
                files.remove(path, folder)


def provenance(command_line: str) -> dict[str, Any]:
    """Return the command, package versions and git commit of the working directory, for `run.json`."""
    content = {
        "command": command_line,
        "started": datetime.datetime.now().isoformat(),
        "versions": installed_versions(),
    }
    if commit := find_commit(Path.cwd()):
        content |= {"git": commit.name, "git_dirty": commit.dirty}
    return content


def installed_versions() -> dict[str, str]:
    """Return the versions that a run's numbers may depend on: Python, platform and packages."""
    # platform.platform() would run `uname` to find the name of the processor.
    system = (platform.system(), platform.release(), platform.machine(), "".join(platform.libc_ver()))
    versions = {"python": platform.python_version(), "platform": "-".join(filter(None, system))}
    for name in ("cnntrain", "torch", "torchvision", "numpy", "hydra-core"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
