"""Finding the checkpoint to resume from, and refusing to overwrite a later state or another run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cnntrain import compose, train
from cnntrain.errors import UserError
from cnntrain.train import checkpoint
from cnntrain.train.resume import change_rule, changed_settings, flatten_settings, locate_checkpoint, run_identity
from cnntrain.train.run_dir import lock_run_dir
from tests.runs import SMALL, change_checkpoint, column, rows, weights

QUICK = (
    "model=mlp model.values.width=8 data.limit=100 threads=1 log.figures=false log.tensorboard=false schedule=constant"
).split()


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
        ("epochs", "free"),
        ("log.every_steps", "free"),
        ("optimizer.lr", "new"),
        ("optimizer.name", "fixed"),
        ("data.size", "fixed"),
        ("data.workers", "free"),
        ("model.width", "fixed"),
        ("model.freeze", "new"),
        ("augment.flip.p", "new"),
        ("seed", "fixed"),
    ],
)
def test_the_longest_prefix_of_a_key_decides_whether_it_may_change(key: str, rule: str) -> None:
    assert change_rule(key) == rule


def test_nested_settings_are_flattened_and_compared_by_dotted_key() -> None:
    before, after = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5}, "e": None, "f": {"g": 1}}
    assert changed_settings(before, after) == [("b.c", 2, 5), ("b.d", 3, None), ("f", None, {"g": 1})]
    assert flatten_settings(after) == {"a": 1, "b.c": 5, "e": None, "f.g": 1}


FOREIGN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "short moments": (
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
        r"exp_avg must be a tensor of shape",
    ),
    "sums that are none": (lambda state: state.update(meter={"loss": 1}), r"state\.meter: "),
    "before the start": (lambda state: state["progress"].update(step=-5), r"state\.progress\.step: "),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_state_that_does_not_fit_is_refused(kind: str) -> None:
    change, said = FOREIGN[kind]
    train(compose(*SMALL, "epochs=1", "run_dir=run"))
    change_checkpoint(Path("run/checkpoints/last.pt"), lambda saved: change(saved["state"]))
    with pytest.raises(UserError, match=said):
        train(compose(*SMALL, "epochs=2", "run_dir=run", "resume=auto"))


def test_a_folder_in_place_of_a_checkpoint_is_an_error() -> None:
    Path("run/checkpoints/last.pt").mkdir(parents=True)
    for resume in ("none", "auto"):
        with pytest.raises(UserError, match=r"run/checkpoints/last\.pt: is not a file"):
            train(compose(*SMALL, "run_dir=run", f"resume={resume}"))


def test_a_finished_or_foreign_run_is_not_overwritten() -> None:
    train(compose(*SMALL, "epochs=1", "run_dir=done"))
    before = (Path("done") / "checkpoints" / "best.pt").read_bytes()
    with pytest.raises(UserError, match="resume=auto"):
        train(compose(*SMALL, "epochs=1", "run_dir=done"))
    with pytest.raises(UserError, match="another network"):
        train(compose(*SMALL, "epochs=2", "run_dir=done", "resume=auto", "model=mlp"))
    train(compose(*SMALL, "epochs=1", "run_dir=done", "resume=auto"))
    assert (Path("done") / "checkpoints" / "best.pt").read_bytes() == before


def test_a_finished_run_is_neither_shortened_nor_rewritten() -> None:
    train(compose(*SMALL, "epochs=2", "run_dir=done"))
    names = ("metrics.csv", "config.yaml", "run.json", "results.json")
    before = {name: (Path("done") / name).read_bytes() for name in names}
    train(compose(*SMALL, "epochs=1", "run_dir=done", "resume=auto"))
    with pytest.raises(UserError, match="another network"):
        train(compose(*SMALL, "epochs=3", "run_dir=done", "resume=auto", "model=mlp"))
    assert before == {name: (Path("done") / name).read_bytes() for name in names}
    longer = train(compose(*SMALL, "epochs=3", "run_dir=done", "resume=auto"))
    assert longer["epochs"] == 3 and len(rows("done").splitlines()) == 4


def test_a_run_ended_by_early_stopping_is_finished(capsys: pytest.CaptureFixture[str]) -> None:
    """Also if it was killed after its last epoch, before it wrote its results."""
    asked = (*SMALL, "model=mlp", "optimizer.lr=0", "early_stopping=1", "limit_batches=2", "run_dir=early")
    first = train(compose(*asked, "epochs=9"))
    results = (Path("early") / "results.json").read_bytes()
    capsys.readouterr()
    assert train(compose(*asked, "epochs=9", "resume=auto")) == first
    assert "early_stopping=" in capsys.readouterr().err
    assert train(compose(*asked, "early_stopping=null", "epochs=2", "resume=auto")) == first
    assert "epochs=" in capsys.readouterr().err
    (Path("early") / "results.json").unlink()
    assert train(compose(*asked, "epochs=9", "resume=auto")) == first
    assert (Path("early") / "results.json").read_bytes() == results
    assert train(compose(*asked[:-1], "early_stopping=2", "run_dir=early", "epochs=9", "resume=auto"))["epochs"] == 3


def test_a_run_resumed_from_an_old_checkpoint_forgets_later_best_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    asked = (*SMALL, "model=mlp", "epochs=4", "checkpoint.keep=9")
    train(compose(*asked, "optimizer.lr=0.01", "run_dir=run"))
    state, first = checkpoint.load(Path("run/checkpoints/best.pt"))["state"], "run/checkpoints/epoch-00001.pt"
    assert state["progress"]["epoch"] > 1
    found = train(compose(*asked, "optimizer.lr=0", f"resume={first}", "run_dir=other"))
    best = checkpoint.load(Path("other/checkpoints/best.pt"))["state"]["progress"]["best"]
    assert found["best"]["epoch"] == best["epoch"] == 1  # the checkpoint that it went on from is the best itself
    capsys.readouterr()
    change_checkpoint(Path(first), lambda saved: saved["state"]["progress"]["best"].update(step=1.0))
    found = train(compose(*asked, "optimizer.lr=0", f"resume={first}", "run_dir=third"))
    assert "best epoch are missing" in capsys.readouterr().err
    best = checkpoint.load(Path("third/checkpoints/best.pt"))["state"]["progress"]["best"]
    assert found["best"]["epoch"] == best["epoch"] == 2
    with pytest.raises(UserError, match="nothing is left to train"):
        train(compose(*asked, "epochs=1", f"resume={first}", "run_dir=fourth"))
    assert not Path("fourth").exists()


@pytest.mark.parametrize(
    ("of_another_machine", "kept"),
    [
        ({"device": "cuda", "precision": "fp16", "threads": 1}, False),
        ({"device": "cpu", "precision": "bf16", "threads": 1024}, True),
        ({"device": "cpu", "processes": 4, "precision": "bf16", "threads": 1}, False),
    ],
    ids=["a GPU's", "more cores", "more processes"],
)
def test_values_resolved_on_another_machine_are_resolved_again(
    of_another_machine: dict[str, Any], kept: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (*SMALL, "model=mlp", "threads=null", "run_dir=run")
    threads = torch.get_num_threads()
    train(compose(*common, "epochs=1", "device=cpu"))
    last = Path("run/checkpoints/last.pt")
    here = checkpoint.load(last)["resolved"]
    change_checkpoint(last, lambda saved: saved["resolved"].update(of_another_machine))
    capsys.readouterr()
    train(compose(*common, "epochs=2", "resume=auto", "device=cpu"))
    assert torch.get_num_threads() == threads
    after = checkpoint.load(last)
    assert after["config"]["precision"] == "auto" and after["config"]["threads"] is None
    assert after["resolved"] == {**here, **({"precision": "bf16"} if kept else {})}
    changed = not kept and of_another_machine["precision"] != here["precision"]
    assert ("resume: precision was" in capsys.readouterr().err) == changed


LENGTHENED = {
    "one_cycle": (("epochs=1",), ("epochs=3",), True),
    "a constant one": (("epochs=1", "schedule=constant"), ("epochs=3", "schedule=constant"), False),
    "one that watches": (("epochs=1", "schedule=plateau"), ("epochs=3", "schedule=plateau"), False),
    "another rate": (("epochs=2", "schedule=constant"), ("epochs=3", "schedule=constant", "optimizer.lr=0.1"), True),
}


@pytest.mark.parametrize("kind", LENGTHENED)
def test_a_jump_of_the_learning_rate_is_logged(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, then, jumps = LENGTHENED[kind]
    common = (*SMALL, "model=mlp", "model.values.width=8", "run_dir=run")
    train(compose(*common, *first))
    capsys.readouterr()
    train(compose(*common, *then, "resume=auto"))
    said = [line for line in capsys.readouterr().err.splitlines() if "the learning rate jumps" in line]
    assert len(said) == jumps
    if jumps:
        rates = column("run", "lr")
        assert f"{rates[-3 if kind == 'one_cycle' else -2]:.3g}" in said[0] and said[0].startswith("warning: ")


def test_best_weights_of_another_network_are_not_loaded_at_the_end() -> None:
    train(compose(*SMALL, "epochs=1", "run_dir=run"))
    change_checkpoint(
        Path("run/checkpoints/best.pt"), lambda saved: saved["state"].update(model={"weight": torch.zeros(2)})
    )
    results = train(compose(*SMALL, "epochs=2", "run_dir=run", "resume=auto"))
    assert results["best"]["epoch"] in (1, 2) and "weight" not in weights("run")
