"""Where a sweep's memory is kept: a journal in its own folder, or a storage that several machines share."""

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

from cnntrain.config.command_text import mask_passwords
from cnntrain.errors import UserError
from cnntrain.io.safe_files import open_lock, read_bytes, read_json, write_atomic, write_text
from cnntrain.sweep.plan import SweepPlan
from cnntrain.sweep.study import Study

ABOUT, JOURNAL = "sweep.json", "journal.log"


def open_study(plan: SweepPlan, folder: Path, epochs: int | None) -> Study:
    """The study of the sweep in `folder`: a new one, or the one that it goes on with.

    Args:
        folder: the sweep's, locked by the caller.
        epochs: of each run, for Hyperband; None where it isn't known.

    Raises:
        UserError: the folder holds another sweep, or the storage can't be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    about, where = folder / ABOUT, plan.sweep.storage
    now = {"asked": plan.asked, "data": plan.fingerprints(), "settings": plan.settings}
    if about.exists():
        owner = _go_on(_read_about(about), now, folder)
    else:
        owner = uuid.uuid4().hex
        write_text(about, json.dumps({"id": owner, **now}, indent=2, default=str) + "\n")
    # Machines that share a storage identify the sweep by its overrides and data fingerprints, not by paths.
    identity = "\n".join([*now["asked"], *now["data"]])
    name = "cnntrain-" + hashlib.sha256(identity.encode()).hexdigest()[:12] if where else "sweep"
    try:
        return Study(plan, _storage(folder, where), name, owner, epochs)
    except (OptunaError, ImportError, OSError, ValueError, *database_errors(where)) as error:
        raise UserError(storage_problem(where or folder / JOURNAL, error)) from error


def storage_problem(where: object, error: Exception) -> str:
    """Format a storage error with the password masked."""
    place = mask_passwords(f"sweep.storage={where}", word=True).partition("=")[2]
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return f"sweep.storage: {place}: {mask_passwords(said.replace(str(where), place))}"


def database_errors(where: str | None) -> tuple[type[Exception], ...]:
    """What a database raises, where one is asked for."""
    if where is None or "://" not in where:
        return ()
    from sqlalchemy.exc import SQLAlchemyError

    return (SQLAlchemyError,)


def _read_about(path: Path) -> dict[str, Any]:
    """Return the content of sweep.json.

    Raises:
        UserError: the file was not written by a sweep.
    """
    about = read_json(path, "the sweep in this folder cannot be resumed; choose another run_dir")
    lists = (about.get(key) for key in ("asked", "data"))
    if not isinstance(about.get("id"), str) or not all(isinstance(each, list) for each in lists):
        raise UserError(f"{path}: not written by a sweep of this version; choose another run_dir")
    return about


def _go_on(about: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> str:
    """Return the id of the sweep in the folder; raise if its command, settings or data differ from the current ones."""
    otherwise = "use the same settings to continue, or another folder"
    differing = sorted(set(map(str, about["asked"])) ^ set(now["asked"]))
    if differing:
        raise UserError(
            f"run_dir: {folder} contains a sweep with another command, which differs in {differing[0]}; {otherwise}"
        )
    if about["data"] != now["data"]:
        before, after = (", ".join(map(str, each)) for each in (about["data"], now["data"]))
        raise UserError(
            f"run_dir: {folder} contains a sweep on other data (count-hash was {before}, is now {after}); results on "
            "different data cannot be ranked together; choose another folder"
        )
    before = about.get("settings")
    plain = json.loads(json.dumps(now["settings"], default=str))
    if isinstance(before, dict):  # a key that is new in this version is compared with its default
        for key in plain:
            if key in before and before[key] != plain[key]:
                raise UserError(
                    f"run_dir: {folder} contains a sweep with other settings: {key} was {before[key]}, is now "
                    f"{plain[key]}; {otherwise}"
                )
    return about["id"]


def _storage(folder: Path, where: str | None) -> BaseStorage:
    if where is None:
        path = folder / JOURNAL
        _drop_torn_line(path)
        return JournalStorage(JournalFileBackend(str(path), _Lock(path)))  # pyright: ignore[reportArgumentType]
    return RDBStorage(where) if "://" in where else JournalStorage(JournalFileBackend(where))


class _Lock:
    """A lock on the journal that the system frees when its holder dies; Optuna's own outlives it for half a minute."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_suffix(".lock")

    def acquire(self) -> bool:
        self.file = open_lock(self.path)
        fcntl.flock(self.file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self.file.close()


def _drop_torn_line(path: Path) -> None:
    """Cut off what a kill in the middle of a write left: Optuna would take the next line for its end."""
    with contextlib.suppress(FileNotFoundError):
        content = read_bytes(path, max_bytes=2**40)
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            write_atomic(path, content[:whole])
