"""A loss that is not finite ends the run with 3, says where, and is never saved."""

from pathlib import Path

import pytest
import torch


def finite(path: Path) -> bool:
    return all(v.isfinite().all() for v in torch.load(path, weights_only=True)["state"]["model"].values())


@pytest.mark.slow
def test_the_error_names_step_epoch_rate_layer_and_examples(cnntrain) -> None:
    said = cnntrain(
        *cnntrain.quick, "optimizer=sgd", "optimizer.lr=1e30", "schedule=constant", "run_dir=run", code=3
    ).stderr
    assert "the loss is nan at step 2 (epoch 1, learning rate 1e+30)" in said
    assert "first not finite: the activation of layers." in said and "(Linear)" in said
    assert said.count("digits/") == 5 and "and 59 more" in said and "last good checkpoint: none was written yet" in said
    assert not list(Path("run").glob("checkpoints/*"))


@pytest.mark.slow
def test_the_error_names_the_last_good_checkpoint(cnntrain, trained: Path) -> None:
    before = {path: path.read_bytes() for path in trained.glob("checkpoints/*.pt")}
    arguments = (*cnntrain.quick, "epochs=3", "run_dir=run", "resume=auto", "schedule=constant")
    said = cnntrain(*arguments, "optimizer.lr=1e35", code=3).stderr
    assert "(epoch 2, learning rate 1e+35)" in said
    assert "last good checkpoint: run/checkpoints/last.pt (step 3)" in said
    assert before == {path: path.read_bytes() for path in trained.glob("checkpoints/*.pt")}
    cnntrain(*arguments, "optimizer.lr=1e-3")
    assert all(finite(path) for path in before)
