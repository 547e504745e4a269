"""Every field of a checkpoint is of the right type and within bounds, or the checkpoint is refused by its name."""

import copy
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest
import torch

from cnntrain.config.compose import compose
from cnntrain.errors import UserError
from cnntrain.train.saved_content import check_saved
from cnntrain.train.state import Progress
from cnntrain.types import DataSpec

NAN = float("nan")


@cache
def config() -> dict[str, Any]:
    return compose("config", ("model=mlp",))


def content() -> dict[str, Any]:
    state = {
        "model": {"weight": torch.zeros(2)}, "ema": None, "optimizer": {}, "schedule": {}, "scaler": None,
        "progress": asdict(Progress(epoch=1, step=5, best={"epoch": 1.0, "step": 5.0, "val/top1": NAN})), "meter": {},
    }  # fmt: skip
    spec = asdict(
        DataSpec(1, 8, 8, ("a", "b"), ("left", "right"), (1, 0), ((0, 1),), mean=(0.5,), std=(0.2,))
    )
    resolved = {"precision": "fp32", "threads": 1, "processes": 1}
    return {
        "state": state, "config": copy.deepcopy(config()), "spec": spec, "fingerprint": "10-abc",
        "resolved": resolved, "monitor": ("top1", "max"), "versions": {},
    }  # fmt: skip


def test_a_sound_checkpoint_comes_through() -> None:
    sound = content()
    checked = check_saved(sound, config())
    assert checked["state"] == sound["state"] and checked["config"] == sound["config"]
    assert checked["spec"] == sound["spec"] and checked["resolved"] == sound["resolved"]
    assert DataSpec(**checked["spec"]) == DataSpec(**sound["spec"])


def test_what_an_older_checkpoint_lacks_has_its_default() -> None:
    older = content()
    del older["config"]["check"], older["config"]["log"]["tensorboard"], older["resolved"], older["monitor"]
    del older["state"]["ema"], older["state"]["scaler"], older["state"]["progress"]["finished"]
    older["spec"] = {"channels": 1, "height": 8, "width": 8, "classes": ["a", "b"]}
    checked = check_saved(older, config())
    assert checked["config"] == config() and checked["resolved"] == {} and checked["state"]["ema"] is None
    assert DataSpec(**checked["spec"]).classes == ("a", "b")
    assert checked["state"]["progress"]["finished"] is False


def test_what_an_older_checkpoint_has_is_kept_beside_the_defaults() -> None:
    older = content()
    older["config"]["log"] = {"every_steps": config()["log"]["every_steps"] + 1}
    checked = check_saved(older, config())["config"]["log"]
    assert checked == {**config()["log"], "every_steps": config()["log"]["every_steps"] + 1}


def test_images_of_too_many_values_are_refused() -> None:
    bad = content()
    bad["spec"] = {"channels": 4096, "height": 256, "width": 256}
    check_saved(bad, config())
    bad["spec"]["width"] = 257
    with pytest.raises(UserError, match="4096 x 256 x 257"):
        check_saved(bad, config())


BAD = {
    "state": [None, [], 5], "config": [None, "x", []], "spec": [None, [], 5], "fingerprint": [None, 5],
    "resolved": [[], 5], "monitor": [5, "top1", ["top1"], ["top1", "most"], [1, "max"]],
    "state.model": [None, [], {"weight": 5}, {5: torch.zeros(1)}, {"w": torch.zeros(1, dtype=torch.complex64)}],
    "state.ema": [5, {"weight": None}], "state.optimizer": [None, []], "state.scaler": [5],
    "state.meter": [None, {"loss": 1.0}], "state.schedule": [None, {"best": "x"}, {"best": NAN}, {"best": True}],
    "state.progress": [None, [], {"evil": 1}],
    "state.progress.step": ["x", None, -1, 0.5, NAN, 2**60, True],
    "state.progress.batch": [-1, 2**60], "state.progress.wall_s": [NAN, -1.0, "x"],
    "state.progress.best": [5, {"epoch": 1.0}, {"epoch": "x", "step": 1.0}, {"epoch": NAN, "step": 1.0}],
    "state.progress.finished": [1, "yes"],
    "spec.channels": [0, -1, "3", None, 10**9], "spec.height": [0, 10**9, 8.0, True], "spec.width": [0, 2**20],
    "spec.classes": ["ab", [1], 5], "spec.keypoints": ["ab", [None]], "spec.flip_pairs": [[0], [0, 2], [0, -1], 5],
    "spec.skeleton": [[0], [[0]], [[0, 2]], 5], "spec.per_pixel": [1, "x"], "spec.ignore_index": ["x", 2**40],
    "spec.mean": [[NAN], [0.1, 0.2], ["x"], 5], "spec.std": [[0.0], [NAN], [-1.0], [float("inf")], "x"],
    "spec.evil": [5],
    "config.model": [5, None, "mlp"], "config.data": [5], "config.batch_size": ["auto", "${oc.env:HOME}", 0, None],
    "config.choices": [5, None], "config.epochs": ["x", 0], "config.log": [5], "config.precision": ["fp8"],
    "config.evil": [5], "config.trusted_packages": ["os"],
    "resolved.precision": ["fp8", 5], "resolved.threads": [0, 10**6, "x"], "resolved.processes": [0, "x"],
}  # fmt: skip


@pytest.mark.parametrize("where", BAD)
def test_a_wrong_field_is_refused_by_its_name(where: str) -> None:
    for value in BAD[where]:
        bad = content()
        *above, last = where.split(".")
        place = bad
        for name in above:
            place = place[name]
        place[last] = value
        with pytest.raises(UserError, match=last):
            check_saved(bad, config())


@pytest.mark.parametrize("name", ["state", "config", "spec", "fingerprint"])
def test_a_missing_part_is_refused(name: str) -> None:
    bad = content()
    del bad[name]
    with pytest.raises(UserError, match=name):
        check_saved(bad, config())
