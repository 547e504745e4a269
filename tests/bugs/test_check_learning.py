"""`check learning` finds set-ups that do not learn or do not generalize, and passes sound ones."""

import time

import pytest

from cnntrain.checks.short_training import train_briefly

pytestmark = pytest.mark.slow

FACES = ("data=toy_faces", "data.train_count=300", "data.test_count=4", "data.size=32")
SHAPES = ("data=toy_shapes", "data.train_count=200", "data.test_count=4", "data.size=32")
WRONG_TARGETS = "targets belong to other images"


def planted(name: str, *overrides: str) -> list[str]:
    return ["model=sound", f"model._target_=planted_wiring.{name}", *overrides]


def decayed(optimizer: str) -> list[str]:
    return ["model=mlp", f"optimizer={optimizer}", "optimizer.weight_decay=1"]


BROKEN = {
    "shuffled labels": (["data=shuffled_labels"], "generalizes", "FAIL", WRONG_TARGETS),
    "shuffled labels, fmnist_cnn": (["data=shuffled_labels", "model=fmnist_cnn"], "generalizes", "FAIL", WRONG_TARGETS),
    "labels of another image": (["data=labels_of_another"], "generalizes", "FAIL", WRONG_TARGETS),
    "validation labels of another": (["data=validation_of_another"], "generalizes", "FAIL", "validation"),
    "images of noise": (["data=noise"], "generalizes", "FAIL", "do not show"),
    "the mean image only": (["data=mean_images"], "generalizes", "FAIL", "the same"),
    "detached, one example": (["model=detached"], "one example", "FAIL", "first.weight"),
    "softmax, one example": (["model=softmax_inside"], "one example", "FAIL", "softmax"),
    "ignores the image, eight": (["model=ignores_image"], "eight examples", "FAIL", "image"),
    "learning rate 1000x too low, eight": (["optimizer.lr=1e-6"], "eight examples", "FAIL", "the loss"),
    "learning rate 100x too high": (["optimizer.lr=0.1"], "learning rate", "FAIL", "too high"),
    "learning rate 100x too high, Adam": (["optimizer=adam", "optimizer.lr=0.1"], "learning rate", "FAIL", "too high"),
    "learning rate 100x too high, SGD": (["optimizer=sgd", "optimizer.lr=5"], "learning rate", "FAIL", "too high"),
    "learning rate 1000x too low": (["optimizer.lr=1e-6"], "learning rate", "FAIL", "too low"),
    "learning rate 1000x too low, SGD": (["optimizer=sgd", "optimizer.lr=5e-5"], "learning rate", "FAIL", "too low"),
    "weight decay 1": (decayed("adamw"), "weight decay", "FAIL", "usual"),
    "weight decay 1, Adam": (decayed("adam"), "weight decay", "FAIL", "gradient"),
    "weight decay 1, SGD": (decayed("sgd"), "weight decay", "FAIL", "gradient"),
    "BatchNorm momentum 0": (planted("Normed", "+model.momentum=0.0"), "batch norm gap", "FAIL", "momentum 0"),
    "BatchNorm momentum 1": (planted("Normed", "+model.momentum=1.0"), "batch norm gap", "FAIL", "last batch"),
    "BatchNorm in eval mode": (planted("EvalWhenTraining"), "batch norm gap", "FAIL", "momentum 0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_faults_are_named(name: str, context_of, findings_of) -> None:
    overrides, check, verdict, subject = BROKEN[name]
    finding = findings_of(context_of(*overrides), check.replace(" ", "-"))[check]
    assert finding.verdict == verdict, finding
    assert subject in f"{finding.evidence} {finding.cause} {finding.remedy}", finding


def test_a_custom_norm_with_wrong_statistics_in_eval_mode_is_named(context_of, findings_of) -> None:
    context = context_of("model=sound", "model._target_=planted_learning.OwnNorm")
    context.deadline = time.monotonic() + 30
    found = findings_of(context, "generalizes", "batch-norm-gap")
    assert found["batch norm gap"].verdict == "FAIL", found


def test_a_low_learning_rate_does_not_look_like_wrong_labels(context_of, findings_of) -> None:
    found = findings_of(context_of("optimizer.lr=1e-6"), "learning-rate", "generalizes")
    assert [found[name].verdict for name in ("learning rate", "generalizes")] == ["FAIL", "PASS"], found


MISALIGNED = {
    "points": ["data=points_of_another", *FACES[1:]],
    "masks": ["data=masks_of_another", *SHAPES[1:3], "data.size=16"],
}


@pytest.mark.parametrize("name", ["points", pytest.param("masks", marks=pytest.mark.long)])
def test_points_and_masks_of_another_image_are_detected(name: str, context_of, findings_of) -> None:
    found = findings_of(context_of(*MISALIGNED[name]), "generalizes")["generalizes"]
    assert found.verdict == "FAIL", found


SOUND = {
    "a rate that is too high for frozen norms": ["model=fmnist_cnn", "optimizer=sgd"],
    "label smoothing": ["model=mlp", "optimizer=sgd", "task.label_smoothing=0.1"],
    "sound": ["model=sound"],
    "sound with norm and dropout": planted("Normed"),
    "lenet5": ["model=lenet5"],
    "lenet5, SGD": ["model=lenet5", "optimizer=sgd"],
    "mlp": ["model=mlp", "seed=1"],
    "fmnist_cnn": ["model=fmnist_cnn", "optimizer=adam"],
    "few classes": ["model=mlp", "data.limit=200"],
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_set_ups_pass(name: str, context_of, findings_of) -> None:
    found = findings_of(context_of(*SOUND[name]), "learning")
    assert {f.name: f.cause for f in found.values() if f.verdict in ("WARN", "FAIL")} == {}
    assert found["generalizes"].verdict == found["eight examples"].verdict == "PASS", found


WIDE = {
    f"{' '.join(pair)} {optimizer} seed {seed}": [*pair, f"optimizer={optimizer}", f"seed={seed}"]
    for pair in (
        ["model=lenet5"],
        ["model=mlp"],
        ["model=fmnist_cnn"],
        ["model=cifar_resnet"],
        ["model=resnet18"],
        ["data=toy_faces"],
        ["data=toy_shapes"],
    )
    for optimizer in ("adamw", "sgd")
    for seed in range(3)
}


@pytest.mark.long
@pytest.mark.parametrize("name", WIDE)
def test_no_false_alarm_within_a_minute(name: str, context_of, findings_of) -> None:
    context = context_of(*WIDE[name])
    context.deadline = time.monotonic() + 60
    found = findings_of(context, "learning", "machinery")
    assert {f.name: f.cause for f in found.values() if f.verdict in ("WARN", "FAIL")} == {}


@pytest.mark.parametrize("model", ["detached", "dead_relus", "ignores_image", "frozen_first"])
def test_other_faults_do_not_stop_the_checks(model: str, context_of, findings_of) -> None:
    context = context_of(f"model={model}")
    context.deadline = time.monotonic() + 20
    assert findings_of(context, "learning", "repeat", "precision", "memory-layout")


def test_expensive_checks_are_skipped_without_time(context_of, findings_of) -> None:
    context = context_of("model=fmnist_cnn", "data.limit=300")
    context.deadline = time.monotonic() - 1
    for name in ("one example", "eight examples", "learning rate", "generalizes", "repeat", "reload"):
        finding = findings_of(context, name.replace(" ", "-"))[name]
        assert finding.verdict == "SKIP" and "budget" in finding.evidence, finding


def test_only_some_checks_apply_to_trained_weights(context_of, findings_of) -> None:
    context = context_of("model=fmnist_cnn")
    training = next(each for each in train_briefly(context, 1e-3, 60) if each.steps[-1] > 60)
    context.model, context.trained, context.cache = training.model, True, {}
    found = findings_of(context, "learning")
    passes = {name for name, finding in found.items() if finding.verdict == "PASS"}
    assert passes == {"generalizes", "batch norm gap"}, found
    assert {finding.verdict for finding in found.values()} == {"PASS", "SKIP"}


def test_checks_do_not_change_the_network_and_add_curves(context_of, findings_of) -> None:
    context = context_of("model=fmnist_cnn", "data.limit=300")
    before = {name: value.clone() for name, value in context.model.state_dict().items()}
    findings_of(context, "learning", "machinery")
    assert all(value.equal(before[name]) for name, value in context.model.state_dict().items())
    assert {"range test: loss over learning rate", "short training: loss over step"} <= set(context.curves)
