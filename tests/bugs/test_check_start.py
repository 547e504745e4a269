"""`check start` names a bad beginning, and has nothing to say about a sound one."""

import pytest

SHAPES = ("data=toy_shapes", "data.train_count=60", "data.test_count=4", "data.size=32")
FACES = ("data=toy_faces", "data.train_count=60", "data.test_count=4", "data.size=32")


def planted(name: str, *overrides: str) -> list[str]:
    return ["model=sound", f"model._target_=planted_start.{name}", *overrides]


BROKEN = {
    "far too large head": (planted("HugeHead"), "initial loss", "FAIL", "initial weights are far too large"),
    "far too large weights": (planted("Huge"), "initial loss", "FAIL", "initial weights are far too large"),
    "far too large weights explode": (planted("Huge"), "activations", "FAIL", "explode, most in "),
    "far too large weights, points": (planted("Huge", *FACES), "initial loss", "FAIL", "far too large"),
    "all zero": (planted("AllZero"), "answers differ", "FAIL", "all weights start at zero"),
    "all zero, layers": (planted("AllZero"), "activations", "FAIL", "all weights start at zero"),
    "ignores the image": (["model=ignores_image"], "answers differ", "FAIL", "ignores the image"),
    "ignores the image, pixels": (["model=ignores_image"], "pixels seen", "FAIL", "ignores the image"),
    "too small weights": (planted("Deep", "+model.std=0.01"), "activations", "FAIL", "die with depth, most in layers."),
    "too large weights": (planted("Deep", "+model.std=0.6"), "activations", "FAIL", "explode, most in layers."),
    "dead ReLUs by bias": (["model=dead_relus"], "dead units", "FAIL", "ReLUs in the network itself (rectifier 2)"),
    "image averaged away": (planted("PooledAway"), "pixels seen", "FAIL", "only the mean of the image"),
    "image pooled to four": (planted("PooledToFour"), "pixels seen", "FAIL", "squeezed into 4 numbers"),
    "brightest pixel alone": (planted("BrightestPixel"), "pixels seen", "FAIL", "most of the image never reaches"),
    "one corner": (planted("OneCorner"), "pixels seen", "FAIL", "most of the image never reaches"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_start_is_named(name: str, bench_of, judge) -> None:
    overrides, check, verdict, words = BROKEN[name]
    finding = judge(bench_of(*overrides), check.replace(" ", "-"))[check]
    assert finding.verdict == verdict, finding
    assert words in finding.cause, finding


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
def test_a_sound_start_passes(name: str, bench_of, judge) -> None:
    found = judge(bench_of(*SOUND[name]), "start")
    assert {f.name: f.cause for f in found.values() if f.verdict in ("WARN", "FAIL")} == {}
    assert found["activations"].verdict == found["pixels seen"].verdict == "PASS"


def test_trained_weights_are_no_start(bench_of, judge) -> None:
    bench = bench_of("model=mlp")
    bench.trained = True
    assert {finding.verdict for finding in judge(bench, "start").values()} == {"SKIP"}


def test_the_signal_is_drawn(bench_of, judge) -> None:
    bench = bench_of("model=lenet5")
    judge(bench, "activations")
    depths, values = bench.curves["signal by depth"]["standard deviation between images"]
    assert depths == [1, 2, 3, 4] and len(values) == 4
