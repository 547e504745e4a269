"""How the time of an epoch grows with the number of images and with their area, and start-up with the data set's size.

    python benchmarks/growth.py                         # stand-ins; prints tables
    python benchmarks/growth.py --figure growth.png     # draws them too

Epochs of lenet5 on 6,750, 13,500 and 27,000 images of 28x28; of cifar_resnet on 384 images of 32 to 96 px; the first
step of a training on 12,500, 25,000 and 50,000 files that were decoded before (`data.scan=off`). Settings take turns;
medians of 5, an epoch's without the first of each run.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from fashion import COMMAND, fashion_mnist
from folder import folder_of_jpegs

IMAGES = (6_750, 13_500, 27_000)
SIDES = (32, 48, 64, 96)
FILES = (12_500, 25_000, 50_000)


def run(folder: Path, *overrides: str) -> float:
    """Seconds of the whole process."""
    started = time.perf_counter()
    command = [str(COMMAND), "log.figures=false", "checkpoint.keep=0", f"run_dir={folder}", *overrides]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder.parent / "cache")}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return time.perf_counter() - started


def epoch_seconds(folder: Path, images: int, *overrides: str) -> float:
    """Seconds of training an epoch: the median of all but the first."""
    run(folder, *overrides)
    with (folder / "metrics.csv").open(newline="") as file:
        speeds = [float(row["images_per_s"]) for row in csv.DictReader(file)]
    return images / statistics.median(speeds[1:])


def show(title: str, unit: str, found: Mapping[int, list[float]], power: int) -> dict[int, float]:
    """Medians, printed with their time per unit of work, the first one's being 1: medians of what rounds say of it, for
    the speed of a machine that others share changes less within a round than between rounds."""
    medians = {work: statistics.median(taken) for work, taken in found.items()}
    smallest = min(medians)
    print(f"\n{title}")
    print(f"  {unit:>8}{'s':>9}{'x the work':>12}{'x the time':>12}{'time / work':>13}")
    for work, median in medians.items():
        more = (work / smallest) ** power
        longer = statistics.median(t / s for t, s in zip(found[work], found[smallest], strict=True))
        print(f"  {work:>8,}{median:>9.2f}{more:>12.2f}{longer:>12.2f}{longer / more:>13.3f}")
    return medians


def draw(tables: Mapping[str, tuple[str, Mapping[int, float], bool]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((11, 3.4), layout="constrained")
    for axes, (title, (label, medians, proportional)) in zip(
        figure.subplots(1, len(tables)), tables.items(), strict=True
    ):
        works, taken = list(medians), list(medians.values())
        axes.plot(works, taken, "o-")
        if proportional:
            axes.plot([0, works[-1]], [0, taken[-1]], ":", color="gray", label="proportional")
            axes.legend(frameon=False)
        axes.set(title=title, xlabel=label, ylabel="seconds", xlim=(0, None), ylim=(0, 1.1 * max(taken)))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a hundredth of the work")
    options = parser.parse_args()
    part, rounds = (100, 1) if options.smoke else (1, options.rounds)
    images, files = ([count // part for count in counts] for counts in (IMAGES, FILES))
    by_images: dict[int, list[float]] = {count: [] for count in images}
    by_side: dict[int, list[float]] = {side: [] for side in SIDES}
    by_files: dict[int, list[float]] = {count: [] for count in files}
    with ExitStack() as stack:
        there = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fashion = stack.enter_context(fashion_mnist(None))
        roots = {count: stack.enter_context(folder_of_jpegs(None, count)).parent for count in files}

        def step(count: int, name: str) -> float:
            return run(
                there / name,
                "model=mlp",
                "data=image_folder",
                f"data.root={roots[count]}",
                "data.size=32",
                "data.scan=off",
                "data.mean=[0.5,0.5,0.5]",
                "data.std=[0.25,0.25,0.25]",
                "steps=1",
                "limit_batches=1",
            )

        for count in files:  # what has been decoded is kept
            step(count, f"warm-{count}")
        for number in range(rounds):
            for count in files:
                by_files[count].append(step(count, f"files-{count}-{number}"))
            for count in images:
                by_images[count].append(
                    epoch_seconds(
                        there / f"images-{count}-{number}",
                        count,
                        "model=lenet5",
                        "data=fashion_mnist",
                        f"data.root={fashion}",
                        f"data.limit={count * 10 // 9}",
                        "epochs=3",
                        "augment=none",
                    )
                )
            for side in SIDES:
                by_side[side].append(
                    epoch_seconds(
                        there / f"side-{side}-{number}",
                        384,
                        "model=cifar_resnet",
                        "data=image_folder",
                        f"data.root={roots[files[0]]}",
                        "data.limit=480",
                        f"data.size={side}",
                        "epochs=3",
                        "augment=none",
                        "batch_size=128",
                        "limit_batches=3",
                    )
                )
            print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    tables = {
        "an epoch, by images": (
            "images of 28x28 px",
            show("an epoch of lenet5 by images", "images", by_images, 1),
            True,
        ),
        "an epoch, by area": (
            "pixels of an image",
            {side**2: s for side, s in show("an epoch of cifar_resnet by side", "px", by_side, 2).items()},
            True,
        ),
        "one step, by files": (
            "files",
            show("launch, one step and validation by files", "files", by_files, 1),
            False,
        ),
    }
    if options.figure:
        draw(tables, options.figure)


if __name__ == "__main__":
    main()
