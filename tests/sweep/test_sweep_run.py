"""Whole sweeps in this process: which runs are executed, and what is written and printed."""

import csv
import json
import shlex
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage

from cnntrain import compose, train
from cnntrain.cli import main, parse_arguments
from cnntrain.config.command_line import Invocation
from cnntrain.errors import MachineError, StoppedError, UserError
from cnntrain.report.metrics import read_metrics
from cnntrain.sweep import study
from cnntrain.sweep.run_workers import SweepTarget
from cnntrain.sweep.study import Study
from cnntrain.sweep.sweep_run import run_sweep
from cnntrain.train.checkpoint import load_validated

NO_FILES = ("log.figures=false", "log.tensorboard=false")
QUICK = ("epochs=1", "data.limit=60", "batch_size=16", "threads=1", *NO_FILES)
TWO_SETTINGS = ("model=mlp", "optimizer.lr=0.01,0.02", *NO_FILES)
Output = pytest.CaptureFixture[str]


def invocation(*more: str) -> Invocation:
    return parse_arguments(["-m", *TWO_SETTINGS, *more])


def stopped(settings: Any, command_line: str, on_epoch: Any) -> dict[str, Any]:
    raise StoppedError(15, f"stopped by SIGTERM at step 3; the same command with run_dir={settings.run_dir}")


def done(settings: Any, command_line: str, on_epoch: Any) -> dict[str, Any]:
    results = {"best": {"val/top1": settings.optimizer["lr"], "epoch": 1}, "test": None, "steps": 5}
    Path(settings.run_dir, "results.json").write_text(json.dumps(results))
    return results


def evaluate(settings: Any, command_line: str) -> dict[str, float]:
    return {"test/top1": 0.5}


def command_in(message: str) -> list[str]:
    return shlex.split(message[message.index("cnntrain ") :].partition(" (replace")[0])[1:]


def test_a_stopped_sweep_prints_the_command_that_continues_it() -> None:
    first = invocation("run_dir='my sweeps/s'", "resume=none")
    with pytest.raises(StoppedError) as caught:
        run_sweep(first, SweepTarget(stopped, evaluate))
    assert caught.value.exit_code == 128 + 15
    again = parse_arguments(command_in(str(caught.value)))
    assert again.multirun and again.overrides == (*TWO_SETTINGS, "run_dir='my sweeps/s'", "resume=auto")
    assert run_sweep(again, SweepTarget(done, evaluate)) == 0
    assert json.loads(Path("my sweeps/s/001-0.02/results.json").read_text())["test"] == {"test/top1": 0.5}


def test_a_sweep_that_lost_its_storage_can_be_continued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(*_: object) -> None:
        raise StorageInternalError("no connection to postgresql://me:s3cret@host/db")

    monkeypatch.setattr(Study, "finish_run", lost)
    with pytest.raises(MachineError) as caught:
        run_sweep(invocation("run_dir=s"), SweepTarget(done, evaluate))
    assert "s3cret" not in str(caught.value)
    assert command_in(str(caught.value).splitlines()[-1]) == ["-m", *TWO_SETTINGS, "run_dir=s", "resume=auto"]


def test_without_results_of_the_winner_only_the_test_metrics_are_missing(
    capsys: Output,
) -> None:
    def damaged(settings: Any, command_line: str, on_epoch: Any) -> dict[str, Any]:
        results = done(settings, command_line, on_epoch)
        Path(settings.run_dir, "results.json").write_text("")
        return results

    assert run_sweep(invocation("run_dir=s"), SweepTarget(damaged, evaluate)) == 0
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "results.json" in line]
    assert command_in(message.partition(" rewrites it")[0])[-2:] == ["run_dir=s/001-0.02", "resume=auto"]


@pytest.mark.parametrize("name", ["journal.log", "journal.lock", "sweep.json", "results.csv", "results.md"])
def test_links_in_the_folder_of_a_sweep_are_not_followed(name: str) -> None:
    victim = Path("victim.txt")
    victim.write_text("precious")
    Path("s").mkdir()
    Path("s", name).symlink_to(victim.absolute())
    if name.startswith("results"):  # replaced, not read
        assert run_sweep(invocation("run_dir=s"), SweepTarget(done, evaluate)) == 0
    else:
        with pytest.raises(UserError, match="is a link"):
            run_sweep(invocation("run_dir=s", "resume=auto"), SweepTarget(done, evaluate))
    assert victim.read_text() == "precious"


