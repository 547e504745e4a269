"""Measure the overhead of a sweep, and compare TPE with a grid of three times as many trials.

    python benchmarks/sweep.py cost             # 12 single trainings, then as a sweep with one job and with two
    python benchmarks/sweep.py search           # a grid of 48 settings; TPE with 16 trials, median pruning, 5 seeds
    python benchmarks/sweep.py cost --epochs 1 --limit 100      # a smoke run; `search` has the same options

Everything runs the command `cnntrain` on digits in separate processes, including start-up, with one thread per training
and without figures. One job runs on one core, two jobs on two.
"""

import argparse
import csv
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from common import COMMAND

COST_SPACE = ("model=lenet5,fmnist_cnn", "optimizer.lr=0.01,0.1")
SEEDS = 3
SEARCH_SPACE = (
    "model=lenet5,mlp",
    "optimizer.lr=0.0003,0.001,0.003,0.01",
    "batch_size=32,64,128",
    "augment=none,digits",
)
GRID_TRIALS, TPE_TRIALS = 48, 16
Row = dict[str, str]


def run_seconds(*arguments: str, cores: int = 1) -> float:
    """Run `cnntrain` on a number of cores and return its seconds."""
    affinity = sorted(os.sched_getaffinity(0))[:cores]
    started = time.perf_counter()
    subprocess.run(
        [COMMAND, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, affinity),
    )
    return time.perf_counter() - started


def read_results(sweep: Path) -> list[Row]:
    with (sweep / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def setting_of(row: Row, space: tuple[str, ...]) -> list[str]:
    """Return the overrides of a row for the keys of a search space."""
    keys = [dimension.partition("=")[0] for dimension in space]
    return [f"{key}={row[key]}" for key in keys]


def cost(settings: list[str], folder: Path) -> None:
    """Compare sweeps with one and two jobs with the sum of their trainings, each run as its own command."""
    sweep = ["-m", *COST_SPACE, f"sweep.seeds={SEEDS}", *settings]
    one_s = run_seconds(*sweep, f"run_dir={folder / 'one'}")
    two_s = run_seconds(*sweep, "sweep.jobs=2", f"run_dir={folder / 'two'}", cores=2)
    rows = read_results(folder / "one")
    single_s = sum(
        run_seconds(
            *setting_of(row, (*COST_SPACE, "seed")),
            *settings,
            f"run_dir={folder / 'single' / row['trial'] / row['seed']}",
        )
        for row in rows
    )
    training_s = sum(float(row["time_s"]) for row in rows)
    equal = [r["val/loss"] for r in rows] == [r["val/loss"] for r in read_results(folder / "two")]
    print(f"{len(rows)} single trainings, one after the other: {single_s:.1f} s")
    print(f"sweep, one job on one core:   {one_s:.1f} s, {one_s / single_s:.2f} x (target: below 1.1 x)")
    print(f"sweep, two jobs on two cores: {two_s:.1f} s, {two_s / single_s:.2f} x (target: below 0.6 x)")
    print(
        f"sum of the trainings within the sweep, without start-up: {training_s:.1f} s; one job takes "
        f"{one_s / training_s:.2f} x, two jobs take {two_s / training_s:.2f} x of that"
    )
    print(f"both sweeps have the same losses: {equal}")


def search(settings: list[str], folder: Path) -> None:
    """Compare the best setting found by TPE with that of the grid, both retrained with other seeds."""
    common = ["-m", *settings, "sweep.jobs=2"]
    seconds = run_seconds(*common, *SEARCH_SPACE, f"run_dir={folder / 'grid'}", cores=2)
    rows = sorted_by_metric(read_results(folder / "grid"))
    assert len(rows) == GRID_TRIALS
    grid = retrain(rows[0], common, folder / "best")
    print(f"grid: {GRID_TRIALS} trainings, {seconds:.0f} s; best {grid}")
    means = []
    for seed in range(5):
        sweep = folder / f"tpe{seed}"
        sampler = ["sweep.sampler=tpe", f"sweep.trials={TPE_TRIALS}", "sweep.pruner=median", f"sweep.seed={seed}"]
        seconds = run_seconds(*common, *SEARCH_SPACE, *sampler, f"run_dir={sweep}", cores=2)
        rows = read_results(sweep)
        finished = sorted_by_metric([row for row in rows if row["status"] == "done"])
        best = retrain(finished[0], common, folder / f"best{seed}")
        means.append(best.mean)
        print(
            f"tpe, sweep.seed={seed}: {len(rows)} trainings, {len(rows) - len(finished)} of them pruned, "
            f"{seconds:.0f} s; best {best}"
        )
    median = statistics.median(means)
    print(
        f"median over TPE's 5 seeds of the best setting's mean: {median:.4f}, {grid.mean - median:.4f} below that "
        f"of the grid (target: at most its standard deviation, {grid.std:.4f})"
    )


def sorted_by_metric(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -float(row["val/top1"]))


class BestSetting(NamedTuple):
    """The best setting of a sweep.

    Attributes:
        in_sweep: its metric in the sweep, which is biased: it is the maximum of many single trainings.
        mean, std: its metric over ten other seeds.
    """

    setting: str
    in_sweep: float
    mean: float
    std: float

    def __str__(self) -> str:
        return f"{self.setting}: {self.in_sweep:.4f}, over 10 seeds {self.mean:.4f} ± {self.std:.4f}"


def retrain(row: Row, common: list[str], folder: Path) -> BestSetting:
    """Train the setting of a row with ten other seeds."""
    setting = setting_of(row, SEARCH_SPACE)
    run_seconds(*common, *setting, "seed=range(1,11)", f"run_dir={folder}", cores=2)
    values = [float(result["val/top1"]) for result in read_results(folder)]
    return BestSetting(" ".join(setting), float(row["val/top1"]), statistics.fmean(values), statistics.stdev(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "search"])
    parser.add_argument("--epochs", type=int, help="default: 20 for cost, 6 for search")
    parser.add_argument("--limit", default="null", help="images of each split")
    options = parser.parse_args()
    benchmark, epochs = {"cost": (cost, 20), "search": (search, 6)}[options.what]
    settings = [
        f"epochs={options.epochs or epochs}",
        f"data.limit={options.limit}",
        "data=digits",
        "threads=1",
        "log.figures=false",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        benchmark(settings, Path(temporary))


if __name__ == "__main__":
    main()
