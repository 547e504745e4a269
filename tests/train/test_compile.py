"""`compile=`: faster or not, the training is the same one, and its checkpoints are the network's."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from cnntrain import compose, train
from cnntrain.errors import DivergedError, MachineError
from cnntrain.train import checkpoint, device

FEW = (
    "model=lenet5",
    "data.limit=200",
    "epochs=1",
    "batch_size=32",
    "limit_batches=4",
    "threads=1",
    "log.figures=false",
)

NEEDS_COMPILER = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler here")


def test_without_a_compiler_it_is_refused_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    with pytest.raises(MachineError, match=r"compile: default needs a C\+\+ compiler.*use compile=off"):
        train(compose(*FEW, "compile=default", f"run_dir={tmp_path}/run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("written", ["off", "false"])
def test_off_compiles_nothing(written: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A bare `off` is false to YAML."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: pytest.fail("compiled"))
    settings = compose(*FEW, f"compile={written}", f"run_dir={tmp_path}/run")
    assert settings.compile == "off"
    train(settings)


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_compiled_training_is_the_same_training(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    plain = train(compose(*FEW, f"run_dir={tmp_path}/plain"))
    counters.clear()
    compiled = train(compose(*FEW, "compile=default", f"run_dir={tmp_path}/compiled"))
    assert counters["stats"]["unique_graphs"] > 0
    assert compiled["best"]["train/loss"] == pytest.approx(plain["best"]["train/loss"], rel=1e-4)
    one, other = (
        checkpoint.load(tmp_path / run / "checkpoints" / "last.pt")["state"]["model"] for run in ("plain", "compiled")
    )
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-4)
    on = train(compose(*FEW, "epochs=2", f"run_dir={tmp_path}/compiled", "resume=auto"))
    assert on["epochs"] == 2


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_compiled_training_that_diverges_names_the_layer(tmp_path: Path) -> None:
    """Compiled code heeds no hooks, so it is the network as it was written that is looked through."""
    with pytest.raises(DivergedError, match=r"first not finite: the (activation|gradient)") as plain:
        train(compose(*FEW, "optimizer.lr=1e30", f"run_dir={tmp_path}/plain"))
    with pytest.raises(DivergedError) as compiled:
        train(compose(*FEW, "optimizer.lr=1e30", "compile=default", f"run_dir={tmp_path}/compiled"))
    assert str(compiled.value).replace("compiled", "plain") == str(plain.value)
