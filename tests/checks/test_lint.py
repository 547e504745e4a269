"""Contradicting keys are both named; sound configs have no warnings."""

import shlex

import pytest

from cnntrain.checks.lint import lint, typed_keys
from cnntrain.config.compose import read_settings
from cnntrain.train.prepare import resolve_plan
from cnntrain.train.setup import build_components
from cnntrain.types import Finding

FEW = "data=toy_faces data.train_count=80 data.test_count=2 data.size=32"
SHAPES = "data=toy_shapes data.train_count=80 data.test_count=2 data.size=32"


def warnings(line: str) -> list[Finding]:
    components = build_components(read_settings([*shlex.split(line), "threads=1", "device=cpu"]))
    data = components.load()
    plan = resolve_plan(components, data)
    return lint(components, data, plan, f"cnntrain {line}")


CONTRADICTIONS = {
    f"{FEW} task.loss=l1 task.smooth_l1_beta=0.2": ("task.smooth_l1_beta", "task.loss"),
    f"{FEW} task.loss=mse task.wing_width=0.2": ("task.wing_width", "task.loss"),
    f"{FEW} task.heatmap_sigma=2": ("task.heatmap_sigma", "task.head"),
    "data.folds=5 data.val_fraction=0.2": ("data.val_fraction", "data.folds"),
    "data.workers=4": ("data.workers", "data.cache"),
    "epochs=5 steps=100": ("epochs", "steps"),
    f"{SHAPES} augment=none augment.border=edge": ("augment.border", "augment"),
    "deterministic=true": ("deterministic", "device"),
    "optimizer.weight_decay=0 optimizer.decay_norms_and_biases=true": (
        "optimizer.decay_norms_and_biases",
        "optimizer.weight_decay",
    ),
    "epochs=5 early_stopping=5": ("early_stopping", "epochs"),
    "optimizer=sgd optimizer.momentum=0.5": ("optimizer.momentum", "schedule"),
    f"{SHAPES} batch_size=1": ("batch_size", "model.norm"),
    "batch_size=5000": ("batch_size", "data"),
    "ema_decay=0.9999": ("ema_decay", "epochs"),
    "accumulate=100": ("accumulate", "batch_size"),
    "optimizer=sgd optimizer.lr=5": ("optimizer.lr", "batch_size"),
    "optimizer.lr=1e-8": ("optimizer.lr", "batch_size"),
}


@pytest.mark.parametrize("line", CONTRADICTIONS)
def test_both_keys_are_named(line: str) -> None:
    found = warnings(line)
    assert [warning.keys for warning in found] == [CONTRADICTIONS[line]]
    assert all(warning.verdict == "WARN" and warning.cause and warning.remedy for warning in found)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "model=fmnist_cnn ema_decay=0.99 early_stopping=3",
        "optimizer=sgd schedule=plateau",
        "optimizer=adam batch_size=16",
        "data.folds=5 data.fold=1 optimizer=torch",
        f"{FEW} task.loss=wing task.wing_width=0.1",
        f"{FEW} model=unet_small task.head=heatmap task.heatmap_sigma=2",
        f"{SHAPES} augment.border=edge",
        "steps=50",
        "optimizer=sgd optimizer.lr=0.1 batch_size=256",
        "optimizer=sgd optimizer.momentum=0.5 schedule=cosine",
        "optimizer=sgd optimizer.momentum=0 optimizer.nesterov=false",
        "optimizer.betas=[0.9,0.95]",
    ],
)
def test_sound_configs_have_no_warnings(line: str) -> None:
    assert warnings(line) == []


def test_keys_of_a_command_line() -> None:
    line = "cnntrain --config-dir a=b model=lenet5 +x.y=1 ~augment.flip 'task.class_weights={a: 1}'"
    assert typed_keys(line) >= {"model", "x.y", "task.class_weights"}
    assert typed_keys("") == set()


def test_configured_statistics_normalize() -> None:
    settings = read_settings([*shlex.split(SHAPES), "data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.224,0.225]"])
    components = build_components(settings)
    assert components.load().spec.mean == (0.485, 0.456, 0.406)
    assert components.pipeline.std == (0.229, 0.224, 0.225)
