"""Transforms of torchvision named in YAML."""

import pickle

import pytest
import torch

from cnntrain.augment.pipeline import Pipeline
from cnntrain.augment.torchvision_transform import TorchvisionTransform
from cnntrain.errors import UserError
from cnntrain.types import DataSpec

SPEC = DataSpec(3, 12, 17)


def test_a_misspelled_name_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'RandomAutocontrast'"):
        TorchvisionTransform(name="RandomAutoContrast")


def test_transforms_depend_on_seed_epoch_position_and_key(make_batch):
    items = {"a": TorchvisionTransform(name="RandomAffine", arguments={"degrees": 40, "shear": [5, 9]})}
    pipeline = Pipeline(SPEC, items)
    transform = pipeline.sample_transform(1, 2)
    assert transform is not None
    image = make_batch(1).images[0]
    state = torch.get_rng_state()
    first = transform(image, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    again = pickle.loads(pickle.dumps(transform))
    assert torch.equal(again(image, 5), first)
    assert not torch.equal(transform(image, 6), first)
    other = Pipeline(SPEC, items).sample_transform(1, 3)
    assert other is not None
    assert not torch.equal(other(image, 5), first)
    assert Pipeline(SPEC, {}).sample_transform(1, 2) is None


def test_transforms_must_keep_shape_and_type(make_batch):
    transform = TorchvisionTransform(name="Resize", arguments={"size": [4, 4]})
    with pytest.raises(UserError, match="keep shape and type"):
        transform(make_batch(1).images[0], 0)
