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

from cnntrain.errors import UserError
from cnntrain.sweep.plan import Plan
from cnntrain.sweep.study import Study

ABOUT, JOURNAL = "sweep.json", "journal.log"


def open_study(plan: Plan, folder: Path, epochs: int | None) -> Study:
    """The study of the sweep in `folder`: a new one, or the one that it goes on with.

    Args:
        folder: the sweep's, locked by the caller.
        epochs: of each run, for Hyperband; None where it isn't known.

    Raises:
        UserError: the folder holds another sweep, or the storage can't be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    about, asked, where = folder / ABOUT, plan.asked, plan.sweep.storage
    if about.exists():
        owner = _go_on(json.loads(about.read_text()), asked, folder)
    else:
        owner = uuid.uuid4().hex
        about.write_text(json.dumps({"id": owner, "asked": asked}, indent=2) + "\n")
    name = "cnntrain-" + hashlib.sha256("\n".join(asked).encode()).hexdigest()[:12] if where else "sweep"
    try:
        return Study(plan, _storage(folder, where), name, owner, epochs)
    except (OptunaError, ImportError, OSError, ValueError, *_database_errors(where)) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"sweep.storage: {where or folder / JOURNAL}: {said}") from error


def _database_errors(where: str | None) -> tuple[type[Exception], ...]:
    """What a database raises, where one is asked for."""
    if where is None or "://" not in where:
        return ()
    from sqlalchemy.exc import SQLAlchemyError

    return (SQLAlchemyError,)


def _go_on(about: Mapping[str, Any], asked: list[str], folder: Path) -> str:
    differing = sorted(set(about["asked"]) ^ set(asked))
    if differing:
        raise UserError(
            f"run_dir: {folder} holds a sweep of another command, which differs in {differing[0]}; "
            "give the same keys to go on, or another folder"
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
        self.file = self.path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self.file.close()


def _drop_torn_line(path: Path) -> None:
    """Cut off what a kill in the middle of a write left: Optuna would take the next line for its end."""
    with contextlib.suppress(FileNotFoundError):
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            path.write_bytes(content[:whole])
