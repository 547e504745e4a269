"""TimingWindows: which count, and how they are taken."""

import time
from collections.abc import Callable

import pytest

from cnntrain import compose
from cnntrain.augment.pipeline import Pipeline
from cnntrain.errors import MachineError, UserError
from cnntrain.train.batch_size import fastest, largest_that_fits, power_of_two
from cnntrain.train.measurement import TimingWindows, interleave
from cnntrain.train.optim import make_optimizer
from cnntrain.train.setup import assemble, build_training_parts, find_batch_size
from cnntrain.train.signals import StopFlag
from cnntrain.train.step_timer import StepTimer, make_step_timer
from cnntrain.types import Batch


def test_windows_in_which_others_worked_do_not_count_while_there_are_clean_ones() -> None:
    windows = TimingWindows()
    for seconds, others in ((1.0, 0.0), (2.0, 0.05), (9.0, 0.5), (3.0, None)):
        windows.add(10, seconds, others)
    assert windows.clean == [0.1, 0.2, 0.3] and windows.median == 0.2 and windows.images_per_s == 5
    assert windows.max_other_cores == 0.5
    busy = TimingWindows([0.4, 0.6], [1.0, 2.0])
    assert busy.clean == [] and busy.median == 0.5


def test_runs_take_turns_until_the_time_is_up_and_once_at_least() -> None:
    taken: list[str] = []

    def window(name: str) -> Callable[[], tuple[int, float]]:
        return lambda: (taken.append(name), (2, 1.0))[1]

    runs = {name: window(name) for name in "ab"}
    found = interleave(runs, 3, time.monotonic() + 60, StopFlag())
    assert taken == list("ababab") and found["a"].seconds_per_image == [0.5] * 3
    taken.clear()
    interleave(runs, 3, time.monotonic() - 1, StopFlag())
    assert taken == list("ab")


def rig(*overrides: str) -> StepTimer:
    settings = compose("model=fmnist_cnn", "data.limit=100", "batch_size=16", "threads=1", *overrides)
    assembly = assemble(settings)
    data = assembly.load()
    plan, _, _ = build_training_parts(assembly, data)

    def optimizer(model, compute):
        return make_optimizer(settings, model, compute)

    loader = assembly.loader(data.train, augmented=True)
    made = make_step_timer(
        assembly.model,
        optimizer,
        assembly.task,
        assembly.compute,
        plan,
        loader,
        assembly.pipeline,
        settings.ema_decay,
    )
    made.window_s = 0.001
    return made


@pytest.mark.parametrize(
    "extra", [(), ("accumulate=2", "ema_decay=0.9", "data.cache=none", "data.workers=0")]
)
def test_a_window_holds_whole_readings_and_leaves_the_weights_alone(extra: tuple[str, ...]) -> None:
    timed = rig("log.every_steps=3", *extra)
    before = {name: value.clone() for name, value in timed.state.model.named_parameters()}
    timed.step_s = 0.0001  # as if 10 steps were a window
    assert timed.window == (3, 9)
    images = 9 * 16 * timed.plan.accumulate
    for name, run in timed.parts().items():
        got, seconds = run()
        assert got == images and seconds > 0, name
    assert list(timed.parts()) == ["step", "metrics", "logging", "augment", "data"]  # no transfer to a CPU
    assert all(value.equal(before[name]) for name, value in timed.state.model.named_parameters())


def test_a_window_holds_the_augmentation_of_its_own_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a training augments small batches several at a time: else a short window would hold none."""
    timed, count = rig("log.every_steps=1", "augment=digits"), 0
    augment = Pipeline.__call__

    def counted(self: Pipeline, batch: Batch, seed: int, epoch: int) -> Batch:
        nonlocal count
        count += 1
        return augment(self, batch, seed, epoch)

    monkeypatch.setattr(Pipeline, "__call__", counted)
    timed.step_s = 100.0
    for name in ("augment", "data"):
        count = 0
        timed.parts()[name]()
        assert count == 3, name  # one of them before the window begins, one after it has ended


def test_a_step_longer_than_a_window_is_a_window() -> None:
    timed = rig()
    timed.step_s = 100.0
    assert timed.window == (1, 1)
    assert timed.loop()[0] == 16


def test_the_largest_batch_that_fits_is_a_power_of_two_and_keeps_an_epoch_long() -> None:
    assert largest_that_fits(lambda size: size <= 100, 1024)[0] == 64
    assert largest_that_fits(lambda size: True, 128)[0] == 128
    assert largest_that_fits(lambda size: size <= 1, 128)[0] == 1
    with pytest.raises(MachineError, match=r"with 1 image"):
        largest_that_fits(lambda size: False, 128)
    assert [power_of_two(n) for n in (0, 1, 2, 3, 63, 64)] == [1, 1, 2, 2, 32, 64]


def test_on_a_cpu_the_batch_grows_while_that_pays_and_memory_lasts() -> None:
    speeds = {32: 100.0, 64: 120.0, 128: 124.0, 256: 200.0}
    assert fastest(lambda size: speeds[size], 256)[0] == 64
    assert fastest(lambda size: None if size > 32 else 1.0, 256)[0] == 32
    assert fastest(lambda size: float(size), 8)[0] == 8
    assert fastest(lambda size: None if size > 8 else 1.0, 256) == (
        8,
        "16 take more than a quarter of the free memory",
    )
    with pytest.raises(MachineError, match=r"with 2 image"):
        fastest(lambda size: None, 256, least=2)


def test_a_network_with_batchnorm_is_never_tried_with_one_image() -> None:
    assembly = assemble(compose("model=batchnorm_cnn", "data.limit=20", "batch_size=auto", "threads=1"))
    assert find_batch_size(assembly, assembly.load()) == 2
    tried: list[int] = []
    assert largest_that_fits(lambda size: bool(tried.append(size) or size < 5), 1, least=2)[0] == 2
    assert tried == [2]


def test_auto_becomes_a_number_by_steps_that_leave_the_training_alone() -> None:
    assembly = assemble(compose("data.limit=600", "batch_size=auto", "threads=1"))
    data = assembly.load()
    before = {name: value.clone() for name, value in assembly.model.state_dict().items()}
    assert find_batch_size(assembly, data) in (16, 32)
    plan, _, _ = build_training_parts(assembly, data)
    assert assembly.settings.batch_size == plan.batch_size
    assert all(value.equal(before[name]) for name, value in assembly.model.state_dict().items())
    with pytest.raises(UserError, match="a whole number >= 1 or auto"):
        compose("batch_size=automatic")
