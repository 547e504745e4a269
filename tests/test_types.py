"""Batches are taken apart and put together again."""

import torch

from cnntrain.types import Batch, concat_batches


def make_batch(with_matrix: bool) -> Batch:
    rows = torch.arange(5)
    matrix = torch.eye(3, dtype=torch.float64).repeat(5, 1, 1) * rows[:, None, None] if with_matrix else None
    return Batch(rows.view(5, 1, 1, 1).byte(), {"label": rows % 2}, rows, rows + 10, matrix)


def test_parts_of_a_batch_concatenate_to_the_batch() -> None:
    for with_matrix in (True, False):
        batch = make_batch(with_matrix)
        again = concat_batches([batch.take(slice(0, 2)), batch.take(torch.tensor([2, 3, 4]))])
        assert torch.equal(again.images, batch.images) and torch.equal(again.targets["label"], batch.targets["label"])
        assert torch.equal(again.index, batch.index) and torch.equal(again.position, batch.position)
        assert ("source_to_image" in again.truth) == with_matrix
        if batch.source_to_image is not None and again.source_to_image is not None:
            assert torch.equal(again.source_to_image, batch.source_to_image)


def test_examples_with_equal_targets() -> None:
    batch = make_batch(False)
    assert batch.same_target(0, 2) and not batch.same_target(0, 1)
