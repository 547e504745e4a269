"""The start and wiring checks pass for sound set-ups: all networks on bundled data, three seeds."""

import pytest

FACES = ("data=toy_faces", "data.train_count=60", "data.test_count=4", "data.size=32")
LARGER = ("data=toy_faces", "data.train_count=60", "data.test_count=4", "data.size=80")
SHAPES = ("data=toy_shapes", "data.train_count=60", "data.test_count=4", "data.size=32")
DIGITS = ("data=digits", "data.limit=300")

PAIRS = [
    *((f"model={name}", *DIGITS) for name in ("lenet5", "mlp", "sequential", "cifar_resnet", "fmnist_cnn")),
    *((f"model={name}", *DIGITS) for name in ("resnet18", "batchnorm_cnn", "cifar_plain")),
    ("model=mlp", *DIGITS, "optimizer=sgd", "task.label_smoothing=0.1"),
    ("model=lenet5", *DIGITS, "optimizer=adam", "task.class_weights=balanced", "accumulate=2"),
    *((f"model={name}", *FACES) for name in ("keypoint_cnn", "lenet5", "mlp", "cifar_resnet", "resnet18")),
    *((f"model={name}", *FACES) for name in ("mobilenet_v1", "mobilenet_v2", "shufflenet", "efficientnet")),
    *((f"model={name}", *FACES) for name in ("vgg_a", "googlenet", "densenet121", "mnasnet", "resnext50")),
    ("model=torchvision", *FACES),
    ("model=mobilenet_v2", *FACES, "task.loss=mse"),
    ("model=keypoint_cnn", *FACES, "task.loss=l1", "optimizer=sgd"),
    ("model=unet_small", *FACES, "task.head=heatmap"),
    ("model=unet_small", *FACES, "task.head=heatmap", "task.loss=mse"),
    *((f"model={name}", *LARGER) for name in ("alexnet", "alexnet_torchvision", "xception")),
    *((f"model={name}", *SHAPES) for name in ("unet_small", "fcn", "torchvision_segmentation")),
    ("model=unet", *SHAPES, "model.width=8"),
    ("model=unet_small", *SHAPES, "task.loss=dice", "optimizer=sgd"),
    ("model=unet_small", *SHAPES, "model.upsampling=unpool"),
]


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("overrides", PAIRS, ids=" ".join)
def test_sound_set_ups_pass(overrides: tuple[str, ...], seed: int, context_of, findings_of) -> None:
    found = findings_of(context_of(*overrides, f"seed={seed}"), "start", "wiring")
    assert {f.name: f"{f.cause} {f.evidence}" for f in found.values() if f.verdict in ("WARN", "FAIL")} == {}
