from pathlib import Path

import pytest

from cnntrain.cli import complete, main, parse_arguments
from cnntrain.config.compose import compose, group_options, read_settings
from cnntrain.config.instantiate import build
from cnntrain.config.schema import EvaluateSettings, Settings, parse
from cnntrain.data.files import default_root
from cnntrain.errors import UserError
from cnntrain.randomness import epoch_order, hash_seed, uniform
from cnntrain.report.expectations import judge_expectations
from cnntrain.sweep.search_space import expand_grid
from cnntrain.train.distributed import rank_from_env

# What a user may get wrong, and what the message must say.
SLIPS = {
    "=3": r"'=3' has no key; write KEY=VALUE",
    "epohcs=3": r"epohcs: no such key; did you mean 'epochs'\?",
    "hydra.run.dir=x": r"hydra\.run\.dir: .*run_dir",
    "optimizer.lrr=3": r"optimizer\.lrr: no such key; did you mean 'optimizer\.lr'\?",
    "model=resnet81": r"model: no such option 'resnet81'; did you mean 'resnet18'\?",
    "modle=mlp": r"modle: no such key; did you mean 'model'\?",
    "epochs=2.5": r"epochs: must be a whole number >= 1, got 2\.5",
    "epochs=-1": r"epochs: must be a whole number >= 1, got -1",
    "epochs=many": r"epochs: must be a whole number >= 1, got 'many'",
    "batch_size=0": r"batch_size: must be a whole number >= 1 or auto, got 0",
    "steps=0": r"steps: must be a whole number >= 1 or null, got 0",
    "precision=fp8": r"precision: 'fp8' is not one of auto, fp32, bf16, fp16",
    "channels_last=maybe": r"channels_last: must be true or false, got 'maybe'",
    "checkpoint=3": r"checkpoint: needs keys below it",
    "log.every_steps=0": r"log\.every_steps: must be a whole number >= 1",
    "ema_decay=1.5": r"ema_decay: must be a number >= 0 and <= 0.999999 or null, got 1\.5",
    "epochs": r"an override is written KEY=VALUE",
    "augment=[flip,crob]": r"augment: no such option 'crob'; did you mean 'crop'\?",
    "model=lenet5,mlp": r"model=lenet5,mlp: several values; -m",
    "data.root=my photos]": r"data\.root=my photos\].*\n.*quotes",
    "model.layers[0].x=3": r"model\.layers\[0\]\.x=3.*model\.layers=\[",
    "lr=0.1": r"lr: no such key; did you mean 'optimizer\.lr'\?",
    "data.root=x": r"data\.root: data=digits has no such key; .*image_folder",
    f"seed={'1' * 400}": r"seed: must be a whole number >= 0 .* \(400 characters\)",
    f"seed={'1' * 5000}": r"seed: ",
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_named(slip: str) -> None:
    with pytest.raises(UserError, match=SLIPS[slip]):
        read_settings([slip])


# What only building finds: the value belongs to a part, not to the fixed settings.
BUILD_SLIPS = {
    "optimizer.lr=nan": r"optimizer\.lr: must be a number >= 0",
    "optimizer.lr=-1": r"optimizer\.lr: must be a number >= 0 or auto, got -1",
    "optimizer.weight_decay=-1": r"optimizer\.weight_decay: must be a number >= 0, got -1",
    "optimizer.betas=[0.9]": r"optimizer\.betas: must be a list of 2 values",
    "data.mean=[a] data.std=[b]": r"data\.mean\[0\]: must be a number, got 'a'",
    "+expect={x:'>=e'}": r"expect\.x: '>=e' is neither a number nor a comparison",
    "optimizer.betas=3": r"optimizer\.betas: must be a list, got 3",
    "optimizer=sgd optimizer.momentum=0": r"optimizer: .*Nesterov",
    "optimizer=torch optimizer.name=LBFGS": r"optimizer: LBFGS refused its arguments: .*recomputes the loss",
    "optimizer=torch optimizer.name=SparseAdam": r"SparseAdam .*cannot take a step from gradients alone",
    "data.folds=5 data.fold=9": r"data\.fold",
    "schedule=cosine schedule.final=7": r"schedule\.final",
    "device=gpu": r"device: 'gpu' is not one of",
    "data.val_fraction=2": r"data\.val_fraction: must be a number >= 0 and <= 0\.9",
    "model=torchvision model.name=resnet81": r"did you mean",
    "model=torchvision model.name=alexnet data=mnist data.root=.": r"images are 28x28 px, 1 channel; alexnet needs",
    "model=vgg_a": r"model\.layers",
    "+augment.x=5": r"augment\.x: must be a mapping with _target_.*5",
    f"optimizer.lr={'1' * 400}": r"optimizer\.lr: .*400 ",
}


@pytest.mark.parametrize("slip", BUILD_SLIPS)
def test_a_slip_in_a_part_is_named_and_leaves_no_folder(
    slip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main([*slip.split(), "epochs=1", "log.figures=false"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and re.search(BUILD_SLIPS[slip], said), said
    assert "Traceback" not in said
    assert not Path("outputs").exists()


def test_evaluations_precision_is_one_of_four_or_null() -> None:
    values = compose("evaluate", ["checkpoint=x"])
    values.pop("choices")
    for value in ("fp64", False):
        with pytest.raises(UserError, match=r"precision: .* is not one of auto, fp32, bf16, fp16"):
            parse(EvaluateSettings, {**values, "precision": value})


def test_every_command_prints_its_config_and_only_two_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "overfit", "check", "bench", "lr-find", "preview", "inspect"):
        assert main([command, "--cfg", "model=mlp"]) == 0
        assert "model: mlp" in capsys.readouterr().out
    assert main(["inspect", "--cfg", "model=mlp,lenet5"]) == 0
    assert "model: mlp" in capsys.readouterr().out
    assert main(["check", "--cfg", "checkpoint=x", "split=test"]) == 0
    assert "split: test" in capsys.readouterr().out
    assert main(["clean", "--cfg"]) == 2
    assert main(["predict", "--cfg", "checkpoint=x", "images=y"]) == 0
    assert "checkpoint: x" in capsys.readouterr().out and not Path("outputs").exists()
    for command in ("check", "bench", "lr-find", "preview", "evaluate", "clean"):
        assert main([command, "-m", "model=mlp,lenet5"]) == 2
        assert f"{command}: no -m" in capsys.readouterr().err


def test_defaults_stand_in_yaml_alone() -> None:
    settings = read_settings([])
    assert isinstance(settings, Settings)
    assert settings.choices["model"] == "lenet5" and settings.choices["data"] == "digits"
    assert settings.label == "lenet5-digits"


def test_a_command_line_choice_beats_the_data_sets() -> None:
    assert "shift" in read_settings(["data=digits"]).augment
    assert read_settings(["data=digits", "augment=none"]).augment == {"border": "zero"}
    assert set(read_settings(["augment=[flip,crop]"]).augment) >= {"flip", "crop"}


@pytest.mark.parametrize("option", group_options()["experiment"])
def test_every_experiment_composes(option: str) -> None:
    settings = read_settings([f"experiment={option}"])
    assert settings.expect is not None or settings.sweep.over


def test_a_grid_is_every_combination() -> None:
    grid = expand_grid(["model=lenet5,mlp", "seed=range(0,3)", "epochs=2"])
    assert len(grid) == 6 and grid[0] == ["epochs=2", "model=lenet5", "seed=0"]
    with pytest.raises(UserError, match="a grid needs listed values"):
        expand_grid(["optimizer.lr=interval(0,1)"])


def test_config_files_can_not_trust_themselves(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "sly.yaml").write_text("# @package _global_\ntrusted_packages: [os]\n")
    assert "os" not in read_settings(["experiment=sly"], tmp_path).trusted_packages
    assert read_settings(["trusted_packages=[mine]"]).trusted_packages == ["mine"]


@pytest.mark.parametrize(
    ("target", "role"),
    [
        ("torch.load", "model"),
        ("torch.hub.load", "model"),
        ("os.system", "model"),
        ("builtins.eval", "optimizer"),
        ("torch.optim.optimizer.os.system", "optimizer"),
        ("cnntrain.models.resnet.torch.load", "model"),
        ("cnntrain.data.examples.os.remove", "data"),
        ("torch.nn.functional.relu", "model"),
        ("torch.nn.Linear", "optimizer"),
        ("torch.optim.SGD", "model"),
    ],
)
def test_a_target_must_suit_its_slot(target: str, role: str) -> None:
    with pytest.raises(UserError, match=r"_target_"):
        build({"_target_": target}, role, role)


def test_arguments_are_checked_against_the_signature() -> None:
    node = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentun": 0.9}
    with pytest.raises(UserError, match=r"optimizer\.momentun: .* did you mean 'momentum'"):
        build(node, "optimizer", "optimizer")


def test_expectations() -> None:
    results = {"parameters": 10, "best": {"val/top1": 0.9}, "test": {"test/top1": 0.94}}
    expected = {"parameters": 10, "test/top1": ">=0.935", "val/top1": ">0.95"}
    verdicts = [
        f.verdict for f in judge_expectations(expected, results, ["seed", "data.root", "choices.data"])
    ]
    assert verdicts == ["PASS", "PASS", "FAIL"]
    assert {f.verdict for f in judge_expectations(expected, results, ["epochs"])} == {"SKIP"}
    with pytest.raises(UserError, match=r"expect\.x"):
        judge_expectations({"x": "about 3"}, results, [])


def test_command_words_and_flags() -> None:
    assert parse_arguments(["overfit", "model=mlp"]).command == "overfit"
    assert parse_arguments(["-m", "seed=1,2"]).multirun
    with pytest.raises(UserError, match="did you mean 'overfit'"):
        parse_arguments(["overfitt"])
    with pytest.raises(UserError, match="--multirun"):
        parse_arguments(["--multirn"])


def test_completion_offers_commands_options_and_keys() -> None:
    assert "overfit" in complete("cnntrain ov")
    assert {"model=resnet18", "model=resnet34"} <= set(complete("cnntrain model=resnet"))
    assert "optimizer.lr=" in complete("cnntrain overfit optimizer.l")
    assert "checkpoint=" in complete("cnntrain evaluate che")


def test_draws_are_a_function_of_position_alone() -> None:
    import torch

    positions = torch.arange(1000)
    whole = uniform(3, 1, positions, "flip", 4)
    assert torch.equal(whole[500:], uniform(3, 1, positions[500:], "flip", 4))
    assert torch.equal(whole[:, :2], uniform(3, 1, positions, "flip", 2))
    assert not torch.equal(whole, uniform(3, 2, positions, "flip", 4))
    assert not torch.equal(whole, uniform(3, 1, positions, "crop", 4))
    assert abs(float(whole.mean()) - 0.5) < 0.02 and float(whole.min()) >= 0 and float(whole.max()) < 1
    correlation = torch.corrcoef(whole.T)
    assert (correlation - torch.eye(4)).abs().max() < 0.12
    assert sorted(epoch_order(0, 0, 50).tolist()) == list(range(50))
    assert len({hash_seed(a, b) for a in range(30) for b in range(30)}) == 900


def test_compose_says_what_was_chosen() -> None:
    assert compose("config", ["model=mlp"])["choices"]["model"] == "mlp"


@pytest.mark.parametrize("text", ["my photos/ünï#1", "a;b", "x=y", "naïve&co"])
def test_a_plain_path_needs_no_quotes(text: str) -> None:
    assert read_settings(["data=image_folder", f"data.root={text}"]).data["root"] == text


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/homes/me")
    assert read_settings(["data=image_folder", "data.root=~/photos"]).data["root"] == "/homes/me/photos"
    assert read_settings(["data=image_folder", "data.root='~/photos'"]).data["root"] == "~/photos"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1e-3", 1e-3),
        ("null", None),
        ("true", True),
        ("[1,2]", [1, 2]),
        ("${seed}", 0),
        ("a/b.txt", "a/b.txt"),
    ],
)
def test_values_of_the_grammar_keep_their_types(value: str, expected: object) -> None:
    assert read_settings(["+expect={x: 0}", f"+expect.y={value}"]).expect == {"x": 0, "y": expected}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("5", r"five\.yaml: .*`key: value` lines, got 5"),
        ("defaults: 5", r"five\.yaml: defaults: must be a list"),
        ("_target_: x\n  hidden: 3\n", r"five\.yaml:2: not valid YAML"),
        ("a: [1\n", r"five\.yaml:\d: not valid YAML"),
    ],
)
def test_a_malformed_config_file_is_named(tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "five.yaml").write_text(text)
    with pytest.raises(UserError, match=where):
        read_settings(["model=five"], tmp_path)


