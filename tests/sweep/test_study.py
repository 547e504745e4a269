"""A sweep's memory: what was asked for, taken and told, over several sittings."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cnntrain.cli import parse_arguments
from cnntrain.errors import UserError
from cnntrain.sweep.plan import Repeat, SweepPlan, read_plan
from cnntrain.sweep.storage import open_study
from cnntrain.sweep.study import Outcome, Study

Read = Callable[..., SweepPlan]


def work_off(study: Study, value: Callable[[dict[str, str]], Outcome], at_most: int = 1000) -> list[dict[str, str]]:
    tried = []
    while len(tried) < at_most and (trial := study.next_trial()):
        tried.append(trial.values)
        study.record(trial.number, Repeat(0), value(trial.values))
        study.finish(trial.number)
    return tried


def ok(values: dict[str, str]) -> Outcome:
    return Outcome("done", float(values["optimizer.lr"]))


def test_a_grid_comes_in_its_order_and_once(plan: Read, own_folder: Path) -> None:
    asked = plan("model=mlp,lenet5", "optimizer.lr=0.1,0.2", "epochs=range(1,3)")
    study = open_study(asked, own_folder, 1)
    first = work_off(study, ok, 3)
    again = open_study(asked, own_folder, 1)  # another sitting
    assert first + work_off(again, ok) == asked.grid()
    assert [t.values for t in again.trials()] == asked.grid() and again.next_trial() is None
    assert all(t.outcomes[Repeat(0)] == ok(t.values) and t.is_finished for t in again.trials())


def test_what_was_under_way_is_taken_up_first(plan: Read, own_folder: Path) -> None:
    asked = plan("model=mlp,lenet5", "optimizer.lr=0.1,0.2", "sweep.seeds=2")
    study = open_study(asked, own_folder, 1)
    broken = study.next_trial()
    assert broken is not None
    study.record(broken.number, Repeat(0), Outcome("done", 0.5, {"val/top1": 0.5}, time_s=1.5))
    taken_up = open_study(asked, own_folder, 1).next_trial()
    assert taken_up is not None and taken_up.number == broken.number and taken_up.values == broken.values
    assert taken_up.outcomes == {Repeat(0): Outcome("done", 0.5, {"val/top1": 0.5}, time_s=1.5)}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_draws_are_a_function_of_the_seed_and_the_number(plan: Read, own_folder: Path, sampler: str) -> None:
    space = (
        "optimizer.lr=tag(log,interval(1e-4,1e-1))", "batch_size=int(interval(8,64))", "model=mlp,lenet5",
        "epochs=range(1,9,2)", f"sweep.sampler={sampler}", "sweep.trials=12",
    )  # fmt: skip
    tried = []
    for name, sittings in (("unbroken", [12]), ("broken", [3, 5, 4]), ("other", [12])):
        (own_folder / name).mkdir()
        asked = plan(*space, *(["sweep.seed=1"] if name == "other" else []))
        tried.append([v for n in sittings for v in work_off(open_study(asked, own_folder / name, 1), ok, n)])
    unbroken, broken, other = tried
    assert unbroken == broken and len(unbroken) == 12 and unbroken != other
    for values in unbroken:
        assert 1e-4 <= float(values["optimizer.lr"]) <= 1e-1 and 8 <= int(values["batch_size"]) < 64
        assert values["epochs"] in ("1", "3", "5", "7") and values["model"] in ("mlp", "lenet5")


def test_a_setting_drawn_again_is_not_run_again(plan: Read, own_folder: Path) -> None:
    asked = plan("optimizer.lr=0.1,0.2", "sweep.sampler=random", "sweep.trials=10")
    study = open_study(asked, own_folder, 1)
    assert sorted(v["optimizer.lr"] for v in work_off(study, ok)) == ["0.1", "0.2"]
    assert study.num_duplicates == 8 and len(study.trials()) == 2


def test_tpe_goes_where_it_is_good(plan: Read, own_folder: Path) -> None:
    def bowl(values: dict[str, str]) -> Outcome:
        rate = math.log10(float(values["optimizer.lr"]))
        return Outcome("diverged") if rate > -0.5 else Outcome("done", 1 - (rate + 2) ** 2 / 10)

    asked = plan("optimizer.lr=tag(log,interval(1e-5,1))", "sweep.sampler=tpe", "sweep.trials=30")
    tried = work_off(open_study(asked, own_folder, 1), bowl)
    late = [abs(math.log10(float(values["optimizer.lr"])) + 2) for values in tried[15:]]
    assert sum(distance < 0.7 for distance in late) > 15 * 1.4 / 5  # as many as chance would put there


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["median", "asha", "hyperband"])
def test_a_hopeless_run_is_given_up(plan: Read, own_folder: Path, pruner: str) -> None:
    asked = plan("optimizer.lr=range(1,13)", f"sweep.pruner={pruner}", "epochs=9")
    study, kept = open_study(asked, own_folder, 9), {}
    while trial := study.next_trial():
        rate = float(trial.values["optimizer.lr"])
        quality = {1: 1.0, 2: 0.9, 3: 0.8, 4: 0.85}.get(rate, 0.5 / rate)
        epochs = next((e for e in range(1, 10) if study.should_prune(trial.number, e, quality * e / 9)), None)
        kept[rate] = epochs is None
        study.record(trial.number, Repeat(0), Outcome("done" if kept[rate] else "pruned", quality))
        study.finish(trial.number)
    assert kept[1.0] and sum(kept.values()) < 9
    if pruner == "median":
        assert not any(kept[float(rate)] for rate in range(5, 13))


def test_a_diverged_run_is_worse_than_all_and_a_failed_one_is_none(plan: Read, own_folder: Path) -> None:
    outcomes = {"0.1": Outcome("done", 0.2), "0.2": Outcome("diverged"), "0.3": Outcome("failed", error="x")}
    study = open_study(plan("optimizer.lr=0.1,0.2,0.3"), own_folder, 1)
    work_off(study, lambda values: outcomes[values["optimizer.lr"]])
    assert [t.value for t in study.study.trials] == [0.2, -math.inf, None]


def test_another_command_does_not_go_on_with_a_sweep(plan: Read, own_folder: Path) -> None:
    work_off(open_study(plan("optimizer.lr=0.1,0.2"), own_folder, 1), ok, 1)
    with pytest.raises(UserError, match=r"contains a sweep with another command, which differs in epochs=2"):
        open_study(plan("optimizer.lr=0.1,0.2", "epochs=2"), own_folder, 1)
    with pytest.raises(UserError, match=r"differs in optimizer\.lr"):
        open_study(plan("optimizer.lr=0.1,0.3"), own_folder, 1)
    open_study(plan("optimizer.lr=0.1,0.2", "sweep.jobs=2", "resume=auto", "run_dir=x"), own_folder, 1)


def test_more_trials_may_be_asked_for_later(plan: Read, own_folder: Path) -> None:
    space = ("optimizer.lr=interval(0,1)", "sweep.sampler=random")
    work_off(open_study(plan(*space, "sweep.trials=2"), own_folder, 1), ok)
    study = open_study(plan(*space, "sweep.trials=5"), own_folder, 1)
    assert len(work_off(study, ok)) == 3 and len(study.trials()) == 5


def test_a_journal_torn_by_a_kill_is_read_to_its_last_whole_line(plan: Read, own_folder: Path) -> None:
    asked = plan("optimizer.lr=0.1,0.2")
    work_off(open_study(asked, own_folder, 1), ok, 1)
    with (own_folder / "journal.log").open("ab") as journal:
        journal.write(b'{"op_code": 5, "wor')
    study = open_study(asked, own_folder, 1)
    work_off(study, ok)
    assert [t.values["optimizer.lr"] for t in open_study(asked, own_folder, 1).trials()] == ["0.1", "0.2"]


def photographs(root: Path, shade: int = 0) -> str:
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                color = (40 * i, 100 * number, shade)
                Image.new("RGB", (8, 8), color).save(root / split / name / f"{i}.png")
    return f"data.root={root}"


def test_data_that_moved_go_on_and_other_data_do_not(plan: Read, own_folder: Path) -> None:
    space = ("data=image_folder", "data.size=8", "model=mlp", "optimizer.lr=0.1,0.2")
    here, moved = (photographs(own_folder / name) for name in ("here", "moved"))
    asked = plan(*space, here)
    work_off(open_study(asked, own_folder, 1), ok, 1)
    assert len(work_off(open_study(plan(*space, moved), own_folder, 1), ok)) == 1
    (own_folder / "moved/train/cat/7.png").write_bytes((own_folder / "moved/train/cat/1.png").read_bytes())
    with pytest.raises(UserError, match="contains a sweep on other data"):
        open_study(plan(*space, moved), own_folder, 1)


def test_machines_share_the_trials_of_the_same_data_wherever_they_lie(plan: Read, own_folder: Path) -> None:
    space = (
        "data=image_folder",
        "data.size=8",
        "model=mlp",
        "optimizer.lr=0.1,0.2",
        "sweep.storage=shared.log",
    )
    names = []
    for name in ("here", "moved", "other"):
        root = photographs(own_folder / name)
        if name == "other":
            (own_folder / name / "train/cat/0.png").rename(own_folder / name / "train/cat/new.png")
        (own_folder / f"sweep-{name}").mkdir()
        names.append(open_study(plan(*space, root), own_folder / f"sweep-{name}", 1).study.study_name)
    assert names[0] == names[1] != names[2]


def test_settings_of_a_file_are_part_of_the_sweep(own_folder: Path) -> None:
    (own_folder / "mine/model").mkdir(parents=True)
    file = own_folder / "mine/model/own.yaml"
    argv = ["-m", "--config-dir", str(own_folder / "mine"), "model=own", "optimizer.lr=0.1,0.2"]
    for width in (8, 9):
        file.write_text(f"defaults: [mlp, _self_]\nvalues: {{width: {width}}}\n")
        asked = read_plan(parse_arguments(argv), True)
        if width == 8:
            open_study(asked, own_folder, 1)
    with pytest.raises(UserError, match=r"model\.values\.width was 8, is now 9"):
        open_study(asked, own_folder, 1)


@pytest.mark.parametrize(
    "content", ["", '{"id": "abc", "ask', "[]", '{"id": 5}', '{"id": "a", "asked": 3, "data": []}']
)
def test_a_damaged_sweep_json_is_named(plan: Read, own_folder: Path, content: str) -> None:
    (own_folder / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"sweep\.json: .*run_dir"):
        open_study(plan("optimizer.lr=0.1,0.2"), own_folder, 1)


def test_a_storage_that_fails_is_named_without_its_password(plan: Read, own_folder: Path) -> None:
    for url in (
        "sqlite://me:s3cret@/x.db",
        "nodb://me:s3cret@nowhere/x",
        "postgresql://me:s3cret@localhost:no/x",
    ):
        with pytest.raises(UserError, match=r"sweep\.storage: .*:\*\*\*@") as caught:
            open_study(plan("optimizer.lr=0.1,0.2", f"sweep.storage='{url}'"), own_folder, 1)
        assert "s3cret" not in str(caught.value)
    assert "s3cret" not in (own_folder / "sweep.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["shared.log", "sqlite:///shared.db"])
def test_machines_that_share_a_storage_share_the_trials(plan: Read, own_folder: Path, storage: str) -> None:
    asked = plan("optimizer.lr=0.1,0.2,0.3,0.4", f"sweep.storage={storage}")
    studies = []
    for name in ("one", "other"):
        (own_folder / name).mkdir()
        studies.append(open_study(asked, own_folder / name, 1))
    one, other = studies
    broken = one.next_trial()
    tried = [v["optimizer.lr"] for _ in range(2) for study in (other, one) for v in work_off(study, ok, 1)]
    assert broken is not None and sorted([broken.values["optimizer.lr"], *tried]) == [
        "0.1",
        "0.2",
        "0.3",
        "0.4",
    ]
    assert other.next_trial() is None and len(other.trials()) == 4
    again = open_study(asked, own_folder / "one", 1).next_trial()  # each takes up what was its own
    assert again is not None and again.number == broken.number
    assert open_study(asked, own_folder / "other", 1).next_trial() is None


def test_a_storage_that_is_not_there_is_named(plan: Read, own_folder: Path) -> None:
    for storage in ("nodb://nowhere", "no/such/folder/journal.log", "postgresql://localhost/x"):
        with pytest.raises(UserError, match=r"sweep\.storage"):
            open_study(plan("optimizer.lr=0.1,0.2", f"sweep.storage='{storage}'"), own_folder, 1)
