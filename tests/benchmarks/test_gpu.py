"""The items of benchmarks/gpu run on the CPU with tiny sizes and random images."""

import argparse
import contextlib
import gzip
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnntrain.cli import check_early, parse_arguments
from cnntrain.config.compose import compose
from cnntrain.config.schema import conf_folder

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "benchmarks" / "gpu" / "run.py"
# Items with code of their own; the others are single commands, checked by `test_the_settings_of_every_command_exist`.
ITEMS = ("environment", "resume_bits", "bench_fmnist_cnn")
MORE_ITEMS = ("own_gpu_tests", "syncs", "group", "two", "memory")


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """Create a kit with random images instead of Fashion-MNIST."""
    raw = tmp_path / "kit" / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in (("train", 2400), ("t10k", 200)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        for name, values, kind in (("images-idx3", images, 3), ("labels-idx1", labels, 1)):
            header = bytes([0, 0, 8, kind]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
            (raw / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes(), 1))
    return tmp_path / "kit"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RUN), *map(str, words)], capture_output=True, text=True, cwd=ROOT, check=False
    )


def run_items(names: tuple[str, ...], kit: Path, out: Path) -> dict[str, dict[str, Any]]:
    options = "--device cpu --smoke --budget 1500 --patience 6".split()
    done = run(*options, "--kit", kit, "--out", out, "--only", ",".join(names))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert len((out / "report.txt").read_text().splitlines()) == len(names)
    items = {item["item"]: item for item in json.loads((out / "report.json").read_text())["items"]}
    assert items.keys() == set(names)
    return items


@pytest.mark.long
def test_more_items_run_on_a_cpu(kit: Path, tmp_path: Path) -> None:
    items = run_items(MORE_ITEMS, kit, tmp_path / "report")
    assert items["syncs"]["each_step"] == 0


@pytest.mark.slow
def test_items_run_on_a_cpu(kit: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    items = run_items(ITEMS, kit, out)
    assert items["resume_bits"]["resumed_differs"] == 0
    assert items["bench_fmnist_cnn"]["loop"] > 0
    assert (out / "bench-fmnist_cnn-128.json").is_file()


class ProcessRefused(Exception):
    pass


def refuse_process(*_: object, **__: object) -> None:
    raise ProcessRefused


@pytest.mark.parametrize("smoke", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "smoke"])
def test_the_settings_of_every_command_exist(smoke: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most items run on a GPU only, so this test finds keys that were renamed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(RUN.parent))
    for name in ("harness", "items", "probes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    harness_module, items = importlib.import_module("harness"), importlib.import_module("items")
    probes = importlib.import_module("probes")
    commands: list[list[str]] = []

    class Recorder(harness_module.Harness):
        def call(self, command: list[str], *_: object, **__: object) -> tuple[int, float, str]:
            if command[1:3] == ["-m", "cnntrain"]:
                commands.append(list(map(str, command[3:])))
            return 1, 0.0, ""

    recorder = Recorder("cuda", smoke, str(tmp_path / "out"), str(tmp_path / "kit"), 100, 1)
    for folder in ("faces", "camvid"):
        recorder.data(folder).mkdir(parents=True)
    monkeypatch.setattr(items.subprocess, "Popen", refuse_process)
    for item in (item for stage in items.STAGES for item in stage):
        with contextlib.suppress(ProcessRefused, OSError, LookupError):
            item(recorder)
    arguments = argparse.Namespace(device="cuda", data="data", smoke=smoke)
    commands += probes._sync_cases(arguments).values()
    assert len(commands) > 25
    for command in commands:
        invocation = parse_arguments(command)
        if (conf_folder() / f"{invocation.command}.yaml").exists():
            compose(invocation.command, invocation.overrides)
        else:
            check_early(invocation.command, invocation.overrides, None)
        assert not invocation.multirun or invocation.command in ("train", "overfit", "inspect")


def test_an_unknown_item_is_refused() -> None:
    done = run("--only", "digits,no_such_item")
    assert done.returncode == 2
    assert "no_such_item" in done.stderr


def test_items_are_listed_once() -> None:
    names = [line.split()[0] for line in run("--list").stdout.splitlines()]
    assert len(names) == len(set(names)) > 30
    assert {*ITEMS, *MORE_ITEMS} <= set(names)
