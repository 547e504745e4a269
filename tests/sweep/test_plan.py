"""Plans of sweeps, read from the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cnntrain.cli import main, parse_arguments
from cnntrain.errors import UserError
from cnntrain.sweep.plan import Repeat, SweepPlan, read_plan, round_number

Read = Callable[..., SweepPlan]

INVALID = {
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


@pytest.mark.parametrize("arguments", INVALID)
def test_invalid_values_are_refused_before_anything_runs(arguments: str, plan: Read) -> None:
    with pytest.raises(UserError, match=INVALID[arguments]):
        plan(*arguments.split())


def test_the_last_key_of_a_grid_varies_fastest(plan: Read) -> None:
    settings = plan("model=lenet5,mlp", "optimizer.lr=0.1,0.2").grid() or []
    names = [" ".join(values.values()) for values in settings]
    assert names == ["lenet5 0.1", "lenet5 0.2", "mlp 0.1", "mlp 0.2"]
    assert plan("model=lenet5,mlp", "sweep.trials=1").num_trials == 1


def test_seeds_and_a_list_of_seeds_give_the_same_repeats(plan: Read) -> None:
    for plan_ in (plan("model=mlp,lenet5", "seed=5", "sweep.seeds=2"), plan("model=mlp,lenet5", "seed=5,6")):
        assert plan_.repeats == (Repeat(5), Repeat(6)) and [d.key for d in plan_.dimensions] == ["model"]


def test_the_command_line_overrides_the_keys_that_an_experiment_sweeps_over(plan: Read) -> None:
    plan_ = plan("experiment=plain_vs_residual", "data=digits")
    swept = {d.key: d.values for d in plan_.dimensions}
    assert swept == {"model": ("cifar_plain", "cifar_resnet"), "model.depth": ("20", "56")}
    assert len(plan_.grid() or []) == 4
    shorter = plan("experiment=plain_vs_residual", "data=digits", "model.depth=8")
    assert [d.key for d in shorter.dimensions] == ["model"] and "model.depth=8" in shorter.fixed


def test_folds_and_split_seeds_are_repeats(plan: Read) -> None:
    plan_ = plan("data.folds=5", "data.fold=0,1,2", "model=mlp,lenet5")
    assert [d.key for d in plan_.dimensions] == ["model"] and plan_.num_trials == 2
    assert plan_.repeats == (Repeat(0, 0), Repeat(0, 1), Repeat(0, 2))
    assert plan_.overlap == pytest.approx(1 / 4)
    plan_ = plan("data.split_seed=7,8", "data.val_fraction=0.2")
    assert plan_.repeats == (Repeat(0, None, 7), Repeat(0, None, 8)) and plan_.overlap == pytest.approx(0.25)


def test_an_experiment_with_folds_has_one_setting(plan: Read, own_folder: Path) -> None:
    plan_ = plan("experiment=faces68", f"data.root={own_folder}", ranked=False)
    assert not plan_.dimensions and plan_.num_trials == 1
    assert plan_.repeats == tuple(Repeat(seed, fold) for seed in (0, 1) for fold in range(5))


def test_all_folds_are_trained_unless_one_is_given(plan: Read) -> None:
    space = ("data.folds=4", "optimizer.lr=0.1,0.01")
    assert plan(*space).repeats == tuple(Repeat(0, fold) for fold in range(4))
    plan_ = plan(*space, "data.fold=0", "seed=0,1")
    assert (
        plan_.repeats == (Repeat(0), Repeat(1))
        and "data.fold=0" in plan_.identity()["overrides"]
        and plan_.overlap == 0
    )
    other = plan("data.folds=2,4")  # settings with different numbers of folds are not repeats
    assert other.repeats == (Repeat(0),) and other.swept_validation_keys == ["data.folds"]


def test_a_fold_without_folds_is_refused(plan: Read) -> None:
    with pytest.raises(UserError, match=r"data\.fold: .* has no effect without data\.folds"):
        plan("data.fold=0,1,2")
    with pytest.raises(UserError, match=r"data\.fold: give the repeats as a list"):
        plan("data.folds=5", "data.fold=int(interval(0,5))", "sweep.sampler=random")


def test_each_fold_has_its_own_folder_settings_and_command(plan: Read) -> None:
    plan_ = plan("data.folds=3", "model=mlp,lenet5", "seed=0,1")
    run = plan_.make_run(2, {"model": "mlp"}, Repeat(1, 2), Path("there"))
    assert run.folder.name == "002-mlp-seed1-fold2"
    settings = run.settings()
    assert settings.seed == 1 and settings.data["fold"] == 2 and settings.data["folds"] == 3
    assert run.command.endswith("model=mlp seed=1 data.fold=2")
    assert [Repeat.parse(str(repeat)) for repeat in plan_.repeats] == list(plan_.repeats)
    assert {"data.fold=0,1,2", "seed=0,1"} <= set(plan_.identity()["overrides"])


def test_an_experiment_that_sweeps_is_refused_without_multirun(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=plain_vs_residual"]) == 2
    assert "sweeps over model, model.depth; add -m" in capsys.readouterr().err


def test_the_command_of_a_run_repeats_it_alone(plan: Read) -> None:
    plan_ = plan("model=mlp,lenet5", "sweep.seeds=2", "run_dir=there", "augment=[shift]")
    run = plan_.make_run(3, {"model": "mlp"}, Repeat(1), Path("there"))
    kept = "epochs=1 data.limit=60 batch_size=16 threads=1 log.figures=false log.tensorboard=false"
    assert run.command == f"cnntrain {kept} 'augment=[shift]' model=mlp seed=1"
    settings = run.settings()
    assert settings.seed == 1 and settings.run_dir == "there/003-mlp-seed1" and settings.resume == "auto"
    odd = {"augment": "[flip,crop]", "data.root": "'my photos/a=b'", "optimizer.lr": "0.0031622776601683794"}
    assert plan_.make_run(12, odd, Repeat(0), Path("there")).folder.name == "012-flip,crop-my_photos_a_b-0.003162-seed0"


def test_the_monitor_is_that_of_the_task_and_none_if_tasks_differ(plan: Read) -> None:
    assert plan("model=mlp,lenet5").monitor == ("top1", "max")
    assert plan("data=toy_faces", "model=keypoint_cnn", "optimizer.lr=0.1,0.01").monitor == ("nme", "min")
    assert plan("data=digits,toy_shapes", "model=unet_small").monitor is None
    with pytest.raises(UserError, match=r"sweep\.sampler: the runs have no common metric"):
        plan("model=mlp,lenet5", "sweep.sampler=tpe", ranked=False)


def test_cfg_prints_the_first_setting_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "--cfg", "model=mlp,lenet5", "seed=3"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["choices"]["model"] == "mlp" and printed["seed"] == 3 and not list(Path.cwd().iterdir())


def test_round_text() -> None:
    values = ("0.0031622776601683794", "0.1", "lenet5", "[flip,crop]")
    assert [round_number(value) for value in values] == ["0.003162", "0.1", "lenet5", "[flip,crop]"]


def test_different_sweep_settings_are_refused() -> None:
    with pytest.raises(UserError, match="different sweep settings"):
        read_plan(parse_arguments(["-m", "sweep.trials=1,2", "model=mlp"]), True)
