"""Names of classes, points and files as users have them: numbers, dollars, bytes that are no text."""

import os

import pytest
import torch

from cnntrain.plots.images import bars, confusion_matrix, image_grid, ranking_curves, shorten
from cnntrain.tasks.class_weights import parse_class_weights
from cnntrain.types import flip_permutation

ODD = ("$5_to_$10", os.fsdecode(b"caf\xe9.jpg"), "under_score", "$")


def test_they_can_be_drawn() -> None:
    counts = torch.eye(4, dtype=torch.int64)
    figures = [
        confusion_matrix(counts, ODD),
        bars(dict.fromkeys(ODD, 0.5), "bars", "share"),
        image_grid(torch.zeros(4, 8, 8, 3).numpy(), ODD, title=ODD[0]),
        *(ranking_curves(torch.tensor([0.1, 0.9]), torch.tensor([False, True]), name) for name in ODD),
    ]
    for figure in figures:
        figure.canvas.draw()  # pyright: ignore[reportAttributeAccessIssue]
    assert figures[0].axes[0].get_yticklabels()[0].get_text() == r"\$5_to_\$10"


def test_shortening() -> None:
    assert shorten("a" * 30, 11) == "aaaaa…aaaaa"
    assert shorten(ODD[1], 40) == r"caf\udce9.jpg"


@pytest.mark.parametrize("weights", [{0: 5}, {"0": 5}])
def test_numbers_that_yaml_reads_are_names(weights: dict) -> None:
    assert parse_class_weights(weights, ("0", "1")).tolist() == [5, 1]  # pyright: ignore[reportOptionalMemberAccess]
    assert flip_permutation(("36", "45", "30"), {36: 45}) == (1, 0, 2)  # pyright: ignore[reportArgumentType]