def test_a_setting_written_as_an_option_is_recognized() -> None:
    with pytest.raises(UserError, match=r"--epochs; write settings as KEY=VALUE, as epochs=2"):
        parse_arguments(["--epochs", "2"])


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (["optimizer.lr", "0.1"], "optimizer.lr=0.1"),
        (["optimizer.lr=0.1", "epochs", "5"], "epochs=5"),
        (["model", "resnet18"], "model=resnet18"),
    ],
)
def test_a_setting_without_its_equals_sign_is_recognized(arguments: list[str], setting: str) -> None:
    with pytest.raises(UserError, match=rf"KEY=VALUE, as {setting}"):
        parse_arguments(arguments)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.parametrize("value", ["junk", "", "-2", "1e3", "9" * 40])
def test_a_launchers_variable_that_is_no_number_is_named(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{name} must be a whole number"):
        rank_from_env({name: value})


def test_a_ranks_variables_are_checked_too() -> None:
    given = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "zero", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    with pytest.raises(UserError, match="LOCAL_RANK must be a whole number"):
        rank_from_env(given)


def test_without_a_home_folder_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UserError, match=r"HOME or XDG_CACHE_HOME"):
        default_root()


def test_masks_without_names_of_classes_are_told_how_to_give_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data=mask_folder", "data.root=."]) == 2
    said = capsys.readouterr().err
    assert "data.classes: missing" in said and "data.classes=[background,object]" in said
