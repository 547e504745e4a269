"""The range test: what is known of a parabola, and that nothing of the run is touched."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cnntrain import compose
from cnntrain.checks.check_run import build_context
from cnntrain.checks.context import CheckContext
from cnntrain.checks.learning import RANGE_SHARE, learning_rate
from cnntrain.commands.lr_find import lr_find
from cnntrain.config.schema import LrFindSettings
from cnntrain.errors import UserError
from cnntrain.train.device import Compute
from cnntrain.train.loop import Trainer
from cnntrain.train.lr_finder import BASELINE_STEPS, RangeTest, choose_learning_rate, range_test
from cnntrain.train.prepare import resolve_plan, run_range_test
from cnntrain.train.setup import build_components
from cnntrain.train.signals import StopFlag
from cnntrain.train.state import TrainingPlan
from cnntrain.types import Batch

CPU = Compute(torch.device("cpu"), "fp32", channels_last=False)


class Parabola(nn.Module):
    """loss = curvature / 2 * (w + noise of the batch)**2: gradient descent diverges beyond 2 / curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.w + images.mean((1, 2, 3))


class Noise:
    """Loader, pipeline and task in one object, as far as the training step uses them."""

    def __init__(self, curvature: float, noise: float = 0.1) -> None:
        self.curvature, self.noise = curvature, noise

    def __len__(self) -> int:
        return 64

    def batches(self, order: Tensor, size: int, *rest: Any, **more: Any) -> Any:
        generator = torch.Generator().manual_seed(int(order.sum()) + int(order[0]))
        for rows in order.split(size):
            images = self.noise * torch.randn(len(rows), 1, 1, 1, generator=generator)
            yield Batch(images, {}, rows, rows)

    is_cached = True

    def augment_batches(self, batches: Any, *rest: Any) -> Any:
        return batches

    def sample_transform(self, seed: int, epoch: int) -> None:
        return None

    def loss(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        return (self.curvature / 2 * outputs.square()).sum(), torch.tensor(float(len(outputs)))

    def meter(self) -> "Noise":
        return self

    def update(self, *whatever: Any) -> None: ...


def on_parabola(
    curvature: float,
    momentum: float = 0.0,
    steps: int = 200,
    noise: float = 0.1,
    lowest: float = 1e-4,
    ends_at: float = math.inf,
) -> RangeTest:
    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=123.0, momentum=momentum)

    world: Any = Noise(curvature, noise)
    plan = TrainingPlan(seed=0, batch_size=8, batches_per_epoch=8, steps_per_epoch=8, total_steps=80)
    trainer = Trainer(world, world, CPU, plan, world)
    limits = LrFindSettings(lowest, 100.0, steps)
    return range_test(trainer, Parabola(), sgd, limits, StopFlag(), ends_at)


@pytest.mark.parametrize("curvature", [0.5, 4.0, 32.0])
def test_a_parabola_diverges_at_two_over_its_curvature(curvature: float) -> None:
    test = on_parabola(curvature)
    assert test.diverged_at is not None and 1 < test.diverged_at / (2 / curvature) < 2
    assert test.suggestion == test.diverged_at / 10
    assert test.decrease > 0.9
    assert test.steepest is not None and test.steepest < 2 / curvature


def test_momentum_raises_the_limit_of_a_parabola() -> None:
    """Heavy-ball descent on a parabola is stable up to 2 (1 + momentum) / curvature (Polyak 1964)."""
    plain, heavy = on_parabola(4.0), on_parabola(4.0, momentum=0.9)
    assert plain.diverged_at and heavy.diverged_at
    assert 1.3 < heavy.diverged_at / plain.diverged_at < 2.8


def test_rates_grow_by_a_constant_factor_and_match_their_losses() -> None:
    test = on_parabola(1e-9, steps=50)  # so flat that nothing happens
    assert test.complete and len(test.rates) == len(test.losses) == len(test.smoothed) == 50
    assert np.allclose(np.diff(np.log(test.rates)), np.log(1e6) / 49)
    assert test.rates[0] == pytest.approx(1e-4) and test.rates[-1] == pytest.approx(100)
    assert test.suggestion is None and test.steepest is None and test.diverged_at is None


def test_the_smoothed_loss_has_no_bias_at_its_start() -> None:
    assert RangeTest([1.0] * 30, [2.0] * 30).smoothed == pytest.approx([2.0] * 30)


