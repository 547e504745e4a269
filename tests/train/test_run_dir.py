"""A run's folder has one process at a time, also where its lock file is deleted or can't be locked."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from cnntrain import compose, train
from cnntrain.errors import MachineError, UserError
from cnntrain.train import checkpoint
from cnntrain.train import run_dir as run_folder
from cnntrain.train.run_dir import lock_run_dir, open_run_dir
from cnntrain.train.saved import identify

QUICK = ("model=mlp", "model.values.width=8", "data.limit=100", "threads=1", "log.figures=false",
         "log.tensorboard=false", "schedule=constant")  # fmt: skip


def test_a_folder_is_locked_once_and_free_again_afterwards(tmp_path: Path) -> None:
    with (
        lock_run_dir(tmp_path),
        pytest.raises(UserError, match="another process"),
        open_run_dir(tmp_path, "run", trains=True),
    ):
        pass
    with lock_run_dir(tmp_path):
        pass


@pytest.mark.parametrize("again", [False, True], ids=["deleted", "deleted and made again"])
def test_a_lock_file_that_is_deleted_lets_no_second_process_in(tmp_path: Path, again: bool) -> None:
    with lock_run_dir(tmp_path):
        (tmp_path / ".lock").unlink()
        if again:
            (tmp_path / ".lock").touch()
        with pytest.raises(UserError, match="another process"), lock_run_dir(tmp_path):
            pass


def test_a_lock_file_that_is_replaced_before_it_is_locked_is_locked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where its holder deletes it: who opened the old one must not take it for the folder's."""
    opened, found = run_folder.open_lock, []

    def open_and_replace(path: Path) -> Any:
        file = opened(path)
        if not found:
            path.rename(path.with_name("old"))
            path.touch()
        found.append(os.fstat(file.fileno()).st_ino)
        return file

    monkeypatch.setattr(run_folder, "open_lock", open_and_replace)
    with lock_run_dir(tmp_path):
        assert len(found) == 2 and found[-1] == (tmp_path / ".lock").stat().st_ino
        with (tmp_path / ".lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_and_used(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_run_dir(tmp_path):
        pass
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert os.strerror(number) in caplog.text and str(tmp_path) in caplog.text


def test_a_lock_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"gone/\.lock: can't lock the folder: No such file"):
        lock_run_dir(tmp_path / "gone").__enter__()


def test_a_folder_in_use_is_refused_before_its_state_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner may write a newer state at any time, which a process that read before would overwrite."""
    train(compose(*QUICK, "epochs=1", "run_dir=run"))
    monkeypatch.setattr(checkpoint, "load", lambda path: pytest.fail("it was read"))
    for asked in ("run_dir=run", "run_dir=null"):
        with lock_run_dir(Path("run")), pytest.raises(UserError, match="another process"):
            train(compose(*QUICK, "epochs=2", asked, f"resume={'auto' if asked[-3:] == 'run' else 'run'}"))


def steps(run: str) -> int:
    return checkpoint.load(Path(run) / "checkpoints/last.pt")["state"]["progress"]["step"]


def test_a_run_that_came_from_another_goes_on_with_its_own_state() -> None:
    """As a requeued job does, whose command says `resume=first run_dir=second` each time."""
    train(compose(*QUICK, "epochs=1", "run_dir=first"))
    train(compose(*QUICK, "epochs=3", "resume=first", "run_dir=second"))
    one = steps("first")
    asked = (*QUICK, "epochs=4", "resume=first", "run_dir=second")
    assert train(compose(*asked))["steps"] == 4 * one
    rows = Path("second/metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["2", "3", "4"]
    train(compose(*QUICK, "epochs=5", "resume=second", "run_dir=third"))
    assert train(compose(*QUICK, "epochs=6", "resume=first", "run_dir=third"))["steps"] == 6 * one
    assert steps("first") == one and steps("second") == 4 * one


def test_a_run_that_did_not_come_from_the_other_is_not_overwritten() -> None:
    train(compose(*QUICK, "epochs=1", "run_dir=first"))
    train(compose(*QUICK, "epochs=2", "run_dir=second"))
    before = Path("second/checkpoints/last.pt").read_bytes()
    with pytest.raises(UserError, match="was not started from"):
        train(compose(*QUICK, "epochs=3", "resume=first", "run_dir=second"))
    assert Path("second/checkpoints/last.pt").read_bytes() == before


def test_a_run_is_not_set_back_in_its_own_folder() -> None:
    train(compose(*QUICK, "epochs=2", "checkpoint.keep=2", "run_dir=run"))
    first, last = Path("run/checkpoints/epoch-00001.pt"), Path("run/checkpoints/epoch-00002.pt")
    for asked in ((), ("run_dir=run",)):
        with pytest.raises(UserError, match="would overwrite"):
            train(compose(*QUICK, "epochs=3", f"resume={first}", *asked))
    assert train(compose(*QUICK, "epochs=3", f"resume={last}"))["epochs"] == 3
    assert train(compose(*QUICK, "epochs=2", f"resume={first}", "run_dir=other"))["epochs"] == 2


@pytest.mark.parametrize(
    ("run", "ancestors"),
    [(None, []), (5, []), ({"id": 5}, []), ({"id": "x", "ancestors": 5}, ["x"]), ({"ancestors": [[]]}, [])],
)
def test_a_run_id_of_another_form_is_none(run: Any, ancestors: list[str]) -> None:
    found = identify({"run": run}, same_folder=False)
    assert found["ancestors"] == ancestors and len(found["id"]) == 32


def test_a_checkpoint_that_does_not_say_where_it_comes_from_is_not_overwritten() -> None:
    train(compose(*QUICK, "epochs=1", "run_dir=first"))
    train(compose(*QUICK, "epochs=2", "resume=first", "run_dir=second"))
    path = Path("second/checkpoints/last.pt")
    saved = checkpoint.load(path)
    checkpoint.save({**saved, "run": None}, path)
    with pytest.raises(UserError, match="was not started from"):
        train(compose(*QUICK, "epochs=3", "resume=first", "run_dir=second"))
    assert train(compose(*QUICK, "epochs=3", "resume=auto", "run_dir=second"))["epochs"] == 3


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_going_on_without_saying_where_is_refused(kind: str, own_folder: Path) -> None:
    from cnntrain.cli import main

    before = sorted(own_folder.rglob("*"))
    more = ["-m", "optimizer.lr=0.1,0.01"] if kind == "sweep" else []
    assert main([*QUICK, "epochs=1", "resume=auto", *more]) == 2
    assert [path for path in own_folder.rglob("*") if path not in before and path.name != ".cache"] == []


def test_results_of_a_shorter_training_are_not_those_of_a_longer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between its last checkpoint and its results, a lengthened run still has those of before."""
    train(compose(*QUICK, "epochs=1", "run_dir=run"))
    before = Path("run/results.json").read_bytes()
    whole = train(compose(*QUICK, "epochs=2", "run_dir=run", "resume=auto"))
    Path("run/results.json").write_bytes(before)
    found = train(compose(*QUICK, "epochs=2", "run_dir=run", "resume=auto"))
    assert found["epochs"] == 2 and found["best"] == whole["best"]
