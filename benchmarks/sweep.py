"""What a sweep costs beside its trainings run one by one, and what TPE finds in a third of a grid's trainings.

    python benchmarks/sweep.py cost             # 12 trainings alone, then as a sweep with one job and with two
    python benchmarks/sweep.py search           # a grid of 48 settings, then TPE, 16 trials, median pruning, 5 seeds
    python benchmarks/sweep.py cost --epochs 1 --limit 100      # a smoke run; `search` takes the same

Everything is the command `cnntrain` in processes of its own, on digits, start-up included, one thread a training, no
pictures; one job runs on one core, two jobs on two.
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

COMMAND = shutil.which("cnntrain", path=os.path.dirname(sys.executable)) or "cnntrain"
COST_SPACE = ("model=lenet5,fmnist_cnn", "optimizer.lr=0.01,0.1")
SEEDS = 3
SEARCH_SPACE = (
    "model=lenet5,mlp",
    "optimizer.lr=0.0003,0.001,0.003,0.01",
    "batch_size=32,64,128",
    "augment=none,digits",
)
GRID, DRAWN = 48, 16


def cnntrain(*arguments: str, cores: int = 1) -> float:
    """Seconds that the command takes on so many cores."""
    mine = sorted(os.sched_getaffinity(0))[:cores]
    started = time.perf_counter()
    subprocess.run(
        [COMMAND, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, mine),
    )
    return time.perf_counter() - started


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cost(fixed: list[str], folder: Path) -> None:
    """A sweep beside the sum of its trainings."""
    swept = ["-m", *COST_SPACE, f"sweep.seeds={SEEDS}", *fixed]
    one = cnntrain(*swept, f"run_dir={folder / 'one'}")
    two = cnntrain(*swept, "sweep.jobs=2", f"run_dir={folder / 'two'}", cores=2)
    alone, keys = 0.0, [axis.split("=")[0] for axis in COST_SPACE]
    for row in rows(folder / "one"):
        values = [f"{key}={row[key]}" for key in (*keys, "seed")]
        alone += cnntrain(*values, *fixed, f"run_dir={folder / 'alone' / row['trial'] / row['seed']}")
    inside = sum(float(row["time_s"]) for row in rows(folder / "one"))
    equal = [r["val/loss"] for r in rows(folder / "one")] == [r["val/loss"] for r in rows(folder / "two")]
    print(f"{len(rows(folder / 'one'))} trainings alone, one after the other: {alone:.1f} s")
    print(f"the sweep, one job on one core:   {one:.1f} s, {one / alone:.2f} x (asked: below 1.1 x)")
    print(f"the sweep, two jobs on two cores: {two:.1f} s, {two / alone:.2f} x (asked: below 0.6 x)")
    print(
        f"the sum of the trainings inside the sweep, without any start-up: {inside:.1f} s; one job takes "
        f"{one / inside:.2f} x, two take {two / inside:.2f} x of that"
    )
    print(f"both sweeps have the same losses: {equal}")


def search(fixed: list[str], folder: Path) -> None:
    """TPE's best setting beside the grid's, both trained again with other seeds, on validation data."""
    common = ["-m", *fixed, "sweep.jobs=2"]
    taken = cnntrain(*common, *SEARCH_SPACE, f"run_dir={folder / 'grid'}", cores=2)
    found = sorted(rows(folder / "grid"), key=lambda row: -float(row["val/top1"]))
    assert len(found) == GRID
    wanted = seeds_of(found[0], common, folder / "best")
    print(f"grid: {GRID} trainings, {taken:.0f} s; best {wanted}")
    reached = []
    for seed in range(5):
        name = folder / f"tpe{seed}"
        drawn = ["sweep.sampler=tpe", f"sweep.trials={DRAWN}", "sweep.pruner=median", f"sweep.seed={seed}"]
        taken = cnntrain(*common, *SEARCH_SPACE, *drawn, f"run_dir={name}", cores=2)
        done = sorted((row for row in rows(name) if row["status"] == "done"), key=lambda row: -float(row["val/top1"]))
        reached.append(seeds_of(done[0], common, folder / f"best{seed}"))
        print(
            f"tpe, sweep.seed={seed}: {len(rows(name))} trainings, {len(rows(name)) - len(done)} of them pruned, "
            f"{taken:.0f} s; best {reached[-1]}"
        )
    median = statistics.median(found.mean for found in reached)
    print(
        f"median over TPE's 5 seeds of the chosen setting's mean: {median:.4f}, {wanted.mean - median:.4f} short of "
        f"the grid's choice (asked: at most its standard deviation, {wanted.deviation:.4f})"
    )


class Chosen(NamedTuple):
    """A setting, what it came to in the sweep, and over seeds: the best of many single trainings is a lucky one."""

    setting: str
    once: float
    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.setting}: {self.once:.4f}, over 10 seeds {self.mean:.4f} ± {self.deviation:.4f}"


def seeds_of(row: dict[str, str], common: list[str], folder: Path) -> Chosen:
    """A sweep's best setting trained again with ten other seeds."""
    setting = [f"{key}={row[key]}" for key in (axis.split("=")[0] for axis in SEARCH_SPACE)]
    cnntrain(*common, *setting, "seed=range(1,11)", f"run_dir={folder}", cores=2)
    values = [float(row["val/top1"]) for row in rows(folder)]
    return Chosen(" ".join(setting), float(row["val/top1"]), statistics.fmean(values), statistics.stdev(values))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "search"])
    parser.add_argument("--epochs", type=int, help="null: 20 for cost, 6 for search")
    parser.add_argument("--limit", default="null", help="images of each split")
    chosen = parser.parse_args()
    epochs = chosen.epochs or {"cost": 20, "search": 6}[chosen.what]
    asked = [
        f"epochs={epochs}",
        f"data.limit={chosen.limit}",
        "data=digits",
        "threads=1",
        "log.figures=false",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        {"cost": cost, "search": search}[chosen.what](asked, Path(temporary))