def test_a_loss_that_is_not_finite_ends_the_test_as_divergence() -> None:
    test = on_parabola(1e30, lowest=1e-7, noise=0.0, steps=40)
    assert not np.isfinite(test.losses[-1]) or test.losses[-1] > test.initial_loss
    assert test.diverged_at is None or test.diverged_at == test.rates[-1]
    assert test.suggestion is None


def test_the_deadline_ends_the_test_as_incomplete() -> None:
    test = on_parabola(1.0, ends_at=time.monotonic())
    assert not test.complete and len(test.rates) == 1


def test_the_test_ends_soon_after_divergence() -> None:
    test = on_parabola(4.0)
    assert test.rates[-1] == test.diverged_at


def test_no_rate_is_chosen_if_the_loss_does_not_decrease() -> None:
    flat = RangeTest(list(np.geomspace(1e-6, 1, 40)), [1.0] * 40)
    with pytest.raises(UserError, match=r"optimizer\.lr=auto"):
        choose_learning_rate(flat)


def test_the_chosen_rate_has_two_digits() -> None:
    losses = [2.0] * (BASELINE_STEPS + 10) + [1.0] * 10 + [9.0] * 5
    test = RangeTest(list(np.geomspace(1e-6, 1, len(losses))), losses)
    assert choose_learning_rate(test) == float(f"{test.suggestion:.2g}")


def test_weights_statistics_and_generators_are_not_changed(tmp_path: Path) -> None:
    settings = compose("model=fmnist_cnn", "data.limit=200", "threads=1", "lr_find.steps=20", "precision=bf16")
    assembly = build_components(settings)
    data = assembly.load()
    plan = resolve_plan(assembly, data)
    model = assembly.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mode, state = model.training, torch.get_rng_state()
    test = run_range_test(assembly, data, plan, StopFlag())
    assert BASELINE_STEPS < len(test.rates) <= 20
    assert torch.equal(state, torch.get_rng_state()) and model.training == mode
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert run_range_test(assembly, data, plan, StopFlag()).losses == test.losses
    assert not list(tmp_path.iterdir())


def test_each_layer_keeps_its_ratio_to_the_rate() -> None:
    settings = compose("model=mlp", "data.limit=200", "threads=1", "lr_find.steps=20", "optimizer.layer_decay=0.5")
    assembly = build_components(settings)
    data = assembly.load()
    plan = resolve_plan(assembly, data)
    alike = run_range_test(assembly, data, plan, StopFlag())
    assembly.settings = compose("model=mlp", "data.limit=200", "threads=1", "lr_find.steps=20")
    assert run_range_test(assembly, data, plan, StopFlag()).losses[1:] != alike.losses[1:]


def context_of(*overrides: str, budget_s: float = 600.0) -> CheckContext:
    settings = compose("threads=1", "log.figures=false", *overrides)
    return build_context(build_components(settings), time.monotonic() + budget_s, StopFlag())


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=lenet5", "lr_find.steps=60", "lr_find.lowest=1e-4"),
        ("model=mlp", "accumulate=2", "augment=shift", "lr_find.steps=50", "seed=3", "data.limit=300"),
        ("model=mlp", "batch_size=1000", "data.limit=300", "limit_batches=1"),
    ],
)
def test_check_and_lr_find_agree(overrides: tuple[str, ...], tmp_path: Path) -> None:
    context = context_of(*overrides)
    finding = learning_rate(context)
    found = context.cache["range test"]
    report = lr_find(compose("threads=1", "log.figures=false", f"run_dir={tmp_path}", *overrides))
    assert (found.rates, found.losses) == (report["rates"], report["losses"])
    assert (found.suggestion, found.diverged_at) == (report["suggestion"], report["diverged_at"])
    assert found.suggestion and f"{found.suggestion:.2g}" in finding.evidence


def test_a_range_test_with_smaller_batches_logs_it() -> None:
    """If the budget is too small for the run's batch size, the result may differ from that of `lr-find`."""
    context = context_of("model=mlp", "lr_find.steps=40")
    seconds = RANGE_SHARE * context.seconds_left
    context.cache["step seconds"] = 8 * seconds / (40 * 16.5)  # enough for 16 images a step
    finding = learning_rate(context)
    assert context.cache["range batch"] == 16 and "batches of 16" in finding.evidence
