"""Properties of whole trainings, small and real."""

import csv
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
from cnntrain.randomness import seed_generators
from cnntrain.report import run_logger
from cnntrain.report.metrics import MetricsFile
from cnntrain.report.run_logger import RunLogger
from cnntrain.train import checkpoint, loop
from cnntrain.train.checkpoint import CheckpointWriter
from cnntrain.train.run_dir import RunDir
from tests.runs import assert_same_run, metrics

SMALL = (
    "data.limit=300", "epochs=3", "batch_size=32", "log.figures=false", "log.tensorboard=false", "threads=1",
    "model=fmnist_cnn",
)  # fmt: skip


def weights(run_dir: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(Path(run_dir) / "checkpoints" / "last.pt")["state"]["model"]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def rows(run_dir: str) -> str:
    """metrics.csv without what depends on the clock."""
    lines = [line.split(",") for line in (Path(run_dir) / "metrics.csv").read_text().splitlines()]
    skip = lines[0].index("images_per_s")
    return "\n".join(",".join(cell for i, cell in enumerate(line) if i != skip) for line in lines)


def column(run_dir: str, name: str) -> list[float]:
    with (Path(run_dir) / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Stop the training once, before the batch after `step`, as a signal would."""
    original = loop.set_learning_rate

    def stopping(optimizer: Any, schedule: Any, now: int) -> float:
        if now == step:
            monkeypatch.setattr(loop, "set_learning_rate", original)
            raise StoppedError(15, "stopped")
        return original(optimizer, schedule, now)

    monkeypatch.setattr(loop, "set_learning_rate", stopping)


@pytest.mark.parametrize(
    "extra",
    [("optimizer=sgd", "schedule=plateau"), ("ema_decay=0.9", "data.cache=none", "data.workers=0")],
    ids=["dropout and plateau", "average and stream"],
)
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_as_if_unbroken(
    extra: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(compose(*SMALL, *extra, "run_dir=whole"))
    stop_at(monkeypatch, 13)
    with pytest.raises(StoppedError):
        train(compose(*SMALL, *extra, "run_dir=broken"))
    state = checkpoint.load(Path("broken/checkpoints/last.pt"))["state"]
    assert 0 < state["progress"]["batch"] < 9
    train(compose(*SMALL, *extra, "run_dir=broken", "resume=auto"))
    assert_same(weights("whole"), weights("broken"))
    assert rows("whole") == rows("broken")
    assert whole["best"]["val/loss"] == pytest.approx(
        checkpoint.load(Path("broken/checkpoints/last.pt"))["state"]["progress"]["best"]["val/loss"]
    )


def test_the_learning_rate_is_drawn_of_every_step_after_a_resume_too(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_stopped_after_its_last_step_a_run_still_judges_that_epoch(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert_same(weights("whole"), weights("broken"))
    assert rows("whole") == rows("broken") and rows("broken").count("\n") == 3


class Killed(BaseException):
    """Stands for SIGKILL: nothing is written after it, whatever the program does on its way out."""


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
def test_a_killed_run_ends_as_if_unbroken(instant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train(compose(*KILLED, "run_dir=whole"))
    kill_at(monkeypatch, *INSTANTS[instant])
    train(compose(*KILLED, "run_dir=broken", "resume=auto"))
    assert_same_run("whole", "broken")


@pytest.mark.parametrize("extra", [("accumulate=2",), ("optimizer=sgd", "schedule=plateau", "ema_decay=0.9")])
def test_a_run_that_steps_ended_within_an_epoch_goes_on_from_there(extra: tuple[str, ...]) -> None:
    common = (*SMALL, "schedule=constant", "augment=mixup", *extra)
    train(compose(*common, "steps=20", "run_dir=whole"))
    first = train(compose(*common, "steps=7", "run_dir=parts"))
    progress = checkpoint.load(Path("parts/checkpoints/last.pt"))["state"]["progress"]
    epoch, batch = (1, 4) if "accumulate=2" in extra else (0, 7)  # five steps an epoch, or nine
    assert (progress["epoch"], progress["batch"], progress["finished"]) == (epoch, batch, True)
    assert first["epochs"] == epoch and len(metrics(Path("parts"))) == 1 + epoch + 1
    assert train(compose(*common, "steps=7", "run_dir=parts", "resume=auto")) == first
    train(compose(*common, "steps=20", "run_dir=parts", "resume=auto"))
    assert_same(weights("whole"), weights("parts"))
    assert rows("whole") == rows("parts")


def test_a_run_that_steps_ended_within_an_epoch_is_lengthened_to_that_epochs_end() -> None:
    common = (*SMALL, "model=mlp", "schedule=constant")
    train(compose(*common, "epochs=2", "run_dir=whole"))
    train(compose(*common, "steps=12", "run_dir=parts"))
    assert train(compose(*common, "epochs=2", "run_dir=parts", "resume=auto"))["epochs"] == 2
    assert_same(weights("whole"), weights("parts"))
    assert rows("whole") == rows("parts")


@pytest.mark.parametrize(("optimizer", "key"), [("adamw", "betas"), ("sgd", "momentum")])
def test_momentum_is_restored_where_the_schedule_moves_it_and_configured_elsewhere(
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


def spoil(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = checkpoint.load(path)
    change(content["state"])
    checkpoint.save(content, path)


FOREIGN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "short moments": (
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
        r"exp_avg must be a tensor of shape",
    ),
    "sums that are none": (lambda state: state.update(meter={"loss": 1}), r"state\.meter: "),
    "before the start": (lambda state: state["progress"].update(step=-5), r"state\.progress\.step: "),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_state_that_is_none_of_such_a_training_is_refused(kind: str) -> None:
    change, said = FOREIGN[kind]
    train(compose(*SMALL, "epochs=1", "run_dir=run"))
    spoil(Path("run/checkpoints/last.pt"), change)
    with pytest.raises(UserError, match=said):
        train(compose(*SMALL, "epochs=2", "run_dir=run", "resume=auto"))


def test_a_run_whose_folder_is_taken_away_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = loop.evaluate

    def and_remove(*arguments: Any) -> Any:
        shutil.rmtree("run", ignore_errors=True)
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", and_remove)
    with pytest.raises(MachineError, match=r"can't write the checkpoint: No such file or directory$"):
        train(compose(*SMALL, "run_dir=run"))


def test_a_folder_in_the_place_of_a_checkpoint_is_named() -> None:
    Path("run/checkpoints/last.pt").mkdir(parents=True)
    for resume in ("none", "auto"):
        with pytest.raises(UserError, match=r"run/checkpoints/last\.pt: is not a file"):
            train(compose(*SMALL, "run_dir=run", f"resume={resume}"))


def test_same_seed_same_bits_and_other_seed_other_bits() -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(compose(*SMALL, f"seed={seed}", f"run_dir={name}", "epochs=1"))
    assert_same(weights("a"), weights("b"))
    assert any(not torch.equal(v, weights("c")[k]) for k, v in weights("a").items())


def test_accumulated_batches_step_like_one_large_batch_short_last_one_included() -> None:
    common = ("data.limit=300", "epochs=2", "model=lenet5", "optimizer=sgd", *SMALL[3:6])
    train(compose(*common, "batch_size=64", "run_dir=large"))
    train(compose(*common, "batch_size=16", "accumulate=4", "run_dir=small"))
    for (name, one), other in zip(weights("large").items(), weights("small").values(), strict=True):
        assert torch.allclose(one, other, atol=2e-5), name


def test_steps_decide_instead_of_epochs() -> None:
    result = train(compose(*SMALL, "steps=12", "run_dir=steps"))
    assert result["steps"] == 12


def test_divergence_is_said_and_not_saved() -> None:
    with pytest.raises(DivergedError, match="step"):
        train(compose(*SMALL, "optimizer=sgd", "optimizer.lr=1e30", "run_dir=wild"))
    for path in Path("wild").glob("checkpoints/*.pt"):
        assert all(v.isfinite().all() for v in checkpoint.load(path)["state"]["model"].values())


def test_a_finished_or_foreign_run_is_not_overwritten() -> None:
    train(compose(*SMALL, "epochs=1", "run_dir=done"))
    before = (Path("done") / "checkpoints" / "best.pt").read_bytes()
    with pytest.raises(UserError, match="resume=auto"):
        train(compose(*SMALL, "epochs=1", "run_dir=done"))
    with pytest.raises(UserError, match="another network"):
        train(compose(*SMALL, "epochs=2", "run_dir=done", "resume=auto", "model=mlp"))
    train(compose(*SMALL, "epochs=1", "run_dir=done", "resume=auto"))
    assert (Path("done") / "checkpoints" / "best.pt").read_bytes() == before


def test_a_finished_run_is_neither_shortened_nor_rewritten() -> None:
    train(compose(*SMALL, "epochs=2", "run_dir=done"))
    names = ("metrics.csv", "config.yaml", "run.json", "results.json")
    before = {name: (Path("done") / name).read_bytes() for name in names}
    train(compose(*SMALL, "epochs=1", "run_dir=done", "resume=auto"))
    with pytest.raises(UserError, match="another network"):
        train(compose(*SMALL, "epochs=3", "run_dir=done", "resume=auto", "model=mlp"))
    assert before == {name: (Path("done") / name).read_bytes() for name in names}
    longer = train(compose(*SMALL, "epochs=3", "run_dir=done", "resume=auto"))
    assert longer["epochs"] == 3 and len(rows("done").splitlines()) == 4


def test_a_last_batch_of_one_image_is_left_out_for_batchnorm(caplog: pytest.LogCaptureFixture) -> None:
    result = train(
        compose(*SMALL, "data.limit=290", "batch_size=26", "data.val_fraction=0.1", "epochs=1", "run_dir=one")
    )
    assert result["steps"] == 10  # 261 images: ten batches of 26 and one image


def test_early_stopping_and_limit_batches() -> None:
    result = train(
        compose(
            *SMALL, "model=mlp", "optimizer.lr=0", "early_stopping=2", "epochs=9", "limit_batches=2", "run_dir=early"
        )
    )
    assert result["epochs"] == 3 and result["steps"] == 6


@pytest.mark.parametrize("extra", [("steps=2",), ("batch_size=290", "epochs=1"), ("epochs=1",)])
def test_images_per_s_counts_the_images_that_were_seen(extra: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second whenever it is looked at: the epoch took whole seconds."""
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    train(compose(*SMALL, "model=mlp", *extra, "run_dir=speed"))
    with (Path("speed") / "metrics.csv").open(newline="") as file:
        speed = float(next(csv.DictReader(file))["images_per_s"])
    images = checkpoint.load(Path("speed/checkpoints/last.pt"))["state"]["progress"]["images"]
    assert images == {"steps=2": 64, "batch_size=290": 270, "epochs=1": 270}[extra[0]]
    assert images / speed == pytest.approx(round(images / speed), abs=1e-6)


def test_a_run_that_patience_ended_is_finished(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it was killed between its last epoch and its results."""
    asked = (*SMALL, "model=mlp", "optimizer.lr=0", "early_stopping=1", "limit_batches=2", "run_dir=early")
    first = train(compose(*asked, "epochs=9"))
    results = (Path("early") / "results.json").read_bytes()
    capsys.readouterr()
    assert train(compose(*asked, "epochs=9", "resume=auto")) == first
    assert "early_stopping=" in capsys.readouterr().err
    assert train(compose(*asked, "early_stopping=null", "epochs=2", "resume=auto")) == first
    assert "epochs=" in capsys.readouterr().err
    (Path("early") / "results.json").unlink()
    assert train(compose(*asked, "epochs=9", "resume=auto")) == first
    assert (Path("early") / "results.json").read_bytes() == results
    assert train(compose(*asked[:-1], "early_stopping=2", "run_dir=early", "epochs=9", "resume=auto"))["epochs"] == 3


def test_a_run_that_was_rewound_has_no_best_epoch_of_its_other_future(capsys: pytest.CaptureFixture[str]) -> None:
    asked = (*SMALL, "model=mlp", "epochs=4", "checkpoint.keep=9")
    train(compose(*asked, "optimizer.lr=0.01", "run_dir=run"))
    state, first = checkpoint.load(Path("run/checkpoints/best.pt"))["state"], "run/checkpoints/epoch-00001.pt"
    assert state["progress"]["epoch"] > 1
    found = train(compose(*asked, "optimizer.lr=0", f"resume={first}", "run_dir=other"))
    best = checkpoint.load(Path("other/checkpoints/best.pt"))["state"]["progress"]["best"]
    assert found["best"]["epoch"] == best["epoch"] == 1  # the checkpoint that it went on from is the best itself
    capsys.readouterr()
    spoil(Path(first), lambda state: state["progress"]["best"].update(step=1.0))
    found = train(compose(*asked, "optimizer.lr=0", f"resume={first}", "run_dir=third"))
    assert "best epoch are missing" in capsys.readouterr().err
    best = checkpoint.load(Path("third/checkpoints/best.pt"))["state"]["progress"]["best"]
    assert found["best"]["epoch"] == best["epoch"] == 2
    with pytest.raises(UserError, match="nothing is left to train"):
        train(compose(*asked, "epochs=1", f"resume={first}", "run_dir=fourth"))
    assert not Path("fourth").exists()


@pytest.mark.parametrize(("direction", "chosen"), [("max", 0.9), ("min", 0.2)])
def test_the_best_epoch_is_the_one_that_the_monitor_says(direction: str, chosen: float) -> None:
    best: dict[str, float] = {}
    for value in (0.5, 0.9, 0.2, 0.4):
        row = {"val/score": value, "train/loss": 1 - value}
        if loop.is_better(row, best, ("score", direction)):
            best = row
    assert best["val/score"] == chosen
    assert loop.is_better({"val/score": 0.1}, {"val/score": float("nan")}, ("score", direction))


def test_a_run_keeps_the_weights_of_its_best_epoch() -> None:
    result = train(compose(*SMALL, "model=lenet5", "run_dir=best"))
    column = rows("best").splitlines()[0].split(",").index("val/top1")
    values = [float(line.split(",")[column]) for line in rows("best").splitlines()[1:]]
    assert result["best"]["val/top1"] == pytest.approx(max(values))


def test_seeding_draws_what_torch_draws_and_remembers_nothing() -> None:
    torch.manual_seed(77)
    expected = torch.rand(5)
    remembered = len(torch.cuda._queued_calls)
    for _ in range(100):
        seed_generators(77)
    assert torch.equal(torch.rand(5), expected)
    assert len(torch.cuda._queued_calls) == remembered


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a checkpoint says beside its state."""
    content = checkpoint.load(path)
    change(content)
    checkpoint.save(content, path)


@pytest.mark.parametrize(
    ("of_another_machine", "kept"),
    [
        ({"device": "cuda", "precision": "fp16", "threads": 1}, False),
        ({"device": "cpu", "precision": "bf16", "threads": 1024}, True),
        ({"device": "cpu", "processes": 4, "precision": "bf16", "threads": 1}, False),
    ],
    ids=["a GPU's", "more cores", "more processes"],
)
def test_choices_of_another_machine_are_made_anew(
    of_another_machine: dict[str, Any], kept: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (*SMALL, "model=mlp", "threads=null", "run_dir=run")
    threads = torch.get_num_threads()
    train(compose(*common, "epochs=1", "device=cpu"))
    last = Path("run/checkpoints/last.pt")
    here = checkpoint.load(last)["resolved"]
    rewrite(last, lambda saved: saved["resolved"].update(of_another_machine))
    capsys.readouterr()
    train(compose(*common, "epochs=2", "resume=auto", "device=cpu"))
    assert torch.get_num_threads() == threads
    after = checkpoint.load(last)
    assert after["config"]["precision"] == "auto" and after["config"]["threads"] is None
    assert after["resolved"] == {**here, **({"precision": "bf16"} if kept else {})}
    changed = not kept and of_another_machine["precision"] != here["precision"]
    assert ("resume: precision was" in capsys.readouterr().err) == changed


LENGTHENED = {
    "one_cycle": (("epochs=1",), ("epochs=3",), True),
    "a constant one": (("epochs=1", "schedule=constant"), ("epochs=3", "schedule=constant"), False),
    "one that watches": (("epochs=1", "schedule=plateau"), ("epochs=3", "schedule=plateau"), False),
    "another rate": (("epochs=2", "schedule=constant"), ("epochs=3", "schedule=constant", "optimizer.lr=0.1"), True),
}


@pytest.mark.parametrize("kind", LENGTHENED)
def test_a_learning_rate_that_jumps_is_said(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, then, jumps = LENGTHENED[kind]
    common = (*SMALL, "model=mlp", "model.values.width=8", "run_dir=run")
    train(compose(*common, *first))
    capsys.readouterr()
    train(compose(*common, *then, "resume=auto"))
    said = [line for line in capsys.readouterr().err.splitlines() if "the learning rate jumps" in line]
    assert len(said) == jumps
    if jumps:
        rates = column("run", "lr")
        assert f"{rates[-3 if kind == 'one_cycle' else -2]:.3g}" in said[0] and said[0].startswith("warning: ")


@pytest.mark.parametrize("saves", [(), ("checkpoint.every_steps=2",)])
def test_pictures_do_not_count_as_training(saves: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still except while the first batch is drawn."""
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


def test_best_weights_of_another_network_are_lost_and_not_loaded_at_the_end() -> None:
    train(compose(*SMALL, "epochs=1", "run_dir=run"))
    spoil(Path("run/checkpoints/best.pt"), lambda state: state.update(model={"weight": torch.zeros(2)}))
    results = train(compose(*SMALL, "epochs=2", "run_dir=run", "resume=auto"))
    assert results["best"]["epoch"] in (1, 2) and "weight" not in weights("run")
