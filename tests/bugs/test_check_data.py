"""`check data` finds faults in data, and passes sound data."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cnntrain import compose, train
from cnntrain.checks.check_run import check
from cnntrain.cli import main
from cnntrain.errors import CheckFailedError, UserError

PLANTED = Path(__file__).parent / "planted"
FACES, SHAPES = (
    ("data.train_count=200", "data.test_count=20"),
    ("data.train_count=60", "data.test_count=10", "data.size=32"),
)


def findings(tmp_path: Path, *overrides: str) -> dict[str, dict[str, Any]]:
    quick = ("log.figures=false", "threads=1", f"run_dir={tmp_path / 'run'}")
    report = check(compose(*quick, *overrides, config_dir=PLANTED), ["data"])
    return {finding["name"]: finding for finding in report["findings"]}


BROKEN = {
    "255": (["data=unnormalized"], "normalized inputs", "255"),
    "twice": (["model=normalizes_again"], "normalized inputs", "twice"),
    "scale from 0 to 1": (["model=takes_it_back"], "normalized inputs", "0 to 1"),
    "reshape for permute": (["data=reshaped", *SHAPES], "layout", "reshaped"),
    "one image only": (["data=one_only"], "blank images", "identical"),
    "black images": (["data=black"], "blank images", "digits/"),
    "augmented validation": (
        ["data=random_validation", "data.cache=none", "data.workers=0"],
        "validation",
        "augmented",
    ),
    "test images in train": (["data=test_in_train"], "leakage", "digits/"),
    "test images in train, brighter": (["data=brighter_in_train"], "leakage", "digits/"),
    "a class never seen": (["data=no_threes"], "classes", "3"),
    "no relabeling": (["data=unrelabeled_toy_faces", *FACES], "flip", "left_eye"),
    "points as (y, x)": (["data=rows_first", *FACES], "points", "(y, x)"),
    "points normalized already": (["data=points_from_zero_to_one", *FACES], "points", "pixels"),
    "images wiped out": (
        [
            "augment=random_erasing",
            "augment.random_erasing.probability=1",
            "augment.random_erasing.scale=[0.999,1]",
            "augment.random_erasing.ratio=[1,1]",
        ],
        "augmentation",
        "erases",
    ),
    "flip": (["data=digits", "augment=flip"], "augmentation", "flip"),
}


REFUSED = {
    "nothing labeled": (["data=nothing_labeled", *SHAPES], "training masks have no labeled pixel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_data_are_refused(tmp_path: Path, name: str) -> None:
    overrides, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        findings(tmp_path, *overrides)


@pytest.mark.parametrize("name", BROKEN)
def test_faults_are_named(tmp_path: Path, name: str) -> None:
    overrides, wanted, subject = BROKEN[name]
    found = findings(tmp_path, *overrides)
    assert found[wanted]["verdict"] in ("WARN", "FAIL"), found[wanted]
    assert subject in f"{found[wanted]}"
    related = {"flip", "points", "augmentation"} if wanted == "points" else {wanted}
    others = {n: f for n, f in found.items() if f["verdict"] in ("WARN", "FAIL") and n not in related}
    assert not others


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=digits"],
        ["data=toy_faces", *FACES],
        ["data=toy_shapes", *SHAPES],
        ["data=digits", "model=resnet18"],
    ],
)
def test_sound_data_pass(tmp_path: Path, overrides: list[str]) -> None:
    assert {f["verdict"] for f in findings(tmp_path, *overrides).values()} <= {"PASS", "SKIP"}


@pytest.mark.slow
def test_check_first_stops_a_training_on_a_failure(tmp_path: Path) -> None:
    settings = compose(
        "data=black", "check.first=true", "epochs=1", "threads=1", f"run_dir={tmp_path}/r", config_dir=PLANTED
    )
    with pytest.raises(CheckFailedError, match="blank images"):
        train(settings)
    assert not (tmp_path / "r" / "checkpoints").exists()
    assert (tmp_path / "r" / "check" / "check.json").is_file()


@pytest.mark.slow
def test_check_first_does_not_change_the_run(tmp_path: Path) -> None:
    common = ("data.limit=100", "epochs=1", "threads=1", "log.figures=false")
    plain = train(compose(*common, f"run_dir={tmp_path}/a"))
    checked = train(compose(*common, "check.first=true", f"run_dir={tmp_path}/b"))
    assert plain["best"]["val/loss"] == checked["best"]["val/loss"]


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "leakag", "data=digits"]) == 2
    assert "did you mean 'leakage'?" in capsys.readouterr().err
    assert main(["check", "checks=flip,wron"]) == 2


@pytest.mark.slow
def test_exchanged_red_and_blue_are_detected_with_pretrained_weights(context_of, findings_of) -> None:
    """The running statistics of norms trained on RGB images do not fit BGR images."""
    context = context_of("data=toy_faces", "data.size=32", "model=cifar_resnet", "model.depth=8")
    assert findings_of(context, "channel-order")["channel order"].verdict == "SKIP"  # the weights are random
    blue = context.loaders["train"].images[:, 2]
    blue.copy_(blue // 3)  # so that the channels differ
    model = context.copy_model()
    context.train_steps(model, torch.optim.Adam(model.parameters(), lr=1e-3), 100)
    context.model, context.trained = model, True
    found = findings_of(context, "channel-order")["channel order"]
    assert found.verdict == "PASS", found
    context.loaders["train"].images.copy_(context.loaders["train"].images.flip(1))
    context = dataclasses.replace(context, _samples={})
    found = findings_of(context, "channel-order")["channel order"]
    assert found.verdict == "WARN", found


def test_a_checkpoint_and_a_list_of_checks_are_accepted(tmp_path: Path) -> None:
    """The command line refuses unknown words before torch is imported, but not these."""
    train(compose("data.limit=60", "epochs=1", "threads=1", "log.figures=false", f"run_dir={tmp_path}/r"))
    assert main(["check", f"checkpoint={tmp_path}/r", "frozen", "optimizer"]) == 0
    assert main(["check", "checks=frozen,optimizer", "data.limit=60", "threads=1"]) == 0


def test_letterbox_borders_do_not_count_as_wrong_normalization(tmp_path: Path, context_of, findings_of) -> None:
    """The statistics exclude the borders, so the mean of inputs with borders is far from 0."""
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        for number in range(8):
            noise = np.random.default_rng(number).integers(90, 200, (64, 12 + number, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "train" / label / f"{number}.png")
    context = context_of(
        "data=image_folder", f"data.root={tmp_path}", "data.size=32", "data.resize=letterbox", "model=lenet5"
    )
    assert float(context.eval_batch().images.mean()) < -1.5
    assert findings_of(context, "normalized-inputs")["normalized inputs"].verdict == "PASS"
