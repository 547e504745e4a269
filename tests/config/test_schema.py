"""Types and ranges of settings."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from cnntrain.cli import main
from cnntrain.config.compose import compose, read_settings
from cnntrain.config.schema import EvaluateSettings, Within, check_value, parse
from cnntrain.errors import UserError

# Values that are rejected by the part that they are passed to, before any data is read.


INVALID = {
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


@pytest.mark.parametrize("overrides", INVALID)
def test_invalid_arguments_exit_with_2_and_leave_no_folder(overrides: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*overrides.split(), "epochs=1", "log.figures=false"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and re.search(INVALID[overrides], said), said
    assert "Traceback" not in said
    assert not Path("outputs").exists()


def test_precision_of_evaluate_is_a_choice_or_null() -> None:
    values = compose("evaluate", ["checkpoint=x"])
    values.pop("choices")
    for value in ("fp64", False):
        with pytest.raises(UserError, match=r"precision: .* is not one of auto, fp32, bf16, fp16"):
            parse(EvaluateSettings, {**values, "precision": value})


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, float, 3.0),
        (3.0, int, 3),
        (3, str, "3"),
        (None, int | None, None),
        ("auto", Annotated[int | Literal["auto"], Within(1)], "auto"),
        (False, Literal["off", "default"], "off"),
        ([1, 2], list[float], [1.0, 2.0]),
        ([1, 2], int | Sequence[int], [1, 2]),
        ({"a": 1}, Mapping[str, Any], {"a": 1}),
        (object, object, object),
    ],
)
def test_values_are_converted_to_the_annotated_type(value: Any, hint: Any, expected: Any) -> None:
    converted = check_value(value, hint, "key")
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (True, int, "key: must be a whole number, got True"),
        (2.5, int | None, "key: must be a whole number or null, got 2.5"),
        (float("inf"), float, "key: must be a number, got inf"),
        (float("nan"), int, "key: must be a whole number, got nan"),
        (10**400, float, "key: must be a number, got 1"),
        (0, Annotated[int, Within(1, 9)], "key: must be a whole number >= 1 and <= 9, got 0"),
        ("x", int | Sequence[int], "key: must be a whole number or a list, got 'x'"),
        ([1], tuple[int, int], "key: must be a list of 2 values"),
        (["x"], list[int], r"key\[0\]: must be a whole number"),
        ("fullest", Literal["full", "off"], "key: 'fullest' is not one of full, off"),
        (None, str, "key: must be text, got None"),
        (3, Mapping[str, int], "key: must be a mapping, got 3"),
    ],
)
def test_values_of_another_type_or_range_are_rejected(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        check_value(value, hint, "key")


@pytest.mark.parametrize("key", ["optimizer.lr", "optimizer.weight_decay", "optimizer.layer_decay", "data.workers"])
def test_shared_keys_are_checked_when_settings_are_read(key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: must be a"):
        read_settings([f"{key}=-1"])
    assert read_settings(["optimizer.lr=auto"]).optimizer["lr"] == "auto"
