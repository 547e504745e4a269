"""The training loop: what is saved, logged and validated; a resumed run has the bits of an unbroken one."""

import csv
import functools
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cnntrain import compose, train
from cnntrain.errors import DivergedError, MachineError, StoppedError, UserError
from cnntrain.plots import curves
from cnntrain.report import run_logger
from cnntrain.report.metrics import MetricsFile
from cnntrain.report.run_logger import RunLogger
from cnntrain.tasks.classification import Classification
from cnntrain.train import checkpoint, loop
from cnntrain.train.checkpoint import CheckpointWriter
from cnntrain.train.run_dir import RunDir
from tests.runs import SMALL, assert_same_run, assert_same_weights, column, metrics, rows, stop_at, weights


@pytest.mark.parametrize(
    "extra",
    [("optimizer=sgd", "schedule=plateau"), ("ema_decay=0.9", "data.cache=none", "data.workers=0")],
    ids=["dropout and plateau", "average and stream"],
)
def test_a_run_stopped_within_an_epoch_resumes_with_the_same_bits(
    extra: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(compose(*SMALL, *extra, "run_dir=whole"))
    stop_at(monkeypatch, 13)
    with pytest.raises(StoppedError):
        train(compose(*SMALL, *extra, "run_dir=broken"))
    state = checkpoint.load(Path("broken/checkpoints/last.pt"))["state"]
    assert 0 < state["progress"]["batch"] < 9
    train(compose(*SMALL, *extra, "run_dir=broken", "resume=auto"))
    assert_same_weights(weights("whole"), weights("broken"))
    assert rows("whole") == rows("broken")
    assert whole["best"]["val/loss"] == pytest.approx(
        checkpoint.load(Path("broken/checkpoints/last.pt"))["state"]["progress"]["best"]["val/loss"]
    )


def test_the_figure_has_the_learning_rate_of_every_step_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr(
        run_logger, "plot_training_curves", lambda rows, monitor, lr_at: drawn.update(rows=rows, at=lr_at)
    )
    monkeypatch.setattr(run_logger, "save_figure", lambda figure, path: None)
    rates: list[float] = []
    original = loop.set_learning_rate
    monkeypatch.setattr(loop, "set_learning_rate", lambda *a: rates.append(original(*a)) or rates[-1])
    stop_at(monkeypatch, 13)
    asked = (*SMALL[:3], "log.tensorboard=false", "threads=1", "model=mlp", "run_dir=run")
    with pytest.raises(StoppedError):
        train(compose(*asked))
    assert not drawn
    train(compose(*asked, "resume=auto"))
    assert len(rates) == 27 and max(rates) > 2 * rates[0]
    assert curves.learning_rate_by_step(drawn["rows"], drawn["at"])[1] == pytest.approx(rates)


@pytest.mark.parametrize("steps", [27, 20], ids=["of the last epoch", "in its middle"])
def test_a_run_stopped_after_its_last_step_still_validates_that_epoch(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = ("epochs=3",) if steps == 27 else (f"steps={steps}",)
    train(compose(*SMALL, *length, "run_dir=whole"))
    evaluate, seen = loop.evaluate, []

    def stopping(*arguments: Any) -> Any:
        seen.append(0)
        if len(seen) == 3:
            raise StoppedError(15, "stopped")
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", stopping)
    with pytest.raises(StoppedError):
        train(compose(*SMALL, *length, "run_dir=broken"))
    state = checkpoint.load(Path("broken/checkpoints/last.pt"))["state"]
    assert state["progress"]["step"] == steps and state["progress"]["batch"] > 0
    train(compose(*SMALL, *length, "run_dir=broken", "resume=auto"))
    assert_same_weights(weights("whole"), weights("broken"))
    assert rows("whole") == rows("broken") and rows("broken").count("\n") == 3


class Killed(BaseException):
    """Stands for SIGKILL: nothing is written after it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Kill the training once, at the `call`-th call of `owner.name`."""
    original, calls = getattr(owner, name), itertools.count(1)

    def killing(*arguments: Any) -> Any:
        if next(calls) != call:
            return original(*arguments)
        monkeypatch.setattr(owner, name, original)
        write = checkpoint.write
        monkeypatch.setattr(checkpoint, "write", lambda *_: None)
        monkeypatch.setattr(MetricsFile, "append", lambda *_: None)
        restore.append(lambda: monkeypatch.setattr(checkpoint, "write", write))
        raise Killed

    restore: list[Callable[[], None]] = []
    append = MetricsFile.append
    monkeypatch.setattr(owner, name, killing)
    with pytest.raises((Killed, MachineError)):
        train(compose(*KILLED, "run_dir=broken"))
    assert restore, "it was never called"
    restore[0]()
    monkeypatch.setattr(MetricsFile, "append", append)


KILLED = (*SMALL, "model=mlp", "model.values.width=8", "steps=22", "checkpoint.every_steps=1")  # of 9 an epoch


# The checkpoints of steps 1 to 8 come first, then last.pt and best.pt of epoch 1, and so on.
INSTANTS = {
    "before the row": (MetricsFile, "append", 2),
    "between row and checkpoint": (CheckpointWriter, "save", 9),
    "between last.pt and best.pt": (checkpoint, "write", 10),
    "after the checkpoint": (RunLogger, "log_checkpoint", 2),
    "between the last step's checkpoint and its row": (MetricsFile, "append", 3),
    "before the results": (RunDir, "write_json", 2),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_killed_run_resumes_with_the_same_bits(instant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train(compose(*KILLED, "run_dir=whole"))
    kill_at(monkeypatch, *INSTANTS[instant])
    train(compose(*KILLED, "run_dir=broken", "resume=auto"))
    assert_same_run("whole", "broken")


@pytest.mark.parametrize("extra", [("accumulate=2",), ("optimizer=sgd", "schedule=plateau", "ema_decay=0.9")])
def test_a_run_ended_by_steps_within_an_epoch_continues_from_there(extra: tuple[str, ...]) -> None:
    common = (*SMALL, "schedule=constant", "augment=mixup", *extra)
    train(compose(*common, "steps=20", "run_dir=whole"))
    first = train(compose(*common, "steps=7", "run_dir=parts"))
    progress = checkpoint.load(Path("parts/checkpoints/last.pt"))["state"]["progress"]
    epoch, batch = (1, 4) if "accumulate=2" in extra else (0, 7)  # five steps an epoch, or nine
    assert (progress["epoch"], progress["batch"], progress["finished"]) == (epoch, batch, True)
    assert first["epochs"] == epoch and len(metrics(Path("parts"))) == 1 + epoch + 1
    assert train(compose(*common, "steps=7", "run_dir=parts", "resume=auto")) == first
    train(compose(*common, "steps=20", "run_dir=parts", "resume=auto"))
    assert_same_weights(weights("whole"), weights("parts"))
    assert rows("whole") == rows("parts")


def test_a_run_ended_by_steps_within_an_epoch_can_be_extended_to_its_end() -> None:
    common = (*SMALL, "model=mlp", "schedule=constant")
    train(compose(*common, "epochs=2", "run_dir=whole"))
    train(compose(*common, "steps=12", "run_dir=parts"))
    assert train(compose(*common, "epochs=2", "run_dir=parts", "resume=auto"))["epochs"] == 2
    assert_same_weights(weights("whole"), weights("parts"))
    assert rows("whole") == rows("parts")


@pytest.mark.parametrize(("optimizer", "key"), [("adamw", "betas"), ("sgd", "momentum")])
def test_momentum_is_restored_if_the_schedule_changes_it_and_configured_otherwise(
    optimizer: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (*SMALL, "model=mlp", "epochs=2", f"optimizer={optimizer}")
    train(compose(*common, "run_dir=whole"))
    stop_at_end(monkeypatch, 18)
    with pytest.raises(StoppedError):
        train(compose(*common, "run_dir=broken"))
    train(compose(*common, "run_dir=broken", "resume=auto"))
    one, other = (groups(run)[0] for run in ("whole", "broken"))
    assert one == other and one[key] not in (0.9, (0.9, 0.999))
    train(compose(*common, "schedule=constant", "epochs=3", "run_dir=broken", "resume=auto"))
    assert groups("broken")[0][key] in (0.9, (0.9, 0.999))


def groups(run: str) -> list[dict[str, Any]]:
    return checkpoint.load(Path(run) / "checkpoints/last.pt")["state"]["optimizer"]["param_groups"]


def stop_at_end(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Stop the training once, after `step`, before the epoch that it ends is validated."""
    original = loop.check_replicas_equal

    def stopping(*arguments: Any) -> None:
        monkeypatch.setattr(loop, "check_replicas_equal", original)
        if progress["step"] == step:
            raise StoppedError(15, "stopped")

    progress = {"step": step}
    calls = itertools.count(1)
    monkeypatch.setattr(
        loop, "check_replicas_equal", lambda *a: stopping(*a) if next(calls) == step // 9 else original(*a)
    )


def test_a_run_whose_folder_is_deleted_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = loop.evaluate

    def and_remove(*arguments: Any) -> Any:
        shutil.rmtree("run", ignore_errors=True)
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", and_remove)
    with pytest.raises(MachineError, match=r"can't write the checkpoint: No such file or directory$"):
        train(compose(*SMALL, "run_dir=run"))


def test_the_seed_determines_the_bits() -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(compose(*SMALL, f"seed={seed}", f"run_dir={name}", "epochs=1"))
    assert_same_weights(weights("a"), weights("b"))
    assert any(not torch.equal(v, weights("c")[k]) for k, v in weights("a").items())


def test_accumulated_batches_equal_one_large_batch() -> None:
    common = ("data.limit=300", "epochs=2", "model=lenet5", "optimizer=sgd", *SMALL[3:6])
    train(compose(*common, "batch_size=64", "run_dir=large"))
    train(compose(*common, "batch_size=16", "accumulate=4", "run_dir=small"))
    for (name, one), other in zip(weights("large").items(), weights("small").values(), strict=True):
        assert torch.allclose(one, other, atol=2e-5), name


def test_steps_override_epochs() -> None:
    result = train(compose(*SMALL, "steps=12", "run_dir=steps"))
    assert result["steps"] == 12


def test_a_diverged_state_is_not_saved() -> None:
    with pytest.raises(DivergedError, match="step"):
        train(compose(*SMALL, "optimizer=sgd", "optimizer.lr=1e30", "run_dir=wild"))
    for path in Path("wild").glob("checkpoints/*.pt"):
        assert all(v.isfinite().all() for v in checkpoint.load(path)["state"]["model"].values())


def test_early_stopping_and_limit_batches() -> None:
    result = train(
        compose(
            *SMALL, "model=mlp", "optimizer.lr=0", "early_stopping=2", "epochs=9", "limit_batches=2", "run_dir=early"
        )
    )
    assert result["epochs"] == 3 and result["steps"] == 6


@pytest.mark.parametrize("extra", [("steps=2",), ("batch_size=290", "epochs=1"), ("epochs=1",)])
def test_images_per_s_counts_the_images_of_the_epoch(extra: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances by one second with each reading, so an epoch takes whole seconds."""
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    train(compose(*SMALL, "model=mlp", *extra, "run_dir=speed"))
    with (Path("speed") / "metrics.csv").open(newline="") as file:
        speed = float(next(csv.DictReader(file))["images_per_s"])
    images = checkpoint.load(Path("speed/checkpoints/last.pt"))["state"]["progress"]["images"]
    assert images == {"steps=2": 64, "batch_size=290": 270, "epochs=1": 270}[extra[0]]
    assert images / speed == pytest.approx(round(images / speed), abs=1e-6)


@pytest.mark.parametrize(("direction", "chosen"), [("max", 0.9), ("min", 0.2)])
def test_the_monitored_metric_selects_the_best_epoch(direction: str, chosen: float) -> None:
    best: dict[str, float] = {}
    for value in (0.5, 0.9, 0.2, 0.4):
        row = {"val/score": value, "train/loss": 1 - value}
        if loop.is_better(row, best, ("score", direction)):
            best = row
    assert best["val/score"] == chosen
    assert loop.is_better({"val/score": 0.1}, {"val/score": float("nan")}, ("score", direction))


@pytest.mark.parametrize("saves", [(), ("checkpoint.every_steps=2",)])
def test_figures_do_not_count_as_training_time(saves: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances only a little, except while the first batch is drawn."""
    now = [0.0]

    def draw(self: RunLogger) -> None:
        if self.first_batch is not None:
            now[0] += 1000.0
        self.first_batch = None

    monkeypatch.setattr(RunLogger, "_draw_batch", draw)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now.__setitem__(0, now[0] + 1e-3) or now[0]))
    result = train(compose(*SMALL, *saves, "model=mlp", "log.figures=true", "log.every_steps=2", "run_dir=run"))
    assert now[0] > 1000 > 100 * result["wall_s"] > 0
    assert result["images_per_s"] > 100
    assert min(column("run", "images_per_s")) > 100


def test_a_monitor_that_is_not_a_metric_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Classification.__init__

    @functools.wraps(original)
    def init(self: Classification, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        self.monitor = ("erorr", "min")

    monkeypatch.setattr(Classification, "__init__", init)
    with pytest.raises(UserError, match="'erorr' is not a metric; choose one of loss, top1"):
        train(compose(*SMALL, "epochs=1", "run_dir=run"))
    assert not Path("run/checkpoints/best.pt").exists()
