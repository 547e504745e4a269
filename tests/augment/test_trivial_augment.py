"""TrivialAugment: one operation per image."""

import pytest
import torch

from cnntrain.augment.pipeline import Pipeline
from cnntrain.augment.trivial_augment import TrivialAugment
from cnntrain.errors import UserError
from cnntrain.randomness import uniform
from cnntrain.types import DataSpec


def test_one_operation_is_applied_to_each_image(make_batch):
    """Every operation comes up, evenly; what moves pixels leaves colors alone and the other way round."""
    item = TrivialAugment()
    draws = uniform(0, 0, torch.arange(4000), "trivial_augment", item.num_uniforms)
    moves = item.matrix(draws, 24, 32) - torch.eye(3)
    paints = item.color_matrix(draws) - torch.cat([torch.eye(3), torch.zeros(3, 4)], 1)
    moved, painted = moves.flatten(1).abs().amax(1) > 0, paints.flatten(1).abs().amax(1) > 0
    assert not (moved & painted).any()
    operation = torch.floor(draws[:, 1] * 9).long()
    counts = torch.bincount(operation, minlength=9)
    assert counts.min() > 350
    assert torch.equal(moved, operation >= 4)
    assert torch.equal(painted, (operation >= 1) & (operation <= 3))
    assert (torch.linalg.det(item.matrix(draws, 24, 32)) > 0).all()
    # Both ways, to the widest.
    shift = moves[operation == 6][:, 0, 2]
    assert shift.min() < -0.95 * 32 / 7
    assert shift.max() > 0.95 * 32 / 7
    Pipeline(DataSpec(3, 24, 32), {"trivial_augment": item})(make_batch(30, height=24, width=32), 0, 0)


def test_an_invalid_strength_is_reported_by_name():
    with pytest.raises(UserError, match="strength must be between 0 and 1"):
        TrivialAugment(strength=2)
