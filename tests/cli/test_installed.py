"""The installed command, run as a subprocess."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = shutil.which("cnntrain", path=os.path.dirname(sys.executable)) or shutil.which("cnntrain")
QUICK = ("epochs=1", "data.limit=200", "threads=1")


def cnntrain(*arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    assert COMMAND, "the package is not installed: pip install -e ."
    done = subprocess.run(
        [COMMAND, *arguments], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_writes_its_results_and_can_be_evaluated() -> None:
    cnntrain(*QUICK, "run_dir=run")
    run = Path("run")
    results = json.loads((run / "results.json").read_text())
    assert {"parameters", "epochs", "steps", "wall_s", "images_per_s", "best", "test"} <= set(results)
    assert results["parameters"] == 131_080 and results["best"]["epoch"] == 1
    assert 0 <= results["best"]["val/top1"] <= 1 and 0 <= results["test"]["test/top1"] <= 1
    metadata = json.loads((run / "run.json").read_text())
    assert metadata["command"].startswith("cnntrain epochs=1 data.limit=200") and "torch" in metadata["versions"]
    assert "lr:" in (run / "config.yaml").read_text()
    assert len(read_csv(run / "metrics.csv")) == 1
    for name in ("curves", "confusion_matrix", "first_batch", "mistakes", "filters"):
        assert (run / "figures" / f"{name}.png").stat().st_size > 1000

    cnntrain("evaluate", "checkpoint=run", "split=test")
    evaluated = json.loads((run / "evaluate-test" / "results.json").read_text())
    assert {name: evaluated[name] for name in results["test"]} == pytest.approx(results["test"])
    rows = read_csv(run / "evaluate-test" / "examples.csv")
    losses = [float(row["loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True) and sum(losses) / len(losses) == pytest.approx(evaluated["test/loss"])
    assert {"name", "true", "predicted", "probability"} <= set(rows[0])


@pytest.mark.slow
def test_a_sweep_writes_and_prints_a_table() -> None:
    done = cnntrain("-m", "model=lenet5,mlp", "optimizer.lr=0.1,0.01", *QUICK, "log.figures=false", "run_dir=sweep")
    rows = read_csv(Path("sweep/results.csv"))
    assert [(row["model"], row["optimizer.lr"], row["status"]) for row in rows] == [
        ("lenet5", "0.1", "done"),
        ("lenet5", "0.01", "done"),
        ("mlp", "0.1", "done"),
        ("mlp", "0.01", "done"),
    ]
    assert all(0 <= float(row["val/top1"]) <= 1 and float(row["time_s"]) > 0 for row in rows)
    assert "val/top1" in done.stdout


@pytest.mark.slow
def test_a_diverged_trial_is_reported_and_the_sweep_continues() -> None:
    done = cnntrain("-m", "optimizer=sgd", "optimizer.lr=1e30,0.01", *QUICK, "log.figures=false", "run_dir=s")
    assert [row["status"] for row in read_csv(Path("s/results.csv"))] == ["diverged", "done"]
    assert "error: optimizer.lr=1e+30: diverged: " in done.stderr


def test_invalid_input_prints_one_message_and_writes_no_files() -> None:
    done = cnntrain("modle=mlp", code=2)
    assert done.stderr == "error: modle: no such key; did you mean 'model'?\n"
    done = cnntrain("data=mnist", "data.root=nowhere", code=2)
    assert "data=digits" in done.stderr and "Traceback" not in done.stderr
    assert not list(Path.cwd().rglob("results.json"))
    assert "Traceback" in cnntrain("modle=mlp", code=1, HYDRA_FULL_ERROR="1").stderr


def test_unwritable_output_exits_with_4() -> None:
    assert COMMAND
    with open("/dev/full", "w") as full:
        done = subprocess.run([COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 4 and "Traceback" not in done.stderr


def test_python_m_and_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cnntrain", "overfit", "--help"], capture_output=True, text=True, check=True
    )
    assert "one training example" in done.stdout
    text = cnntrain("--help").stdout
    assert all(word in text for word in ("resnet18", "fashion_mnist", "one_cycle", "evaluate", "optimizer"))


def test_bash_completion() -> None:
    assert COMMAND
    script = """eval "$(cnntrain --completion)"
    COMP_LINE='cnntrain over'; COMP_POINT=${#COMP_LINE}; COMP_WORDS=(cnntrain over); COMP_CWORD=1
    _cnntrain; echo "${COMPREPLY[@]}"
    COMP_LINE='cnntrain model=resnet1'; COMP_POINT=${#COMP_LINE}; COMP_WORDS=(cnntrain model=resnet1)
    _cnntrain; echo "${COMPREPLY[@]}" """
    path = os.pathsep.join([os.path.dirname(COMMAND), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    first, second = done.stdout.splitlines()
    assert first.split() == ["overfit"]
    assert {"model=resnet18", "model=resnet101", "model=resnet152"} <= set(second.split())


@pytest.mark.slow
def test_a_custom_network_needs_one_python_file_and_one_yaml_file(tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "mynets.py").write_text(
        "from torch import nn\n"
        "class Tiny(nn.Sequential):\n"
        "    def __init__(self, in_channels, num_outputs, image_size, width):\n"
        "        height, breadth = image_size\n"
        "        super().__init__(nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(), nn.Flatten(),\n"
        "                         nn.Linear(width * height * breadth, num_outputs))\n"
    )
    (tmp_path / "mine" / "model" / "tiny.yaml").write_text("_target_: mynets.Tiny\nwidth: 8  # channels\n")
    cnntrain("--config-dir", "mine", "model=tiny", *QUICK, "log.figures=false", "run_dir=r")
    assert json.loads(Path("r/results.json").read_text())["parameters"] == 8 * 9 + 8 + 8 * 64 * 10 + 10


@pytest.mark.slow
def test_the_default_run_reaches_95_percent() -> None:
    cnntrain("run_dir=run", "threads=1")
    assert json.loads(Path("run/results.json").read_text())["best"]["val/top1"] >= 0.95
