"""A sweep that a signal, a lost storage or a damaged file interrupts."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from optuna.exceptions import StorageInternalError

from cnntrain.cli import parse_arguments
from cnntrain.config.command_line import Invocation
from cnntrain.errors import MachineError, StoppedError, UserError
from cnntrain.sweep.study import Study
from cnntrain.sweep.sweep_run import run_sweep
from cnntrain.sweep.trial_workers import SweepTarget

QUICK = ("model=mlp", "optimizer.lr=0.01,0.02", "log.figures=false", "log.tensorboard=false")


def asked(*more: str) -> Invocation:
    return parse_arguments(["-m", *QUICK, *more])


def stopped(settings: Any, command_line: str, watch: Any) -> dict[str, Any]:
    raise StoppedError(15, f"stopped by SIGTERM at step 3; the same command with run_dir={settings.run_dir}")


def done(settings: Any, command_line: str, watch: Any) -> dict[str, Any]:
    results = {"best": {"val/top1": settings.optimizer["lr"], "epoch": 1}, "test": None, "steps": 5}
    Path(settings.run_dir, "results.json").write_text(json.dumps(results))
    return results


def judge(settings: Any, command_line: str) -> dict[str, float]:
    return {"test/top1": 0.5}


def command_in(message: str) -> list[str]:
    return shlex.split(message[message.index("cnntrain ") :].partition(" (replace")[0])[1:]


def test_a_stopped_sweep_names_the_command_that_goes_on_with_it() -> None:
    first = asked("run_dir='my sweeps/s'", "resume=none")
    with pytest.raises(StoppedError) as caught:
        run_sweep(first, SweepTarget(stopped, judge))
    assert caught.value.exit_code == 128 + 15
    again = parse_arguments(command_in(str(caught.value)))
    assert again.multirun and again.overrides == (*QUICK, "run_dir='my sweeps/s'", "resume=auto")
    assert run_sweep(again, SweepTarget(done, judge)) == 0
    assert json.loads(Path("my sweeps/s/001-0.02/results.json").read_text())["test"] == {"test/top1": 0.5}


def test_a_lost_storage_is_the_machines_fault_and_can_be_gone_on_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(*_: object) -> None:
        raise StorageInternalError("no connection to postgresql://me:s3cret@host/db")

    monkeypatch.setattr(Study, "record", lost)
    with pytest.raises(MachineError) as caught:
        run_sweep(asked("run_dir=s"), SweepTarget(done, judge))
    assert "s3cret" not in str(caught.value)
    assert command_in(str(caught.value).splitlines()[-1]) == ["-m", *QUICK, "run_dir=s", "resume=auto"]


def test_a_damaged_result_of_the_winner_costs_the_test_figure_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def damaged(settings: Any, command_line: str, watch: Any) -> dict[str, Any]:
        results = done(settings, command_line, watch)
        Path(settings.run_dir, "results.json").write_text("")
        return results

    assert run_sweep(asked("run_dir=s"), SweepTarget(damaged, judge)) == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "results.json" in line]
    assert command_in(said.partition(" rewrites it")[0])[-2:] == ["run_dir=s/001-0.02", "resume=auto"]


@pytest.mark.parametrize("name", ["journal.log", "journal.lock", "sweep.json", "results.csv", "results.md"])
def test_links_in_a_sweeps_folder_are_not_followed(name: str) -> None:
    victim = Path("victim.txt")
    victim.write_text("precious")
    Path("s").mkdir()
    Path("s", name).symlink_to(victim.absolute())
    if name.startswith("results"):  # written anew, and not read
        assert run_sweep(asked("run_dir=s"), SweepTarget(done, judge)) == 0
    else:
        with pytest.raises(UserError, match="is a link"):
            run_sweep(asked("run_dir=s", "resume=auto"), SweepTarget(done, judge))
    assert victim.read_text() == "precious"
