"""Every shipped augmentation composes, alone and in lists, and runs."""

from pathlib import Path

import pytest
import torch

from cnntrain.augment.pipeline import Pipeline
from cnntrain.types import DataSpec

hydra = pytest.importorskip("hydra")
CONF = Path(__file__).resolve().parents[2] / "conf"
OPTIONS = sorted(path.stem for path in (CONF / "augment").glob("*.yaml"))
CLASSIFICATION_ONLY = {"mixup", "cutmix", "mixup_cutmix"}


@pytest.fixture(scope="module")
def compose(tmp_path_factory):
    from omegaconf import OmegaConf

    folder = tmp_path_factory.mktemp("conf")
    (folder / "config.yaml").write_text("defaults:\n  - _self_\n  - augment: none\n")
    (folder / "augment").symlink_to(CONF / "augment")

    def build(*overrides):
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            node = OmegaConf.to_container(hydra.compose("config", list(overrides)))
        items = node.get("augment") or {}
        return {key: hydra.utils.instantiate(value, _convert_="all") for key, value in items.items()}

    return build


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_runs(compose, make_batch, option):
    items = compose(f"augment={option}")
    assert items or option == "none"
    batch = make_batch(4)
    assert Pipeline(DataSpec(3, 12, 17), items)(batch, 0, 0).images.shape[:2] == (4, 3)
    if option not in CLASSIFICATION_ONLY:
        spec = DataSpec(3, 12, 17, keypoints=("l", "r"), flip_pairs=(1, 0))
        batch.targets = {"points": torch.rand(4, 2, 2), "valid": torch.ones(4, 2, dtype=torch.bool)}
        Pipeline(spec, items)(batch, 0, 0)


def test_lists_compose_in_order_and_can_be_overridden(compose):
    items = compose("augment=[crop,flip,jitter]", "augment.crop.padding=2", "augment.flip.probability=0.25")
    assert list(items) == ["crop", "flip", "jitter"]
    assert items["crop"].padding == 2
    assert items["flip"].probability == 0.25
    assert list(compose("augment=[cifar,random_erasing]")) == ["flip", "crop", "random_erasing"]
    assert compose() == {}
