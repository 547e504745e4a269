"""Storage of a sweep: a journal file in its own folder, or a storage that several machines share."""

import contextlib
import fcntl
import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from cnntrain.config.command_line import mask_passwords
from cnntrain.errors import UserError
from cnntrain.io.safe_files import open_lock, read_bytes, read_json, write_atomic, write_text
from cnntrain.sweep.plan import SweepPlan
from cnntrain.sweep.study import Study

SWEEP_FILE, JOURNAL_FILE = "sweep.json", "journal.log"


def open_study(plan: SweepPlan, folder: Path, epochs: int | None) -> Study:
    """Open the study of the sweep in `folder`: a new one, or the one to resume.

    Args:
        folder: the sweep's folder, locked by the caller.
        epochs: epochs of each run, for the pruner; None: unknown.

    Raises:
        UserError: the folder contains another sweep, or the storage cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path, url = folder / SWEEP_FILE, plan.sweep.storage
    identity = {
        "asked": plan.identifying_overrides,
        "data": plan.fingerprints(),
        "settings": plan.identifying_settings,
    }
    if path.exists():
        stored = _read_sweep_file(path)
        _check_same_sweep(stored, identity, folder)
        sweep_id = stored["id"]
    else:
        sweep_id = uuid.uuid4().hex
        write_text(path, json.dumps({"id": sweep_id, **identity}, indent=2, default=str) + "\n")
    # Machines that share a storage identify the sweep by its overrides and data fingerprints, not by paths.
    text = "\n".join([*identity["asked"], *identity["data"]])
    name = "cnntrain-" + hashlib.sha256(text.encode()).hexdigest()[:12] if url else "sweep"
    try:
        return Study(plan, _open_storage(folder, url), name, sweep_id, epochs)
    except (OptunaError, ImportError, OSError, ValueError, *database_errors(url)) as error:
        raise UserError(storage_problem(url or folder / JOURNAL_FILE, error)) from error


def storage_problem(storage: object, error: Exception) -> str:
    """Format a storage error with the password masked."""
    masked = mask_passwords(f"sweep.storage={storage}", word=True).partition("=")[2]
    message = (str(error).splitlines() or [type(error).__name__])[0]
    return f"sweep.storage: {masked}: {mask_passwords(message.replace(str(storage), masked))}"


def database_errors(url: str | None) -> tuple[type[Exception], ...]:
    """Return the exceptions that the storage's database may raise; empty for a journal file."""
    if url is None or "://" not in url:
        return ()
    from sqlalchemy.exc import SQLAlchemyError

    return (SQLAlchemyError,)


def _read_sweep_file(path: Path) -> dict[str, Any]:
    """Return the content of sweep.json.

    Raises:
        UserError: the file was not written by a sweep.
    """
    stored = read_json(path, "the sweep in this folder cannot be resumed; choose another run_dir")
    lists = (stored.get(key) for key in ("asked", "data"))
    if not isinstance(stored.get("id"), str) or not all(isinstance(each, list) for each in lists):
        raise UserError(f"{path}: not written by a sweep of this version; choose another run_dir")
    return stored


def _check_same_sweep(stored: Mapping[str, Any], current: Mapping[str, Any], folder: Path) -> None:
    """Compare the command, data and settings of the sweep in the folder with the current ones.

    Raises:
        UserError: they differ.
    """
    remedy = "use the same settings to continue, or another folder"
    differing = sorted(set(map(str, stored["asked"])) ^ set(current["asked"]))
    if differing:
        raise UserError(
            f"run_dir: {folder} contains a sweep with another command, which differs in {differing[0]}; {remedy}"
        )
    if stored["data"] != current["data"]:
        before, after = (", ".join(map(str, each)) for each in (stored["data"], current["data"]))
        raise UserError(
            f"run_dir: {folder} contains a sweep on other data (count-hash was {before}, is now {after}); results on "
            "different data cannot be ranked together; choose another folder"
        )
    before = stored.get("settings")
    after = json.loads(json.dumps(current["settings"], default=str))
    if not isinstance(before, dict):
        return
    for key in after:
        if key in before and before[key] != after[key]:  # a key that is new in this version is not compared
            raise UserError(
                f"run_dir: {folder} contains a sweep with other settings: {key} was {before[key]}, is now "
                f"{after[key]}; {remedy}"
            )


def _open_storage(folder: Path, url: str | None) -> BaseStorage:
    if url is None:
        path = folder / JOURNAL_FILE
        _drop_incomplete_line(path)
        return JournalStorage(JournalFileBackend(str(path), _FileLock(path)))  # pyright: ignore[reportArgumentType]
    return RDBStorage(url) if "://" in url else JournalStorage(JournalFileBackend(url))


class _FileLock:
    """A lock on the journal that the system releases if its process dies. Optuna's own lock would remain for 30 s."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_suffix(".lock")

    def acquire(self) -> bool:
        self.file = open_lock(self.path)
        fcntl.flock(self.file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self.file.close()


def _drop_incomplete_line(path: Path) -> None:
    """Remove an incomplete last line, left by a kill during a write: Optuna would append the next record to it."""
    with contextlib.suppress(FileNotFoundError):
        content = read_bytes(path, max_bytes=2**40)
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            write_atomic(path, content[:complete])
