"""The items of benchmarks/gpu, tried on the CPU with tiny sizes and random images."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "benchmarks" / "gpu" / "run.py"
# Left out: what other tests cover at length, and what needs CUDA.
ITEMS = (
    "environment", "digits", "own_gpu_tests", "syncs", "resume_bits", "bench_fmnist_cnn", "group", "two", "across",
    "diverges", "memory", "stores", "auto_batch", "full_gpu", "compiled",
)  # fmt: skip


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A kit with random images instead of Fashion-MNIST."""
    raw = tmp_path / "kit" / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for split, count in (("train", 2400), ("t10k", 200)):
        images = draws.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = draws.integers(0, 10, count, dtype=np.uint8)
        for name, values, kind in (("images-idx3", images, 3), ("labels-idx1", labels, 1)):
            header = bytes([0, 0, 8, kind]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
            (raw / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes(), 1))
    return tmp_path / "kit"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RUN), *map(str, words)], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.mark.slow
def test_items_run_on_a_cpu(kit: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    done = run(
        "--device", "cpu", "--smoke", "--kit", kit, "--out", out, "--budget", 1500, "--patience", 6,
        "--only", ",".join(ITEMS),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    items = {item["item"]: item for item in json.loads((out / "report.json").read_text())["items"]}
    assert items.keys() == set(ITEMS)
    assert items["resume_bits"]["resumed_differs"] == 0
    assert items["syncs"]["each_step"] == 0
    assert items["bench_fmnist_cnn"]["loop"] > 0
    assert len((out / "report.txt").read_text().splitlines()) == len(ITEMS)
    assert (out / "bench-fmnist_cnn-128.json").is_file()


def test_an_item_that_does_not_exist_is_refused() -> None:
    done = run("--only", "digits,no_such_item")
    assert done.returncode == 2
    assert "no_such_item" in done.stderr


def test_items_are_listed_once() -> None:
    names = [line.split()[0] for line in run("--list").stdout.splitlines()]
    assert len(names) == len(set(names)) > 30
    assert set(ITEMS) <= set(names)
