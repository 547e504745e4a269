"""`check start` finds bad initializations, and passes sound ones."""

import pytest

SHAPES = ("data=toy_shapes", "data.train_count=60", "data.test_count=4", "data.size=32")
FACES = ("data=toy_faces", "data.train_count=60", "data.test_count=4", "data.size=32")


def planted(name: str, *overrides: str) -> list[str]:
    return ["model=sound", f"model._target_=planted_start.{name}", *overrides]


BROKEN = {
    "far too large head": (planted("HugeHead"), "initial loss", "FAIL", "too large"),
    "far too large weights": (planted("Huge"), "initial loss", "FAIL", "too large"),
    "far too large weights explode": (planted("Huge"), "activations", "FAIL", "explode"),
    "far too large weights, points": (planted("Huge", *FACES), "initial loss", "FAIL", "too large"),
    "all zero": (planted("AllZero"), "answers differ", "FAIL", "zero"),
    "all zero, layers": (planted("AllZero"), "activations", "FAIL", "zero"),
    "image": (["model=ignores_image"], "answers differ", "FAIL", "image"),
    "ignores the image, pixels": (["model=ignores_image"], "pixels seen", "FAIL", "image"),
    "too small weights": (planted("Deep", "+model.std=0.01"), "activations", "FAIL", "layers."),
    "too large weights": (planted("Deep", "+model.std=0.6"), "activations", "FAIL", "layers."),
    "dead ReLUs by bias": (["model=dead_relus"], "dead units", "FAIL", "ReLU 2"),
    "image averaged away": (planted("PooledAway"), "pixels seen", "FAIL", "mean"),
    "image pooled to four": (planted("PooledToFour"), "pixels seen", "FAIL", "4"),
    "brightest pixel alone": (planted("BrightestPixel"), "pixels seen", "FAIL", "image"),
    "one corner": (planted("OneCorner"), "pixels seen", "FAIL", "image"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_faults_are_named(name: str, context_of, findings_of) -> None:
    overrides, check, verdict, subject = BROKEN[name]
    finding = findings_of(context_of(*overrides), check.replace(" ", "-"))[check]
    assert finding.verdict == verdict, finding
    assert subject in f"{finding.evidence} {finding.cause} {finding.remedy}", finding


SOUND = {
    "sound": ["model=sound"],
    "zero head": planted("ZeroHead"),
    "softmax regression": planted("SmallDense"),
    "max-pool first": planted("PoolFirst"),
    "He's deviation": planted("Deep", "+model.std=0.1178"),
    "lenet5": ["model=lenet5"],
    "mlp": ["model=mlp", "seed=1"],
    "sequential": ["model=sequential", "seed=2"],
    "fmnist_cnn": ["model=fmnist_cnn"],
    "cifar_resnet": ["model=cifar_resnet"],
    "faces": FACES,
    "faces, mse": [*FACES, "task.loss=mse", "model.init=he"],
    "faces, heat maps": [*FACES, "task.head=heatmap", "model=unet_small", "model.width=4"],
    "shapes": [*SHAPES, "model.width=4"],
    "shapes, dice": [*SHAPES, "task.loss=dice", "model.width=4"],
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_set_ups_pass(name: str, context_of, findings_of) -> None:
    found = findings_of(context_of(*SOUND[name]), "start")
    assert {f.name: f.cause for f in found.values() if f.verdict in ("WARN", "FAIL")} == {}
    assert found["activations"].verdict == found["pixels seen"].verdict == "PASS"


def test_checks_are_skipped_for_trained_weights(context_of, findings_of) -> None:
    context = context_of("model=mlp")
    context.trained = True
    assert {finding.verdict for finding in findings_of(context, "start").values()} == {"SKIP"}


def test_the_signal_is_added_to_the_curves(context_of, findings_of) -> None:
    context = context_of("model=lenet5")
    findings_of(context, "activations")
    depths, values = context.curves["signal by depth"]["standard deviation between images"]
    assert depths == [1, 2, 3, 4] and len(values) == 4
