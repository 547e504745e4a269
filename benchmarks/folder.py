"""Time the first epoch, the next launch and later epochs on 50,000 JPEGs, compared with a DataLoader and Pillow.

    python benchmarks/folder.py                       # random images of 32x32 px
    python benchmarks/folder.py --folder DATA/train   # a folder CLASS/IMAGE, for example CIFAR-10's 50,000
    python benchmarks/folder.py --images 4000 --rounds 1      # a smoke run

The network is small (`model=mlp`) because data loading is measured: crop with padding and flip, batch size 128, two
worker processes for the DataLoader. Programs run alternately, each in its own process. Times are medians of whole
processes, including start-up, decoding and validation.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from common import COMMAND, TimedRun, parser_of, run_timed, steady_speeds, write_jpegs

PEER_SCRIPT = Path(__file__).parent / "peers" / "folder_dataloader.py"
PEER_NAME = "DataLoader, Pillow, v2"


@contextmanager
def image_folder(folder: Path | None, count: int) -> Iterator[Path]:
    """Yield the folder CLASS/IMAGE to use: `folder`, or a temporary one with random images."""
    if folder:
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_jpegs(Path(temporary), count)
        yield Path(temporary) / "train"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, help="folder that contains CLASS/IMAGE")
    parser.add_argument("--images", type=int, default=50_000, help="number of random images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4, help="of the runs whose later epochs are compared")
    options = parser.parse_args()
    runs: dict[str, list[TimedRun]] = {}
    speeds: dict[str, list[float]] = {"disk": [], "ram": []}
    with (
        image_folder(options.folder, options.images) as folder,
        tempfile.TemporaryDirectory() as temporary,
    ):
        root = Path(temporary) / "data"
        root.mkdir()
        (root / "train").symlink_to(folder)
        ours = [
            COMMAND,
            "model=mlp",
            "data=image_folder",
            f"data.root={root}",
            "data.size=32",
            "augment=cifar",
            "batch_size=128",
            "data.val_fraction=0.01",
            "log.figures=false",
        ]
        peer = [sys.executable, str(PEER_SCRIPT), "--folder", str(folder)]
        for number in range(options.rounds):
            cache_home, run_dir = Path(temporary) / f"cache{number}", Path(temporary) / f"run{number}"
            commands = {
                "cnntrain, first launch": [*ours, "epochs=1", f"run_dir={run_dir}-first"],
                "cnntrain, next launch": [*ours, "epochs=1", f"run_dir={run_dir}-next"],
                PEER_NAME: [*peer, "--epochs", "1"],
            }
            for name, command in commands.items():
                runs.setdefault(name, []).append(run_timed(command, cache_home))
            for cache, values in speeds.items():
                cache_run = Path(f"{run_dir}-{cache}")
                settings = [f"epochs={options.epochs}", f"data.cache={cache}", f"run_dir={cache_run}"]
                run_timed([*ours, *settings], cache_home)
                values += steady_speeds(cache_run)
            print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
        two_epochs = json.loads(run_timed([*peer, "--epochs", "2"], Path(temporary)).output)
    all_runs = [run for named in runs.values() for run in named]
    print(
        f"{two_epochs['images']:,} JPEGs, one epoch, the whole process; medians of {options.rounds} rounds, "
        f"{sum(run.is_clean for run in all_runs)} of {len(all_runs)} launches on a quiet machine"
    )
    seconds = {name: median(run.seconds for run in named) for name, named in runs.items()}
    for name, value in seconds.items():
        print(f"  {name:<26}{value:>8.1f} s{seconds[PEER_NAME] / value:>8.2f} x as fast as the DataLoader")
    disk, ram = (median(values) for values in speeds.values())
    print(
        f"later epochs: {disk:,.0f} images/s cached on disk, {ram:,.0f} cached in memory, ratio {disk / ram:.3f}; "
        f"the DataLoader's second epoch {two_epochs['images'] / two_epochs['seconds'][1]:,.0f}"
    )


if __name__ == "__main__":
    main()