def rows(folder: str = "s") -> list[dict[str, str]]:
    with Path(folder, "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def sweep(*arguments: str, folder: str = "s") -> int:
    return main(["-m", *QUICK, f"run_dir={folder}", *arguments])


def read_results(folder: str | Path) -> dict[str, object]:
    """Return results.json without times and without the test set."""
    known = json.loads(Path(folder, "results.json").read_text())
    known["best"] = {k: v for k, v in known["best"].items() if "per_s" not in k}
    return {k: v for k, v in known.items() if k not in ("wall_s", "images_per_s", "test")}


@pytest.mark.slow
def test_a_sweep_reports_its_ranking_and_writes_figures(capsys: Output) -> None:
    space = ("model=mlp,lenet5", "optimizer.lr=0.03,0.001", "sweep.seeds=2")
    assert sweep(*space) == 0
    found = rows()
    assert [(r["model"], r["optimizer.lr"], r["seed"]) for r in found] == [
        (model, rate, seed) for model in ("mlp", "lenet5") for rate in ("0.03", "0.001") for seed in ("0", "1")
    ]
    for row in found:
        assert row["status"] == "done" and float(row["time_s"]) > 0 and 0 <= float(row["val/top1"]) <= 1
    output, report = capsys.readouterr().out, Path("s/results.md").read_text()
    for text in (output, report):
        assert "95 % interval" in text and "runner-up: " in text and "paired over 2 seeds" in text
        assert "explains by itself" in text and "cnntrain epochs=1" in text and "used once" in text

    assert sweep(*space, "resume=auto", "log.figures=true") == 0  # all runs are done: only the figures are drawn
    report = Path("s/results.md").read_text()
    assert rows() == found
    for name in ("curves", "parallel", "effect-model", "effect-optimizer.lr"):
        assert (Path("s/figures") / f"{name}.png").stat().st_size > 5000 and f"figures/{name}.png" in report


@pytest.mark.slow
def test_the_reported_mean_is_that_of_the_runs(capsys: Output) -> None:
    sweep("model=mlp,lenet5", "sweep.seeds=2")
    output = capsys.readouterr().out
    means = {}
    for model in ("mlp", "lenet5"):
        values = [float(r["val/top1"]) for r in rows() if r["model"] == model]
        means[model] = sum(values) / len(values)
    best = max(means, key=lambda model: means[model])
    assert f"best: model={best}: val/top1 {means[best]:.4g} ±" in output


@pytest.mark.slow
def test_the_test_set_is_used_once_for_the_winner_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from cnntrain.commands import train as command

    evaluated = []
    real = command.evaluate_checkpoint
    monkeypatch.setattr(command, "evaluate_checkpoint", lambda *a: evaluated.append(a[0].checkpoint) or real(*a))
    sweep("optimizer.lr=0.003,1e-9")
    assert evaluated == ["s/000-0.003"]
    tests = {p.parent.name: json.loads(p.read_text())["test"] for p in Path("s").glob("*/results.json")}
    assert tests.pop("000-0.003")["test/top1"] >= 0 and set(tests.values()) == {None}
    assert sweep("optimizer.lr=0.003,1e-9", "resume=auto") == 0
    assert len(evaluated) == 1


@pytest.mark.slow
def test_all_folds_of_the_winner_are_tested() -> None:
    assert sweep("data.folds=3", "data.fold=0,1,2", "optimizer.lr=0.003,1e-9", "epochs=2") == 0
    found = rows()
    assert [(r["optimizer.lr"], r["seed"], r["data.fold"]) for r in found] == [
        (rate, "0", fold) for rate in ("0.003", "1e-09") for fold in ("0", "1", "2")
    ]
    configs = [yaml.safe_load(p.read_text())["data"]["fold"] for p in sorted(Path("s").glob("*/config.yaml"))]
    assert configs == [0, 1, 2, 0, 1, 2]
    tests = {p.parent.name: json.loads(p.read_text())["test"] for p in Path("s").glob("*/results.json")}
    assert {name for name, test in tests.items() if test} == {f"000-0.003-fold{fold}" for fold in range(3)}
    means = [statistics.fmean(float(r["val/top1"]) for r in found[i : i + 3]) for i in (0, 3)]
    assert means[0] > means[1] and f"val/top1 {means[0]:.4g} ±" in Path("s/results.md").read_text()


def secrets(folder: str, secret: str) -> list[str]:
    return [str(p) for p in Path(folder).rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]


@pytest.mark.slow
def test_the_password_of_a_storage_is_never_written(monkeypatch: pytest.MonkeyPatch, capfd: Output) -> None:
    real, url = study._open_storage, "postgresql://me:s3cret@host/db"
    opened: list[str | None] = []

    def local(folder: Path, where: str | None) -> BaseStorage:
        opened.append(where)
        return real(folder, None)

    monkeypatch.setattr(study, "_open_storage", local)
    more = ("model=mlp", "optimizer.lr=0.01,0.02", "log.tensorboard=true")
    assert sweep(*more, f"sweep.storage={url}") == 0
    assert sweep(*more, f"sweep.storage={url}", "resume=auto") == 0
    assert opened == [url, url] and len(rows()) == 2

    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/shared.yaml").write_text("# @package _global_\nsweep: {storage: '${oc.env:DB}'}\n")
    monkeypatch.setenv("DB", url)
    asked = ["--config-dir", "mine", *QUICK, "model=mlp", "experiment=shared"]
    assert main(["-m", *asked, "optimizer.lr=0.01,0.02", "run_dir=t"]) == 0 and opened[2] == url
    assert main([*asked, "run_dir=u"]) == 0  # a single run needs no storage
    assert main(["-m", "--cfg", *asked]) == 0 and main(["--cfg", *asked]) == 0
    assert main(["-m", *asked, f"sweep.storage={url}x=[y"]) == 2
    assert [secrets(folder, "s3cret") for folder in "stu"] == [[], [], []]
    output = capfd.readouterr()
    assert "s3cret" not in output.out + output.err and "me:***@host" in output.out
    checkpoint = load_validated(Path("u/checkpoints/last.pt"))
    assert checkpoint["config"]["sweep"]["storage"] == "postgresql://me:***@host/db"


@pytest.mark.slow
def test_the_command_of_a_run_gives_the_same_results_alone() -> None:
    sweep("model=mlp,lenet5", "optimizer.lr=0.01,0.003", "seed=0,3", "epochs=2")
    for row in rows():
        overrides = [f"{key}={row[key]}" for key in ("model", "optimizer.lr", "seed")]
        alone = f"alone-{row['trial']}-{row['seed']}"
        train(compose(*QUICK, "epochs=2", *overrides, f"run_dir={alone}"))
        name = f"s/{int(row['trial']):03d}-{row['model']}-{row['optimizer.lr']}-seed{row['seed']}"
        assert read_results(name) == read_results(alone)
        for one, other in zip(read_metrics(f"{name}/metrics.csv"), read_metrics(f"{alone}/metrics.csv"), strict=True):
            assert {**one, "images_per_s": 0} == {**other, "images_per_s": 0}
    winner = next(p for p in Path("s").glob("*/results.json") if json.loads(p.read_text())["test"])
    alone = Path(f"alone-{int(winner.parent.name[:3])}-{winner.parent.name[-1]}", "results.json")
    known, expected = (json.loads(path.read_text())["test"] for path in (winner, alone))
    assert {name: known[name] for name in expected} == expected


@pytest.mark.slow
def test_failed_and_diverged_runs_have_different_statuses(nets: Path, capsys: Output) -> None:
    space = ["model=faulty", "model.fault=no,raises", "optimizer=sgd", "optimizer.lr=0.01,1e30"]
    code = main(["-m", "--config-dir", str(nets), *QUICK, "run_dir=s", *space])
    assert code == 1
    assert [r["status"] for r in rows()] == ["done", "diverged", "failed", "failed"]
    assert {r["error"] for r in rows()[2:]} == {"IndexError: an error in user code"}
    assert "not finite" in rows()[1]["error"] or "the loss is" in rows()[1]["error"]
    output = capsys.readouterr()
    assert "error: model.fault=raises optimizer.lr=0.01: failed: IndexError: an error in user code" in output.err
    assert "Traceback" not in output.err and "Traceback" in Path("s/002-raises-0.01/log.txt").read_text()
    assert "epoch 1/1" in Path("s/000-no-0.01/log.txt").read_text()


@pytest.mark.slow
def test_a_diverged_run_is_a_result_and_not_a_failure() -> None:
    assert sweep("optimizer=sgd", "optimizer.lr=1e30,0.01") == 0
    assert [r["status"] for r in rows()] == ["diverged", "done"]
    assert sweep("optimizer=sgd", "optimizer.lr=1e30,1e31", folder="all") == 1


@pytest.mark.slow
def test_invalid_combinations_of_values_fail_and_the_sweep_continues(capsys: Output) -> None:
    assert sweep("model.activation=relu,gelu", "model=mlp,lenet5", "model.norm=null,batch") == 1
    assert {r["status"] for r in rows()} <= {"done", "failed"} and len(rows()) == 8
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_on_error_stop_starts_no_further_runs(nets: Path) -> None:
    asked = ["-m", "--config-dir", str(nets), *QUICK, "run_dir=s", "model=faulty", "model.fault=raises,no,nothing"]
    assert main([*asked, "sweep.on_error=stop"]) == 1
    assert [r["status"] for r in rows()] == ["failed"]
    assert main([*asked, "resume=auto"]) == 1  # the failed run is not repeated
    assert [r["status"] for r in rows()] == ["failed", "done", "done"]


@pytest.mark.slow
def test_a_sweep_that_ran_out_of_time_can_be_resumed() -> None:
    assert sweep("model=mlp,lenet5", "sweep.timeout_s=0") == 1
    assert rows() == []
    assert sweep("model=mlp,lenet5", "resume=auto") == 0
    assert [r["status"] for r in rows()] == ["done", "done"]


@pytest.mark.slow
def test_a_finished_sweep_is_not_overwritten(capsys: Output) -> None:
    sweep("model=mlp,lenet5")
    before = Path("s/results.csv").read_text()
    assert sweep("model=mlp,lenet5") == 2
    assert "already contains a sweep; continue it with resume=auto" in capsys.readouterr().err
    assert main(["-m", *QUICK, "model=mlp,lenet5", "resume=s"]) == 0
    assert Path("s/results.csv").read_text() == before
    assert main(["-m", *QUICK, "model=mlp,lenet5", "resume=elsewhere"]) == 2


@pytest.mark.slow
def test_a_pruned_setting_trains_fewer_epochs_and_no_other_seeds() -> None:
    space = ("optimizer.lr=0.003,0.0031,0.0032,0.0033,1e-9", "model=mlp", "data.limit=100")
    assert sweep(*space, "sweep.pruner=median", "epochs=4", "sweep.seeds=2") == 0
    last = [r for r in rows() if r["optimizer.lr"] in ("1e-09", "1e-9")]
    assert [r["status"] for r in last] == ["pruned"]
    assert len(read_metrics("s/004-1e-09-seed0/metrics.csv")) < 4


@pytest.mark.slow
def test_random_and_tpe_draw_the_given_number_of_trials() -> None:
    for sampler in ("random", "tpe"):
        space = ("optimizer.lr=tag(log,interval(1e-4,1e-1))", "model=mlp,lenet5")
        assert sweep(*space, f"sweep.sampler={sampler}", "sweep.trials=3", folder=sampler) == 0
        assert len(rows(sampler)) == 3


@pytest.mark.slow
def test_sweeps_of_overfit_give_verdicts(capsys: Output) -> None:
    arguments = ["overfit", "-m", *QUICK, "run_dir=s", "model=mlp,lenet5", "overfit.steps=100"]
    assert main(arguments) == 0
    assert [(r["model"], r["verdict"]) for r in rows()] == [("mlp", "PASS"), ("lenet5", "PASS")]
    assert "verdict" in capsys.readouterr().out
    assert main(["overfit", "-m", *QUICK, "run_dir=t", "model=mlp,lenet5", "overfit.steps=1"]) == 1
    assert {r["verdict"] for r in rows("t")} == {"FAIL"}


@pytest.mark.slow
def test_settings_with_different_metrics_are_not_ranked(capsys: Output) -> None:
    assert sweep("data=digits,toy_faces", "model=lenet5") in (0, 1)
    assert "best:" not in capsys.readouterr().out


@pytest.mark.slow
def test_config_groups_and_experiments_are_swept_like_keys() -> None:
    assert sweep("model=mlp", "augment=none,[shift],[shift,rotation]") == 0
    assert [r["augment"] for r in rows()] == ["none", "[shift]", "[shift,rotation]"]
    experiment = ("experiment=plain_vs_residual", "data=digits", "augment=none", "model.depth=8", "steps=2")
    assert sweep(*experiment, folder="e") == 0
    assert [r["model"] for r in rows("e")] == ["cifar_plain", "cifar_resnet"]
