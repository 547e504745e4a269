"""Settings are checked before any data is read."""

import pytest

from cnntrain.config.compose import read_settings
from cnntrain.data.sources.digits import Digits
from cnntrain.errors import UserError
from cnntrain.train.setup import build_components

INVALID = [
    "optimizer.lr=-1",
    "optimizer.lr=abc",
    "optimizer.lr=nan",
    "optimizer.weight_decay=-1",
    "optimizer.betas=3",
    "optimizer.betas=[0.9,2]",
    "optimizer.layer_decay=2",
    "optimizer=torch optimizer.name=RMSProp",
    "optimizer=torch optimizer.name=LBFGS",
    "schedule.start=2",
    "schedule.shape=round",
    "schedule=cosine schedule.final=abc",
    "schedule=cosine schedule.warmup_epochs=-1",
    "schedule=step schedule.milestones=[0.5,x]",
    "schedule=plateau schedule.patience=abc",
    "data.val_fraction=2",
    "data.workers=-1",
    "data.cache=x",
    "task.binary=x",
    "task.label_smoothing=abc",
    "augment=shift augment.shift.pixels=abc",
    "augment=rotation augment.rotation.degrees=abc",
    "augment.border=x",
]


@pytest.mark.parametrize("overrides", INVALID)
def test_invalid_value_is_refused_before_data_is_read(overrides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Digits) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr(Digits, "load", load)
    key = overrides.split()[-1].split("=")[0]
    with pytest.raises(UserError) as error:
        build_components(read_settings(overrides.split())).load()
    assert key.split(".")[0] in str(error.value)
