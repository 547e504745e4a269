"""The run folder: one process at a time holds its lock, also if the lock file is deleted or cannot be locked."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from cnntrain.errors import MachineError, UserError
from cnntrain.io import safe_files as files
from cnntrain.train.run_dir import create_run_dir, lock_run_dir, open_run_dir


def test_a_folder_has_one_lock_at_a_time(tmp_path: Path) -> None:
    with (
        lock_run_dir(tmp_path),
        pytest.raises(UserError, match="another process"),
        open_run_dir(tmp_path, "run", trains=True),
    ):
        pass
    with lock_run_dir(tmp_path):
        pass


@pytest.mark.parametrize("recreated", [False, True], ids=["deleted", "deleted and created again"])
def test_deleting_the_lock_file_does_not_unlock_the_folder(tmp_path: Path, recreated: bool) -> None:
    with lock_run_dir(tmp_path):
        (tmp_path / ".lock").unlink()
        if recreated:
            (tmp_path / ".lock").touch()
        with pytest.raises(UserError, match="another process"), lock_run_dir(tmp_path):
            pass


def test_a_lock_file_that_is_replaced_before_it_is_locked_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that deletes its lock file may do so between the opening and the locking by another process."""
    open_lock, inodes = files.open_lock, []

    def open_and_replace(path: Path) -> Any:
        file = open_lock(path)
        if not inodes:
            path.rename(path.with_name("old"))
            path.touch()
        inodes.append(os.fstat(file.fileno()).st_ino)
        return file

    monkeypatch.setattr(files, "open_lock", open_and_replace)
    with lock_run_dir(tmp_path):
        assert len(inodes) == 2 and inodes[-1] == (tmp_path / ".lock").stat().st_ino
        with (tmp_path / ".lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock_run_dir(tmp_path):
        pass
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert os.strerror(number) in caplog.text and str(tmp_path) in caplog.text


def test_a_missing_folder_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"gone/\.lock"):
        lock_run_dir(tmp_path / "gone").__enter__()


def test_opening_a_run_folder_removes_temporary_files_of_a_killed_process(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "run", "x", trains=True) as run:
        run.checkpoints.mkdir()
        (run.checkpoints / ".last.pt.1.tmp").touch()
        (run.path / ".metrics.csv.1.tmp").touch()
        (run.path / ".own.tmp").touch()
    with open_run_dir(tmp_path / "run", "x", trains=True) as run:
        assert not list(run.checkpoints.iterdir())
        assert {path.name for path in run.path.glob(".*.tmp")} == {".own.tmp"}


def test_other_commands_do_not_write_into_the_folder_of_a_training_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="run_dir"), open_run_dir(tmp_path / "run", "x"):
        pass
    with open_run_dir(tmp_path / "run", "x", trains=True):
        pass


def test_runs_that_start_at_the_same_time_get_different_folders(tmp_path: Path) -> None:
    assert len({create_run_dir(tmp_path, "net") for _ in range(5)}) == 5
