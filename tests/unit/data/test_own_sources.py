"""Data sets of a user's own class: what is taken as it is meant, and what is refused before training."""

from typing import Any

import pytest
import torch

from cnntrain.data.examples import Examples
from cnntrain.data.load import Data, load_data
from cnntrain.data.source import Source
from cnntrain.errors import UserError
from cnntrain.spec import DataSpec


class Own(Source):
    """Returns what it is given."""

    def __init__(self, splits: Any, **facts: Any) -> None:
        self.splits, self.facts = splits, {"classes": ("no", "yes"), **facts}

    def spec(self) -> DataSpec:
        return DataSpec(1, 4, 4, **self.facts)

    def load(self) -> Any:
        return self.splits


def examples(count: int = 6, **targets: Any) -> Examples:
    images = torch.arange(count * 16).view(count, 1, 4, 4).to(torch.uint8)
    return Examples(images, targets or {"label": torch.arange(count) % 2}, [str(i) for i in range(count)])


def load(splits: Any, **facts: Any) -> Data:
    return load_data(Own(splits, **facts), val_fraction=0.5)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_split_is_used_under_each_of_its_names(name: str) -> None:
    data = load({"train": examples(), name: examples(4)})
    assert data.own_val
    assert (len(data.train), len(data.val)) == (6, 4)


@pytest.mark.parametrize(
    ("splits", "part"),
    [
        (None, "dictionary of Examples"),
        ([examples()], "dictionary of Examples"),
        ({"train": [1, 2]}, "dictionary of Examples"),
        ({"val": examples()}, 'no "train"'),
        ({"train": examples(), "dev": examples()}, "'dev', which is no split"),
        ({"train": examples(), "val": examples(), "valid": examples()}, "'val' and 'valid'"),
    ],
)
def test_what_is_no_set_of_splits_is_refused(splits: Any, part: str) -> None:
    with pytest.raises(UserError, match=part):
        load(splits)
