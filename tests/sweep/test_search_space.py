"""The search space of a sweep."""

import pytest

from cnntrain.errors import UserError
from cnntrain.sweep.search_space import SearchDimension, expand_grid, grid, read_space

DIMENSIONS = {
    "model=lenet5,mlp": SearchDimension("model", ("lenet5", "mlp")),
    "model=choice(lenet5,mlp)": SearchDimension("model", ("lenet5", "mlp")),
    "model=glob(lenet*)": SearchDimension("model", ("lenet5", "lenet5_1998")),
    "augment=[flip,crop],none": SearchDimension("augment", ("[flip,crop]", "none")),
    "epochs=range(1,4)": SearchDimension("epochs", ("1", "2", "3"), 1, 3, 1, integer=True),
    "epochs=range(9,1,-4)": SearchDimension("epochs", ("9", "5"), 5, 9, 4, integer=True),
    "ema_decay=range(0,0.5,0.25)": SearchDimension("ema_decay", ("0.0", "0.25"), 0, 0.25, 0.25),
    "optimizer.lr=interval(0.1,0.5)": SearchDimension("optimizer.lr", (), 0.1, 0.5),
    "optimizer.lr=tag(log,interval(1e-4,1e-1))": SearchDimension("optimizer.lr", (), 1e-4, 1e-1, log=True),
    "batch_size=int(interval(8,64))": SearchDimension("batch_size", (), 8, 63, integer=True),
    "batch_size=tag(log,range(8,64,24))": SearchDimension("batch_size", ("8", "32", "56")),
    "batch_size=tag(log,int(interval(8,64)))": SearchDimension("batch_size", (), 8, 63, log=True, integer=True),
}


@pytest.mark.parametrize("override", DIMENSIONS)
def test_the_grammar_of_hydra(override: str) -> None:
    assert read_space([override, "seed=1"]) == (["seed=1"], [DIMENSIONS[override]])


@pytest.mark.parametrize(
    "override", [o for o in DIMENSIONS if "range" not in o and "glob" not in o and "choice" not in o]
)
def test_a_dimension_is_formatted_as_on_the_command_line(override: str) -> None:
    text = str(read_space([override])[1][0]).replace(" ", "")
    assert read_space([text]) == read_space([override])


def test_expand_grid_returns_every_combination() -> None:
    settings = expand_grid(["model=lenet5,mlp", "seed=range(0,3)", "epochs=2"])
    assert len(settings) == 6 and settings[0] == ["epochs=2", "model=lenet5", "seed=0"]
    assert grid([]) == [{}]
    with pytest.raises(UserError, match="a grid needs listed values"):
        expand_grid(["optimizer.lr=interval(0,1)"])
