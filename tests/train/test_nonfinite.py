"""What is not finite is noted on the device, keeps the weights as they were, and is traced to its layer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cnntrain import compose, train
from cnntrain.errors import DivergedError
from cnntrain.train import checkpoint, loop
from cnntrain.train.nonfinite import MAX_SKIPPED_STEPS, SHOWN_EXAMPLES, NonFiniteGuard, step_unless, watch_layers

QUICK = ("model=mlp", "data.limit=200", "batch_size=20", "threads=1", "log.figures=false", "log.tensorboard=false")
OPTIMIZERS = ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop")


def explain(batch: int) -> DivergedError:
    return DivergedError(str(batch))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_update_changes_no_weight_and_the_next_one_works(name: str, fused: bool) -> None:
    if fused and name not in ("SGD", "Adam", "AdamW", "Adagrad"):
        pytest.skip("has no fused kernel")
    weight = nn.Parameter(torch.ones(3000))
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)([weight], lr=0.1, **momentum, **({"fused": True} if fused else {}))
    for skip, gradient in ((1.0, float("nan")), (0.0, 1.0), (1.0, float("inf"))):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, gradient)
        step_unless(torch.tensor(skip), optimizer)
        assert weight.isfinite().all() and torch.equal(weight, before) == bool(skip)
    for state in optimizer.state.values():
        assert all(value.isfinite().all() for value in state.values() if isinstance(value, Tensor))


def test_the_flag_is_sticky_and_needs_no_host_sync() -> None:
    meta = NonFiniteGuard(torch.device("meta"), False, explain)
    norm = torch.zeros((), device="meta")
    meta.record(norm)
    assert meta.should_skip(norm, 3).device.type == "meta"
    finite = NonFiniteGuard(torch.device("cpu"), False, explain)
    skipped = []
    for batch, norm in enumerate((1.0, float("inf"), 1.0, float("nan"))):
        skipped.append(float(finite.should_skip(torch.tensor(norm), batch)))
    assert skipped == [0, 1, 1, 1]
    with pytest.raises(DivergedError, match=r"^1$"):
        finite.raise_if_bad()


def test_with_a_loss_scaler_only_twenty_consecutive_skipped_steps_count() -> None:
    finite, overflow = NonFiniteGuard(torch.device("cpu"), True, explain), torch.tensor(float("inf"))
    for batch in range(MAX_SKIPPED_STEPS - 1):
        assert finite.should_skip(overflow, batch) == 1
    assert finite.should_skip(torch.tensor(1.0), 19) == 0
    finite.raise_if_bad()
    for batch in range(MAX_SKIPPED_STEPS):
        finite.should_skip(overflow, batch)
    assert finite.should_skip(torch.tensor(1.0), 20) == 1, "sticky"
    with pytest.raises(DivergedError, match=rf"^{MAX_SKIPPED_STEPS - 1}$"):
        finite.raise_if_bad()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_loss_that_is_not_finite_is_found_at_the_end_of_its_step(value: float, scaled: bool) -> None:
    finite, good = NonFiniteGuard(torch.device("cpu"), scaled, explain), torch.tensor(1.0)
    for batch in (1, 3):
        finite.record(torch.tensor(3e38))
        assert finite.should_skip(good, batch) == 0
    finite.raise_if_bad()
    finite.record(good)
    finite.record(torch.tensor(value))
    assert finite.should_skip(good, 5) == 1
    assert finite.should_skip(good, 7) == 1
    with pytest.raises(DivergedError, match=r"^5$"):
        finite.raise_if_bad()


def test_the_remedy_comes_before_a_few_of_the_examples(tmp_path: Path) -> None:
    with pytest.raises(DivergedError) as raised:
        train(compose(*QUICK, "epochs=1", "optimizer.lr=1e30", "schedule=constant", f"run_dir={tmp_path}/run"))
    said = str(raised.value)
    assert said.count("digits/") == SHOWN_EXAMPLES and f"and {20 - SHOWN_EXAMPLES} more" in said
    assert said.index("optimizer.lr") < said.index("digits/")


class Divides(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by


class Root(nn.Module):
    """Finite at zero, with a gradient that is not."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 0).abs().sqrt()


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (Divides(0.0), "the activation of 2 (Divides)"),
        (Root(), "the gradient at the output of 1 (ReLU) (first in the backward pass)"),
    ],
    ids=["activation", "gradient"],
)
def test_the_first_layer_is_named(layer: nn.Module, named: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), layer, nn.Linear(4, 1))
    with watch_layers(model) as found:
        model(torch.rand(3, 4) + 0.1).sum().backward()
    assert found[0] == named
    assert not model[0]._forward_hooks


def make_nonfinite(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make one weight NaN before `step`, once; the replay sees it too."""
    original: Callable[..., float] = loop.set_learning_rate
    met = []

    def set_infinite(optimizer: torch.optim.Optimizer, schedule: object, now: int) -> float:
        if now == step and not met:
            met.append(now)
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0][0, 0] = float("nan")
        return original(optimizer, schedule, now)

    monkeypatch.setattr(loop, "set_learning_rate", set_infinite)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_error_names_the_step_that_was_not_finite(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make_nonfinite(monkeypatch, 3 if accumulate == 1 else 5)
    with pytest.raises(DivergedError) as raised:
        train(compose(*QUICK, "epochs=3", f"accumulate={accumulate}", "run_dir=run", "log.every_steps=100"))
    lines = str(raised.value).splitlines()
    # 180 images are 9 batches an epoch: 9 steps of one, or 3 steps of three.
    where = "step 4 (epoch 1" if accumulate == 1 else "step 6 (epoch 2"
    assert lines[0].startswith(f"the loss is nan at {where}, learning rate ")
    assert "first not finite: the activation of layers.1 (Linear)" in lines
    assert str(raised.value).count("digits/") == SHOWN_EXAMPLES
    saved = "none was written yet" if accumulate == 1 else "run/checkpoints/last.pt (step 3)"
    assert lines[-1] == f"last good checkpoint: {saved}"
    for path in Path("run").glob("checkpoints/*.pt"):
        assert all(v.isfinite().all() for v in checkpoint.load(path)["state"]["model"].values())


def test_a_run_that_diverges_before_the_last_log_entry_saves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    make_nonfinite(monkeypatch, 2)
    with pytest.raises(DivergedError, match="step 3"):
        train(compose(*QUICK, "epochs=1", "steps=5", "run_dir=run", "log.every_steps=100"))
    assert not list(Path("run").glob("checkpoints/*"))


def test_a_validation_loss_that_is_not_finite_is_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only evaluation uses running statistics, so training stays finite."""
    original = loop.evaluate

    def spoiling(trainer: object, model: nn.Module, *arguments: object, **more: object) -> object:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                module.running_mean.fill_(float("nan"))
        return original(trainer, model, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "evaluate", spoiling)
    settings = compose(*QUICK[1:], "model=batchnorm_cnn", "epochs=1", "run_dir=run", "augment=none")
    with pytest.raises(DivergedError, match=r"(?s)the validation loss is not finite after step 9 .*BatchNorm2d"):
        train(settings)
    assert not list(Path("run").glob("checkpoints/*"))
