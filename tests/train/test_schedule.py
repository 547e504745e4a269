import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau

from cnntrain.config.instantiate import build
from cnntrain.errors import UserError
from cnntrain.train.optim import build_optimizer, set_learning_rate
from cnntrain.train.schedule import Constant, Cosine, OneCycle, Plateau, Schedule, Step

STEPS = 60


def factors(schedule: Schedule) -> list[float]:
    return [schedule.multiplier(step) for step in range(STEPS)]


def torch_factors(make) -> list[float]:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


FACTS = {"total_steps": STEPS, "steps_per_epoch": 10}


def test_cosine_equals_torchs() -> None:
    assert factors(Cosine(final=0.1, **FACTS)) == pytest.approx(
        torch_factors(lambda o: CosineAnnealingLR(o, STEPS, eta_min=0.1))
    )


def test_step_equals_torchs() -> None:
    assert factors(Step(milestones=[0.75, 0.5], factor=0.1, **FACTS)) == pytest.approx(
        torch_factors(lambda o: MultiStepLR(o, [30, 45], 0.1))
    )


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_one_cycle_and_its_momentum_equal_torchs(shape: str) -> None:
    mine = OneCycle(warmup=0.3, start=0.04, final=1e-4, shape=shape, **FACTS)
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    anneal = "cos" if shape == "cosine" else "linear"
    theirs = OneCycleLR(
        optimizer, 1.0, STEPS, pct_start=0.3, div_factor=25, final_div_factor=1e4, anneal_strategy=anneal
    )
    for step in range(STEPS):
        group = optimizer.param_groups[0]
        assert mine.multiplier(step) == pytest.approx(group["lr"], abs=1e-9)
        assert mine.momentum(step) == pytest.approx(group["momentum"], abs=1e-9)
        optimizer.step()
        if step < STEPS - 1:
            theirs.step()


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    mine = factors(Constant(warmup_epochs=2, **FACTS))
    theirs = torch_factors(lambda o: LinearLR(o, 1 / 20, 1.0, 19))
    assert mine == pytest.approx(theirs)
    assert mine[19] == 1.0


def test_plateau_equals_torchs() -> None:
    losses = [1.0, 0.9, 0.9, 0.9, 0.9, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6]
    mine = Plateau(factor=0.1, patience=2, threshold=1e-4, minimum=0.0, **FACTS)
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = ReduceLROnPlateau(optimizer, factor=0.1, patience=2)
    for loss in losses:
        mine.observe(loss)
        theirs.step(loss)
        assert mine.multiplier(0) == pytest.approx(optimizer.param_groups[0]["lr"])
    again = Plateau(factor=0.1, patience=2, threshold=1e-4, minimum=0.0, **FACTS)
    again.load_state(mine.state())
    assert again.state() == mine.state()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Cosine", {"final": 2}),
        ("Cosine", {"final": "abc"}),
        ("Cosine", {"final": 0.0, "warmup_epochs": -1}),
        ("OneCycle", {"warmup": 0.3, "start": 0.04, "final": 1e-4, "shape": "round"}),
        ("Step", {"milestones": [0.5, 3], "factor": 0.1}),
        ("Plateau", {"factor": 0.1, "patience": "abc", "threshold": 0.0, "minimum": 0.0}),
    ],
)
def test_invalid_argument_is_refused_by_key(name: str, arguments: dict[str, object]) -> None:
    invalid = next(k for k, v in arguments.items() if v in (2, "abc", -1, "round", [0.5, 3]))
    node = {"_target_": f"cnntrain.train.schedule.{name}", **arguments}
    with pytest.raises(UserError, match=rf"schedule\.{invalid}"):
        build(node, "schedule", "schedule", **FACTS)


def test_learning_rate_and_first_beta_follow_the_schedule() -> None:
    optimizer = build_optimizer(lambda p: Adam(p, lr=0.2), torch.nn.Linear(2, 2), 0.0, False)
    schedule = OneCycle(warmup=0.5, start=0.5, final=0.1, shape="linear", **FACTS)
    assert set_learning_rate(optimizer, schedule, 0) == pytest.approx(0.1)
    assert optimizer.param_groups[0]["betas"][0] == pytest.approx(0.95)
    assert set_learning_rate(optimizer, schedule, 29) == pytest.approx(0.2)
