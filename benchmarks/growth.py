"""Measure how the time of an epoch grows with the number and area of images, and start-up with the size of a dataset.

    python benchmarks/growth.py                         # random images; prints tables
    python benchmarks/growth.py --figure growth.png     # also plots them

Epochs of lenet5 on 6,750, 13,500 and 27,000 images of 28x28; of cifar_resnet on 384 images of 32 to 96 px; the first
step of a training on 12,500, 25,000 and 50,000 files with cached images (`data.scan=off`). Settings run alternately.
Times are medians of 5 rounds; the first epoch of each run is excluded.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from common import COMMAND, fashion_mnist, parser_of, run_timed, steady_speeds, write_jpegs

IMAGES = (6_750, 13_500, 27_000)
SIDES = (32, 48, 64, 96)
FILES = (12_500, 25_000, 50_000)


def run_seconds(run_dir: Path, *overrides: str) -> float:
    """Return the seconds of a whole process."""
    command = [COMMAND, "log.figures=false", "checkpoint.keep=0", f"run_dir={run_dir}", *overrides]
    return run_timed(command, run_dir.parent / "cache").seconds


def epoch_seconds(run_dir: Path, images: int, *overrides: str) -> float:
    """Return the median seconds of an epoch's training, without the first epoch."""
    run_seconds(run_dir, "epochs=3", "augment=none", *overrides)
    return images / median(steady_speeds(run_dir))


def print_table(title: str, unit: str, seconds: Mapping[int, list[float]], power: int) -> dict[int, float]:
    """Print and return the medians by size; the work of a size is its ratio to the smallest, to the power of `power`.

    The growth of the time is the median of the ratios within each round, because the speed of a shared machine changes
    less within a round than between rounds.
    """
    medians = {size: median(values) for size, values in seconds.items()}
    smallest = min(medians)
    print(f"\n{title}")
    print(f"  {unit:>8}{'s':>9}{'x the work':>12}{'x the time':>12}{'time / work':>13}")
    for size, value in medians.items():
        work = (size / smallest) ** power
        growth = median(s / t for s, t in zip(seconds[size], seconds[smallest], strict=True))
        print(f"  {size:>8,}{value:>9.2f}{work:>12.2f}{growth:>12.2f}{growth / work:>13.3f}")
    return medians


def plot(tables: Mapping[str, tuple[str, Mapping[int, float], bool]], path: Path) -> None:
    """Plot tables (title -> x label, medians by size, whether to draw proportional growth)."""
    from matplotlib.figure import Figure

    figure = Figure((11, 3.4), layout="constrained")
    for axes, (title, (label, medians, proportional)) in zip(
        figure.subplots(1, len(tables)), tables.items(), strict=True
    ):
        sizes, seconds = list(medians), list(medians.values())
        axes.plot(sizes, seconds, "o-")
        if proportional:
            axes.plot([0, sizes[-1]], [0, seconds[-1]], ":", color="gray", label="proportional")
            axes.legend(frameon=False)
        axes.set(title=title, xlabel=label, ylabel="seconds", xlim=(0, None), ylim=(0, 1.1 * max(seconds)))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="one round with a hundredth of the images")
    options = parser.parse_args()
    divisor, rounds = (100, 1) if options.smoke else (1, options.rounds)
    images, files = ([count // divisor for count in counts] for counts in (IMAGES, FILES))
    by_images: dict[int, list[float]] = {count: [] for count in images}
    by_side: dict[int, list[float]] = {side: [] for side in SIDES}
    by_files: dict[int, list[float]] = {count: [] for count in files}
    with tempfile.TemporaryDirectory() as temporary, fashion_mnist(None) as fashion_root:
        folder = Path(temporary)
        for count in files:
            write_jpegs(folder / f"jpegs-{count}", count)

        def first_step_seconds(count: int, name: str) -> float:
            return run_seconds(
                folder / name,
                "model=mlp",
                "data=image_folder",
                f"data.root={folder / f'jpegs-{count}'}",
                "data.size=32",
                "data.scan=off",
                "data.mean=[0.5,0.5,0.5]",
                "data.std=[0.25,0.25,0.25]",
                "steps=1",
                "limit_batches=1",
            )

        for count in files:  # fill the cache
            first_step_seconds(count, f"warm-{count}")
        for number in range(rounds):
            for count in files:
                by_files[count].append(first_step_seconds(count, f"files-{count}-{number}"))
            for count in images:
                fashion = ("data=fashion_mnist", f"data.root={fashion_root}", f"data.limit={count * 10 // 9}")
                by_images[count].append(
                    epoch_seconds(folder / f"images-{count}-{number}", count, "model=lenet5", *fashion)
                )
            for side in SIDES:
                jpegs = ("data=image_folder", f"data.root={folder / f'jpegs-{files[0]}'}", "data.limit=480")
                size = (f"data.size={side}", "batch_size=128", "limit_batches=3")
                by_side[side].append(
                    epoch_seconds(folder / f"side-{side}-{number}", 384, "model=cifar_resnet", *jpegs, *size)
                )
            print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    image_medians = print_table("an epoch of lenet5 by images", "images", by_images, 1)
    side_medians = print_table("an epoch of cifar_resnet by side", "px", by_side, 2)
    file_medians = print_table("launch, one step and validation by files", "files", by_files, 1)
    if options.figure:
        area_medians = {side**2: seconds for side, seconds in side_medians.items()}
        tables = {
            "an epoch, by images": ("images of 28x28 px", image_medians, True),
            "an epoch, by area": ("pixels of an image", area_medians, True),
            "one step, by files": ("files", file_medians, False),
        }
        plot(tables, options.figure)


if __name__ == "__main__":
    main()
