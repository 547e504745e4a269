"""Finding the checkpoint to resume from, and refusing to overwrite a later state or another run."""

from pathlib import Path
from typing import Any

import pytest

from cnntrain import compose, train
from cnntrain.errors import UserError
from cnntrain.train import checkpoint
from cnntrain.train.resume import change_rule, changed_settings, flatten_settings, locate_checkpoint, run_identity
from cnntrain.train.run_dir import lock_run_dir

QUICK = ("model=mlp", "model.values.width=8", "data.limit=100", "threads=1", "log.figures=false",
         "log.tensorboard=false", "schedule=constant")  # fmt: skip


def test_a_locked_folder_is_rejected_before_its_checkpoint_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process may save a newer state at any time, which resuming from an older one would overwrite."""
    train(compose(*QUICK, "epochs=1", "run_dir=run"))
    monkeypatch.setattr(checkpoint, "load", lambda path: pytest.fail("the checkpoint was read"))
    for words in (("run_dir=run", "resume=auto"), ("run_dir=null", "resume=run")):
        with lock_run_dir(Path("run")), pytest.raises(UserError, match="another process"):
            train(compose(*QUICK, "epochs=2", *words))


def steps(run: str) -> int:
    return checkpoint.load(Path(run) / "checkpoints/last.pt")["state"]["progress"]["step"]


def test_a_run_resumed_from_another_continues_from_its_own_checkpoint() -> None:
    """A requeued job runs the same command with `resume=first run_dir=second` each time."""
    train(compose(*QUICK, "epochs=1", "run_dir=first"))
    train(compose(*QUICK, "epochs=3", "resume=first", "run_dir=second"))
    one = steps("first")
    words = (*QUICK, "epochs=4", "resume=first", "run_dir=second")
    assert train(compose(*words))["steps"] == 4 * one
    rows = Path("second/metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["2", "3", "4"]
    train(compose(*QUICK, "epochs=5", "resume=second", "run_dir=third"))
    assert train(compose(*QUICK, "epochs=6", "resume=first", "run_dir=third"))["steps"] == 6 * one
    assert steps("first") == one and steps("second") == 4 * one


def test_a_run_that_was_not_resumed_from_the_named_one_is_not_overwritten() -> None:
    train(compose(*QUICK, "epochs=1", "run_dir=first"))
    train(compose(*QUICK, "epochs=2", "run_dir=second"))
    before = Path("second/checkpoints/last.pt").read_bytes()
    with pytest.raises(UserError, match="was not started from"):
        train(compose(*QUICK, "epochs=3", "resume=first", "run_dir=second"))
    assert Path("second/checkpoints/last.pt").read_bytes() == before


def test_an_older_checkpoint_does_not_overwrite_a_later_state() -> None:
    train(compose(*QUICK, "epochs=2", "checkpoint.keep=2", "run_dir=run"))
    first, last = Path("run/checkpoints/epoch-00001.pt"), Path("run/checkpoints/epoch-00002.pt")
    for words in ((), ("run_dir=run",)):
        with pytest.raises(UserError, match="would overwrite"):
            train(compose(*QUICK, "epochs=3", f"resume={first}", *words))
    assert train(compose(*QUICK, "epochs=3", f"resume={last}"))["epochs"] == 3
    assert train(compose(*QUICK, "epochs=2", f"resume={first}", "run_dir=other"))["epochs"] == 2


@pytest.mark.parametrize(
    ("run", "ancestors"),
    [(None, []), (5, []), ({"id": 5}, []), ({"id": "x", "ancestors": 5}, ["x"]), ({"ancestors": [[]]}, [])],
)
def test_an_invalid_run_identity_is_ignored(run: Any, ancestors: list[str]) -> None:
    identity = run_identity({"run": run}, same_folder=False)
    assert identity["ancestors"] == ancestors and len(identity["id"]) == 32


def test_a_checkpoint_without_identity_is_not_overwritten() -> None:
    train(compose(*QUICK, "epochs=1", "run_dir=first"))
    train(compose(*QUICK, "epochs=2", "resume=first", "run_dir=second"))
    path = Path("second/checkpoints/last.pt")
    saved = checkpoint.load(path)
    checkpoint.save({**saved, "run": None}, path)
    with pytest.raises(UserError, match="was not started from"):
        train(compose(*QUICK, "epochs=3", "resume=first", "run_dir=second"))
    assert train(compose(*QUICK, "epochs=3", "resume=auto", "run_dir=second"))["epochs"] == 3


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_resume_auto_needs_run_dir(kind: str, own_folder: Path) -> None:
    from cnntrain.cli import main

    before = sorted(own_folder.rglob("*"))
    more = ["-m", "optimizer.lr=0.1,0.01"] if kind == "sweep" else []
    assert main([*QUICK, "epochs=1", "resume=auto", *more]) == 2
    assert [path for path in own_folder.rglob("*") if path not in before and path.name != ".cache"] == []


def test_results_of_a_shorter_run_are_not_returned_for_a_longer_one() -> None:
    """A longer run that is killed before it writes its results still has the results of the shorter one."""
    train(compose(*QUICK, "epochs=1", "run_dir=run"))
    before = Path("run/results.json").read_bytes()
    whole = train(compose(*QUICK, "epochs=2", "run_dir=run", "resume=auto"))
    Path("run/results.json").write_bytes(before)
    results = train(compose(*QUICK, "epochs=2", "run_dir=run", "resume=auto"))
    assert results["epochs"] == 2 and results["best"] == whole["best"]


def test_a_run_in_its_own_folder_keeps_its_identity() -> None:
    first = run_identity(None, same_folder=False)
    assert first["ancestors"] == [] and run_identity({"run": first}, same_folder=True) == first
    second = run_identity({"run": first}, same_folder=False)
    assert second["ancestors"] == [first["id"]] and second["id"] != first["id"]


def test_a_checkpoint_is_located_by_file_or_run_folder() -> None:
    file = Path("run/checkpoints/last.pt")
    file.parent.mkdir(parents=True)
    file.touch()
    for path in (file, file.parent, Path("run")):
        assert locate_checkpoint(path, "last.pt") == file
    with pytest.raises(UserError, match=r"best\.pt"):
        locate_checkpoint(Path("run"), "best.pt")


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("epochs", "free"), ("log.every_steps", "free"), ("optimizer.lr", "new"), ("optimizer.name", "fixed"),
        ("data.size", "fixed"), ("data.workers", "free"), ("model.width", "fixed"), ("model.freeze", "new"),
        ("augment.flip.p", "new"), ("seed", "fixed"),
    ],
)  # fmt: skip
def test_the_longest_prefix_of_a_key_decides_whether_it_may_change(key: str, rule: str) -> None:
    assert change_rule(key) == rule


def test_nested_settings_are_flattened_and_compared_by_dotted_key() -> None:
    before, after = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5}, "e": None, "f": {"g": 1}}
    assert changed_settings(before, after) == [("b.c", 2, 5), ("b.d", 3, None), ("f", None, {"g": 1})]
    assert flatten_settings(after) == {"a": 1, "b.c": 5, "e": None, "f.g": 1}
