"""The search space of a sweep."""

import pytest

from cnntrain.errors import UserError
from cnntrain.sweep.search_space import expand_grid


def test_expand_grid_returns_every_combination() -> None:
    grid = expand_grid(["model=lenet5,mlp", "seed=range(0,3)", "epochs=2"])
    assert len(grid) == 6 and grid[0] == ["epochs=2", "model=lenet5", "seed=0"]
    with pytest.raises(UserError, match="a grid needs listed values"):
        expand_grid(["optimizer.lr=interval(0,1)"])
