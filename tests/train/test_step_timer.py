"""Timing of the training loop and the bare step on copies."""

import pytest

from cnntrain import compose
from cnntrain.augment.pipeline import Pipeline
from cnntrain.train.prepare import resolve_plan
from cnntrain.train.setup import build_components
from cnntrain.train.step_timer import StepTimer
from cnntrain.types import Batch


def timer_for(*overrides: str) -> StepTimer:
    settings = compose("model=fmnist_cnn", "data.limit=100", "batch_size=16", "threads=1", *overrides)
    components = build_components(settings)
    data = components.load()
    plan = resolve_plan(components, data)

    made = StepTimer(components, plan, components.loader(data.train, augmented=True))
    made.window_s = 0.001
    return made


@pytest.mark.parametrize("extra", [(), ("accumulate=2", "ema_decay=0.9", "data.cache=none", "data.workers=0")])
def test_window_covers_whole_logging_intervals_and_weights_are_unchanged(extra: tuple[str, ...]) -> None:
    timer = timer_for("log.every_steps=3", *extra)
    before = {name: value.clone() for name, value in timer.state.model.named_parameters()}
    timer.step_s = 0.0001  # so that a window would have 10 steps
    assert timer.window == (3, 9)
    images = 9 * 16 * timer.plan.accumulate
    for name, run in timer.parts().items():
        got, seconds = run()
        assert got == images and seconds > 0, name
    assert list(timer.parts()) == ["step", "metrics", "logging", "augment", "data"]  # no transfer to a CPU
    assert all(value.equal(before[name]) for name, value in timer.state.model.named_parameters())


def test_window_includes_the_augmentation_of_its_own_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training augments several small batches together; a short window would otherwise contain no augmentation."""
    timer, count = timer_for("log.every_steps=1", "augment=digits"), 0
    augment = Pipeline.__call__

    def counted(self: Pipeline, batch: Batch, seed: int, epoch: int) -> Batch:
        nonlocal count
        count += 1
        return augment(self, batch, seed, epoch)

    monkeypatch.setattr(Pipeline, "__call__", counted)
    timer.step_s = 100.0
    for name in ("augment", "data"):
        count = 0
        timer.parts()[name]()
        assert count == 3, name  # one before and one after the window


def test_window_has_at_least_one_step() -> None:
    timer = timer_for()
    timer.step_s = 100.0
    assert timer.window == (1, 1)
    assert timer.loop()[0] == 16
