"""The trials of a sweep in its storage, over several sessions."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cnntrain.cli import parse_arguments
from cnntrain.errors import MachineError, UserError
from cnntrain.sweep.plan import Repeat, SweepPlan, read_plan
from cnntrain.sweep.study import Outcome, Study, open_study

Read = Callable[..., SweepPlan]


def execute(study: Study, outcome: Callable[[dict[str, str]], Outcome], at_most: int = 1000) -> list[dict[str, str]]:
    """Execute runs and return their settings."""
    settings = []
    while len(settings) < at_most and (run := study.next_run()):
        settings.append(run.values)
        study.finish_run(run, outcome(run.values))
    return settings


def ok(values: dict[str, str]) -> Outcome:
    return Outcome("done", float(values["optimizer.lr"]))


def test_a_grid_is_executed_in_its_order_and_once(plan: Read, own_folder: Path) -> None:
    asked = plan("model=mlp,lenet5", "optimizer.lr=0.1,0.2", "epochs=range(1,3)")
    study = open_study(asked, own_folder)
    first = execute(study, ok, 3)
    again = open_study(asked, own_folder)  # another session
    assert first + execute(again, ok) == asked.grid()
    assert [t.values for t in again.trials()] == asked.grid() and again.next_run() is None
    assert all(t.outcomes[Repeat(0)] == ok(t.values) and t.is_finished for t in again.trials())


def test_interrupted_trials_are_resumed_first(plan: Read, own_folder: Path) -> None:
    asked = plan("model=mlp,lenet5", "optimizer.lr=0.1,0.2", "sweep.seeds=2")
    study = open_study(asked, own_folder)
    interrupted, outcome = study.next_run(), Outcome("done", 0.5, {"val/top1": 0.5}, time_s=1.5)
    assert interrupted is not None
    study.finish_run(interrupted, outcome)
    study = open_study(asked, own_folder)
    (trial,) = study.trials()
    assert trial.values == interrupted.values and trial.outcomes == {Repeat(0): outcome}
    run = study.next_run()
    assert run is not None and (run.trial, run.values, run.repeat) == (0, interrupted.values, Repeat(1))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_draws_are_a_function_of_the_seed_and_the_trial_number(plan: Read, own_folder: Path, sampler: str) -> None:
    space = ["optimizer.lr=tag(log,interval(1e-4,1e-1))", "batch_size=int(interval(8,64))", "model=mlp,lenet5"]
    space += ["epochs=range(1,9,2)", f"sweep.sampler={sampler}", "sweep.trials=12"]
    settings = []
    for name, sessions in (("uninterrupted", [12]), ("interrupted", [3, 5, 4]), ("other", [12])):
        (own_folder / name).mkdir()
        asked = plan(*space, *(["sweep.seed=1"] if name == "other" else []))
        settings.append([v for n in sessions for v in execute(open_study(asked, own_folder / name), ok, n)])
    uninterrupted, interrupted, other = settings
    assert uninterrupted == interrupted and len(uninterrupted) == 12 and uninterrupted != other
    for values in uninterrupted:
        assert 1e-4 <= float(values["optimizer.lr"]) <= 1e-1 and 8 <= int(values["batch_size"]) < 64
        assert values["epochs"] in ("1", "3", "5", "7") and values["model"] in ("mlp", "lenet5")


def test_a_setting_that_is_drawn_again_is_not_executed_again(plan: Read, own_folder: Path) -> None:
    asked = plan("optimizer.lr=0.1,0.2", "sweep.sampler=random", "sweep.trials=10")
    study = open_study(asked, own_folder)
    assert sorted(v["optimizer.lr"] for v in execute(study, ok)) == ["0.1", "0.2"]
    assert study.num_duplicates == 8 and len(study.trials()) == 2


def test_tpe_concentrates_on_good_settings(plan: Read, own_folder: Path) -> None:
    def bowl(values: dict[str, str]) -> Outcome:
        rate = math.log10(float(values["optimizer.lr"]))
        return Outcome("diverged") if rate > -0.5 else Outcome("done", 1 - (rate + 2) ** 2 / 10)

    asked = plan("optimizer.lr=tag(log,interval(1e-5,1))", "sweep.sampler=tpe", "sweep.trials=30")
    settings = execute(open_study(asked, own_folder), bowl)
    late = [abs(math.log10(float(values["optimizer.lr"])) + 2) for values in settings[15:]]
    assert sum(distance < 0.7 for distance in late) > 15 * 1.4 / 5  # more than random draws


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["median", "asha", "hyperband"])
def test_pruners_stop_bad_runs(plan: Read, own_folder: Path, pruner: str) -> None:
    asked = plan("optimizer.lr=range(1,13)", f"sweep.pruner={pruner}", "epochs=9")
    study, kept = open_study(asked, own_folder), {}
    while run := study.next_run():
        rate = float(run.values["optimizer.lr"])
        quality = {1: 1.0, 2: 0.9, 3: 0.8, 4: 0.85}.get(rate, 0.5 / rate)
        kept[rate] = not any(study.should_prune(run, epoch, quality * epoch / 9) for epoch in range(1, 10))
        study.finish_run(run, Outcome("done" if kept[rate] else "pruned", quality))
    assert kept[1.0] and sum(kept.values()) < 9
    if pruner == "median":
        assert not any(kept[float(rate)] for rate in range(5, 13))


def test_a_diverged_run_has_the_worst_value_and_a_failed_one_none(plan: Read, own_folder: Path) -> None:
    outcomes = {"0.1": Outcome("done", 0.2), "0.2": Outcome("diverged"), "0.3": Outcome("failed", error="x")}
    study = open_study(plan("optimizer.lr=0.1,0.2,0.3"), own_folder)
    execute(study, lambda values: outcomes[values["optimizer.lr"]])
    assert [t.value for t in study.study.trials] == [0.2, -math.inf, None]


def test_a_sweep_cannot_be_resumed_with_another_command(plan: Read, own_folder: Path) -> None:
    execute(open_study(plan("optimizer.lr=0.1,0.2"), own_folder), ok, 1)
    with pytest.raises(UserError, match=r"contains a sweep with another command, which differs in epochs=2"):
        open_study(plan("optimizer.lr=0.1,0.2", "epochs=2"), own_folder)
    with pytest.raises(UserError, match=r"differs in optimizer\.lr"):
        open_study(plan("optimizer.lr=0.1,0.3"), own_folder)
    open_study(plan("optimizer.lr=0.1,0.2", "sweep.jobs=2", "resume=auto", "run_dir=x"), own_folder)


def test_the_number_of_trials_may_be_increased_later(plan: Read, own_folder: Path) -> None:
    space = ("optimizer.lr=interval(0,1)", "sweep.sampler=random")
    execute(open_study(plan(*space, "sweep.trials=2"), own_folder), ok)
    study = open_study(plan(*space, "sweep.trials=5"), own_folder)
    assert len(execute(study, ok)) == 3 and len(study.trials()) == 5


def test_an_incomplete_last_line_of_the_journal_is_dropped(plan: Read, own_folder: Path) -> None:
    asked = plan("optimizer.lr=0.1,0.2")
    execute(open_study(asked, own_folder), ok, 1)
    with (own_folder / "journal.log").open("ab") as journal:
        journal.write(b'{"op_code": 5, "wor')
    study = open_study(asked, own_folder)
    execute(study, ok)
    assert [t.values["optimizer.lr"] for t in open_study(asked, own_folder).trials()] == ["0.1", "0.2"]


def make_images(root: Path, shade: int = 0) -> str:
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                color = (40 * i, 100 * number, shade)
                Image.new("RGB", (8, 8), color).save(root / split / name / f"{i}.png")
    return f"data.root={root}"


def test_a_sweep_can_be_resumed_with_moved_data_but_not_with_other_data(plan: Read, own_folder: Path) -> None:
    space = ("data=image_folder", "data.size=8", "model=mlp", "optimizer.lr=0.1,0.2")
    here, moved = (make_images(own_folder / name) for name in ("here", "moved"))
    asked = plan(*space, here)
    execute(open_study(asked, own_folder), ok, 1)
    assert len(execute(open_study(plan(*space, moved), own_folder), ok)) == 1
    (own_folder / "moved/train/cat/7.png").write_bytes((own_folder / "moved/train/cat/1.png").read_bytes())
    with pytest.raises(UserError, match="contains a sweep on other data"):
        open_study(plan(*space, moved), own_folder)


def test_machines_share_a_study_if_their_data_is_equal(plan: Read, own_folder: Path) -> None:
    space = ("data=image_folder", "data.size=8", "model=mlp", "optimizer.lr=0.1,0.2", "sweep.storage=shared.log")
    names = []
    for name in ("here", "moved", "other"):
        root = make_images(own_folder / name)
        if name == "other":
            (own_folder / name / "train/cat/0.png").rename(own_folder / name / "train/cat/new.png")
        (own_folder / f"sweep-{name}").mkdir()
        names.append(open_study(plan(*space, root), own_folder / f"sweep-{name}").study.study_name)
    assert names[0] == names[1] != names[2]


def test_settingsfrom_config_files_are_part_of_the_sweep(own_folder: Path) -> None:
    (own_folder / "mine/model").mkdir(parents=True)
    file = own_folder / "mine/model/own.yaml"
    argv = ["-m", "--config-dir", str(own_folder / "mine"), "model=own", "optimizer.lr=0.1,0.2"]
    for width in (8, 9):
        file.write_text(f"defaults: [mlp, _self_]\nvalues: {{width: {width}}}\n")
        asked = read_plan(parse_arguments(argv), True)
        if width == 8:
            open_study(asked, own_folder)
    with pytest.raises(UserError, match=r"model\.values\.width was 8, is now 9"):
        open_study(asked, own_folder)


@pytest.mark.parametrize(
    "content", ["", '{"id": "abc", "ask', "[]", '{"id": 5}', '{"id": "a", "overrides": 3, "data": []}']
)
def test_a_damaged_sweep_json_is_refused(plan: Read, own_folder: Path, content: str) -> None:
    (own_folder / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"sweep\.json: .*run_dir"):
        open_study(plan("optimizer.lr=0.1,0.2"), own_folder)


def test_passwords_are_masked_in_storage_errors(plan: Read, own_folder: Path) -> None:
    for url in (
        "sqlite://me:s3cret@/x.db",
        "nodb://me:s3cret@nowhere/x",
        "postgresql://me:s3cret@localhost:no/x",
    ):
        with pytest.raises(UserError, match=r"sweep\.storage: .*:\*\*\*@") as caught:
            open_study(plan("optimizer.lr=0.1,0.2", f"sweep.storage='{url}'"), own_folder)
        assert "s3cret" not in str(caught.value)
    assert "s3cret" not in (own_folder / "sweep.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["shared.log", "sqlite:///shared.db"])
def test_machines_share_the_trials_of_a_storage(plan: Read, own_folder: Path, storage: str) -> None:
    asked = plan("optimizer.lr=0.1,0.2,0.3,0.4", f"sweep.storage={storage}")
    studies = []
    for name in ("one", "other"):
        (own_folder / name).mkdir()
        studies.append(open_study(asked, own_folder / name))
    one, other = studies
    interrupted = one.next_run()
    settings = [v["optimizer.lr"] for _ in range(2) for study in (other, one) for v in execute(study, ok, 1)]
    assert interrupted is not None and sorted([interrupted.values["optimizer.lr"], *settings]) == [
        "0.1",
        "0.2",
        "0.3",
        "0.4",
    ]
    assert other.next_run() is None and len(other.trials()) == 4
    again = open_study(asked, own_folder / "one").next_run()  # each machine resumes its own trials
    assert again is not None and again.trial == interrupted.trial
    assert open_study(asked, own_folder / "other").next_run() is None


def test_a_missing_storage_is_refused(plan: Read, own_folder: Path) -> None:
    for storage in ("nodb://nowhere", "no/such/folder/journal.log", "postgresql://localhost/x"):
        with pytest.raises(UserError, match=r"sweep\.storage"):
            open_study(plan("optimizer.lr=0.1,0.2", f"sweep.storage='{storage}'"), own_folder)


def test_trials_that_are_never_enqueued_are_reported(
    plan: Read, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = plan("optimizer.lr=0.1,0.2", "sweep.storage=shared.log")
    monkeypatch.setattr("cnntrain.sweep.study.ENQUEUE_TIMEOUT_S", 0.0)
    for name in ("first", "second"):
        (own_folder / name).mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(Study, "_enqueue_trials", lambda _: None)  # as if the other machine died before
        open_study(shared, own_folder / "first")
    with pytest.raises(MachineError, match=r"sweep\.storage"):
        open_study(shared, own_folder / "second")
