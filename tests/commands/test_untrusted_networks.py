"""A checkpoint's config cannot make evaluate or predict build a network far larger than its weights."""

import pytest
import torch
from torch import nn

from cnntrain.cli import main
from cnntrain.commands.evaluate import limited_construction
from cnntrain.errors import UserError

NODES = {
    "layers of an LSTM": {"_target_": "torch.nn.LSTM", "input_size": 1, "hidden_size": 1, "num_layers": 10**7},
    "copies of a layer": {"_target_": "torch.nn.Transformer", "num_encoder_layers": 10**7},
    "fewer layers, still far more than there are weights": {
        "_target_": "torch.nn.LSTM", "input_size": 1, "hidden_size": 1, "num_layers": 9_999,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("untrusted") / "run"
    few = (
        "data.limit=60",
        "steps=1",
        "log.figures=false",
        "log.tensorboard=false",
        "threads=1",
        "model=mlp",
    )
    assert main([*few, f"run_dir={folder}"]) == 0
    return str(folder)


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_network_of_endless_layers_is_refused(command: str, node: str, run: str, capsys, tmp_path) -> None:
    saved = torch.load(f"{run}/checkpoints/best.pt", weights_only=True)
    saved["config"]["model"] = NODES[node]
    (tmp_path / "bad" / "checkpoints").mkdir(parents=True)
    torch.save(saved, tmp_path / "bad" / "checkpoints" / "best.pt")
    (tmp_path / "x.png").write_bytes(b"")
    words = ["images=x.png"] if command == "predict" else []
    assert main([command, "checkpoint=bad", "threads=1", *words]) == 2
    assert "checkpoint: its" in capsys.readouterr().err


def test_construction_is_limited_by_the_number_of_tensors() -> None:
    with limited_construction(1):
        nn.Sequential(*(nn.ReLU() for _ in range(1000)))
    with pytest.raises(UserError, match="far larger than its 1 tensors"), limited_construction(1):
        nn.Sequential(*(nn.ReLU() for _ in range(1100)))
    nn.Sequential(*(nn.ReLU() for _ in range(1100)))  # the limit has ended
