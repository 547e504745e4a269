"""What a command line asks for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cnntrain.cli import main, parse_arguments
from cnntrain.errors import UserError
from cnntrain.sweep.plan import Repeat, SweepPlan, read_plan, round_text
from cnntrain.sweep.search_space import SearchDimension, grid, read_space
from cnntrain.sweep.trial_workers import visible_gpus, worker_share

Read = Callable[..., SweepPlan]

AXES = {
    "model=lenet5,mlp": SearchDimension("model", ("lenet5", "mlp")),
    "model=choice(lenet5,mlp)": SearchDimension("model", ("lenet5", "mlp")),
    "model=glob(lenet*)": SearchDimension("model", ("lenet5", "lenet5_1998")),
    "augment=[flip,crop],none": SearchDimension("augment", ("[flip,crop]", "none")),
    "epochs=range(1,4)": SearchDimension("epochs", ("1", "2", "3"), 1, 3, 1, integer=True),
    "epochs=range(9,1,-4)": SearchDimension("epochs", ("9", "5"), 5, 9, 4, integer=True),
    "ema_decay=range(0,0.5,0.25)": SearchDimension("ema_decay", ("0.0", "0.25"), 0, 0.25, 0.25),
    "optimizer.lr=interval(0.1,0.5)": SearchDimension("optimizer.lr", (), 0.1, 0.5),
    "optimizer.lr=tag(log,interval(1e-4,1e-1))": SearchDimension("optimizer.lr", (), 1e-4, 1e-1, log=True),
    "batch_size=int(interval(8,64))": SearchDimension("batch_size", (), 8, 63, integer=True),
    "batch_size=tag(log,range(8,64,24))": SearchDimension("batch_size", ("8", "32", "56")),
    "batch_size=tag(log,int(interval(8,64)))": SearchDimension("batch_size", (), 8, 63, log=True, integer=True),
}


@pytest.mark.parametrize("override", AXES)
def test_hydras_grammar(override: str) -> None:
    assert read_space([override, "seed=1"]) == (["seed=1"], [AXES[override]])


SLIPS = {
    "epochs=range(3,3)": "epochs: ",
    "model=glob(zzz*)": "model: ",
    "optimizer.lr=interval(1,0.1)": r"optimizer.lr: interval",
    "optimizer.lr=tag(log,interval(0,1))": "above 0 and below",
    "optimizer.lr=tag(lgo,interval(0.1,1))": "tag 'lgo'.*log",
    "seed=shuffle(1,2)": "sweep.sampler=random",
    "optimizer.lr=interval(0.1,0.5)": "a grid needs listed values.*sweep.sampler=random",
    "model=lenet5,lenet6": "model: no such option 'lenet6'",
    "epochs=1,0": "epochs: must be a whole number >= 1",
    "sweep.sampler=tpee": "sweep.sampler: 'tpee' is not one of grid, random, tpe; did you mean 'tpe'",
    "sweep.jobs=0": "sweep.jobs: must be a whole number >= 1",
    "sweep.sampler=tpe": "nothing to draw for tpe",
    "seed=1,2 sweep.seeds=3": "seed: give the repeats as a list.*or set sweep.seeds",
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_named_before_anything_runs(slip: str, plan: Read) -> None:
    with pytest.raises(UserError, match=SLIPS[slip]):
        plan(*slip.split())


def test_a_grid_turns_its_last_key_fastest(plan: Read) -> None:
    plan_ = plan("model=lenet5,mlp", "optimizer.lr=0.1,0.2")
    assert [list(values.values()) for values in plan_.grid() or []] == [
        ["lenet5", "0.1"], ["lenet5", "0.2"], ["mlp", "0.1"], ["mlp", "0.2"],
    ]  # fmt: skip
    assert plan("model=lenet5,mlp", "sweep.trials=1").num_trials == 1
    assert grid([]) == [{}]


def test_seeds_repeat_a_setting_however_they_are_asked_for(plan: Read) -> None:
    for plan_ in (plan("model=mlp,lenet5", "seed=5", "sweep.seeds=2"), plan("model=mlp,lenet5", "seed=5,6")):
        assert plan_.repeats == (Repeat(5), Repeat(6)) and [axis.key for axis in plan_.dimensions] == ["model"]


def test_an_experiment_may_say_what_it_sweeps_over_and_the_command_line_wins(plan: Read) -> None:
    plan_ = plan("experiment=plain_vs_residual", "data=digits")
    assert [(axis.key, axis.values) for axis in plan_.dimensions] == [
        ("model", ("cifar_plain", "cifar_resnet")), ("model.depth", ("20", "56")),
    ]  # fmt: skip
    assert len(plan_.grid() or []) == 4
    shorter = plan("experiment=plain_vs_residual", "data=digits", "model.depth=8")
    assert [axis.key for axis in shorter.dimensions] == ["model"] and "model.depth=8" in shorter.fixed


def test_folds_repeat_a_setting_as_seeds_do(plan: Read) -> None:
    plan_ = plan("data.folds=5", "data.fold=0,1,2", "model=mlp,lenet5")
    assert [axis.key for axis in plan_.dimensions] == ["model"] and plan_.num_trials == 2
    assert plan_.repeats == (Repeat(0, 0), Repeat(0, 1), Repeat(0, 2))
    assert plan_.overlap == pytest.approx(1 / 4)
    plan_ = plan("data.split_seed=7,8", "data.val_fraction=0.2")
    assert plan_.repeats == (Repeat(0, None, 7), Repeat(0, None, 8)) and plan_.overlap == pytest.approx(0.25)


def test_an_experiment_of_folds_is_one_setting(plan: Read, own_folder: Path) -> None:
    plan_ = plan("experiment=faces68", f"data.root={own_folder}", ranked=False)
    assert not plan_.dimensions and plan_.num_trials == 1
    assert plan_.repeats == tuple(Repeat(seed, fold) for seed in (0, 1) for fold in range(5))


def test_data_folds_alone_asks_for_all_of_them_and_a_fold_for_one(plan: Read) -> None:
    space = ("data.folds=4", "optimizer.lr=0.1,0.01")
    assert plan(*space).repeats == tuple(Repeat(0, fold) for fold in range(4))
    plan_ = plan(*space, "data.fold=0", "seed=0,1")
    assert (
        plan_.repeats == (Repeat(0), Repeat(1)) and "data.fold=0" in plan_.identifying_overrides and plan_.overlap == 0
    )
    other = plan("data.folds=2,4")  # settings with other numbers of folds are no repeats
    assert other.repeats == (Repeat(0),) and other.swept_validation_keys == ["data.folds"]


def test_a_fold_without_folds_is_refused(plan: Read) -> None:
    with pytest.raises(UserError, match=r"data\.fold: .* has no effect without data\.folds"):
        plan("data.fold=0,1,2")
    with pytest.raises(UserError, match=r"data\.fold: give the repeats as a list"):
        plan("data.folds=5", "data.fold=int(interval(0,5))", "sweep.sampler=random")


def test_a_run_of_a_fold_has_its_own_folder_settings_and_command(plan: Read) -> None:
    plan_ = plan("data.folds=3", "model=mlp,lenet5", "seed=0,1")
    run = plan_.run(2, {"model": "mlp"}, Repeat(1, 2), Path("there"))
    assert run.folder.name == "002-mlp-seed1-fold2"
    settings = run.settings()
    assert settings.seed == 1 and settings.data["fold"] == 2 and settings.data["folds"] == 3
    assert run.command.endswith("model=mlp seed=1 data.fold=2")
    assert [Repeat.parse(str(repeat)) for repeat in plan_.repeats] == list(plan_.repeats)
    assert "data.fold=0,1,2" in plan_.identifying_overrides and "seed=0,1" in plan_.identifying_overrides


def test_without_m_an_experiment_that_sweeps_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=plain_vs_residual"]) == 2
    assert "sweeps over model, model.depth; add -m" in capsys.readouterr().err


def test_a_runs_command_repeats_it_alone(plan: Read) -> None:
    plan_ = plan("model=mlp,lenet5", "sweep.seeds=2", "run_dir=there", "augment=[shift]")
    run = plan_.run(3, {"model": "mlp"}, Repeat(1), Path("there"))
    kept = "epochs=1 data.limit=60 batch_size=16 threads=1 log.figures=false log.tensorboard=false"
    assert run.command == f"cnntrain {kept} 'augment=[shift]' model=mlp seed=1"
    settings = run.settings()
    assert settings.seed == 1 and settings.run_dir == "there/003-mlp-seed1" and settings.resume == "auto"
    odd = {"augment": "[flip,crop]", "data.root": "'my photos/a=b'", "optimizer.lr": "0.0031622776601683794"}
    assert plan_.run(12, odd, Repeat(0), Path("there")).folder.name == "012-flip,crop-my_photos_a_b-0.003162-seed0"


def test_the_metric_is_the_tasks_own_and_none_where_tasks_differ(plan: Read) -> None:
    assert plan("model=mlp,lenet5").monitor == ("top1", "max")
    assert plan("data=toy_faces", "model=keypoint_cnn", "optimizer.lr=0.1,0.01").monitor == ("nme", "min")
    assert plan("data=digits,toy_shapes", "model=unet_small").monitor is None
    with pytest.raises(UserError, match=r"sweep\.sampler: the runs have no common metric"):
        plan("model=mlp,lenet5", "sweep.sampler=tpe", ranked=False)


@pytest.mark.parametrize(
    ("jobs", "cores", "shares"),
    [
        (2, [0, 1], [[0], [1]]),
        (2, [4, 5, 6, 7, 8], [[4, 5, 6], [7, 8]]),
        (3, [0, 1], [[0], [1], [0]]),
        (1, [0, 1], [[0, 1]]),
        (2, [], [[], []]),
    ],
)
def test_every_core_has_one_worker_where_there_are_enough(jobs: int, cores: list[int], shares: list[list[int]]) -> None:
    assert [worker_share(worker, jobs, cores) for worker in range(jobs)] == shares


@pytest.mark.parametrize("override", [o for o in AXES if "range" not in o and "glob" not in o and "choice" not in o])
def test_an_axis_is_said_as_it_is_typed(override: str) -> None:
    said = str(read_space([override])[1][0]).replace(" ", "")
    assert read_space([said]) == read_space([override])


def test_gpus_are_those_that_may_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_cfg_shows_the_first_setting_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "--cfg", "model=mlp,lenet5", "seed=3"]) == 0
    said = yaml.safe_load(capsys.readouterr().out)
    assert said["choices"]["model"] == "mlp" and said["seed"] == 3 and not list(Path.cwd().iterdir())


def test_long_numbers_are_cut_for_people() -> None:
    assert [round_text(v) for v in ("0.0031622776601683794", "0.1", "lenet5", "[flip,crop]")] == [
        "0.003162", "0.1", "lenet5", "[flip,crop]",
    ]  # fmt: skip


def test_values_that_sweep_differently_are_refused() -> None:
    with pytest.raises(UserError, match="different sweep settings"):
        read_plan(parse_arguments(["-m", "sweep.trials=1,2", "model=mlp"]), True)
