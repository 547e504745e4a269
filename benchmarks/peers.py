"""Images/s of `cnntrain` beside others: a plain DataLoader loop, Lightning, Keras on torch, fastai.

    pip install lightning keras fastai                 # optional; a missing one is skipped, and said
    python benchmarks/peers.py                         # both networks; a stand-in for Fashion-MNIST
    python benchmarks/peers.py --root DATA --models lenet5 --rounds 1 --images 2560
    python benchmarks/peers.py --python OTHER/bin/python   # where the peers are installed apart from cnntrain

Each peer is one script in benchmarks/peers/, written as its users would write it: the same network, data, batch of 128
and optimizer, no augmentation. Every run is a process of its own; they take turns, and a round has one of each. A run's
figure is that of its steady state: the median of its epochs but the first. Runs during which another process took CPU
time do not count while there are clean ones. Tables: cnntrain as it comes against the peers as they come (fp32), then
at equal precision and layout: fp32 with NCHW, and with NHWC in bf16 where the machine computes in it, else in fp32.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fashion import COMMAND, add_root, fashion_mnist

from cnntrain.benchmark.measurement import TimingWindows, other_cores, read_cpu_times
from cnntrain.train.device import choose_compute

SCRIPTS = Path(__file__).parent / "peers"
PEERS = {"dataloader": "torch", "lightning_peer": "lightning", "keras_peer": "keras", "fastai_peer": "fastai"}
# bf16 where this machine computes in it; the peers are not written for fp16.
FAST = "bf16" if choose_compute("auto", "auto", channels_last=True).precision == "bf16" else "fp32"
LAYOUTS = {
    "fp32": ([], ["precision=fp32", "channels_last=false"]),
    f"{FAST}, channels_last": (
        ["--precision", FAST, "--channels-last"],
        [f"precision={FAST}", "channels_last=true"],
    ),
}
DEFAULTS = "as they come"


class Runs:
    """The figures of every program and setting, by (program, setting)."""

    def __init__(self) -> None:
        self.windows: dict[tuple[str, str], TimingWindows] = {}
        self.reasons: dict[tuple[str, str], str] = {}

    def take(self, name: str, layout: str, command: list[str], folder: Path | None = None) -> None:
        """Run one; `folder` is the run folder of a cnntrain."""
        if (name, layout) in self.reasons:
            return
        before = read_cpu_times()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        others = other_cores(before, read_cpu_times())
        if done.returncode:
            self.reasons[name, layout] = (done.stderr.strip() or "failed").splitlines()[-1]
            return
        speed = read_metrics(folder) if folder else json.loads(done.stdout.splitlines()[-1])["images_per_s"]
        self.windows.setdefault((name, layout), TimingWindows()).add(1, 1 / speed, others)


def read_metrics(folder: Path) -> float:
    """Images/s of a run's steady state: the median of its epochs but the first."""
    with (folder / "metrics.csv").open() as file:
        return statistics.median([float(row["images_per_s"]) for row in csv.DictReader(file)][1:])


def measure(model: str, root: Path, options: argparse.Namespace, installed: list[str]) -> Runs:
    runs = Runs()
    threads = options.threads
    for number in range(options.rounds):
        for layout, (flags, overrides) in {DEFAULTS: ([], []), **LAYOUTS}.items():
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                command = [
                    str(COMMAND),
                    f"model={model}",
                    "data=fashion_mnist",
                    f"data.root={root}",
                    "augment=none",
                    "batch_size=128",
                    "optimizer.lr=1e-3",
                    f"epochs={options.epochs}",
                    f"run_dir={run}",
                    f"limit_batches={options.images // 128}",
                    *overrides,
                    *([f"threads={threads}"] if threads else []),
                ]
                runs.take("cnntrain", layout, command, run)
            if layout == DEFAULTS:
                continue
            for peer in installed:
                script = str(SCRIPTS / f"{peer}.py")
                command = [
                    options.python,
                    script,
                    "--root",
                    str(root),
                    "--model",
                    model,
                    "--epochs",
                    str(options.epochs),
                    "--limit",
                    str(options.images),
                    *flags,
                    *(["--threads", str(threads)] if threads else []),
                ]
                runs.take(peer, layout, command)
        print(f"{model}: round {number + 1} of {options.rounds} done", file=sys.stderr)
    return runs


def show(model: str, runs: Runs, ours_in: str, theirs_in: str, title: str) -> None:
    """One table: cnntrain in one setting against the peers in theirs."""
    ours = runs.windows.get(("cnntrain", ours_in))
    if ours is None:
        print(f"\n{model}, {title}: cnntrain failed: {runs.reasons['cnntrain', ours_in]}")
        return
    print(f"\n{model}, {title}")
    print(f"  {'':<14}{'images/s':>10}{'cnntrain is':>13}   clean runs")
    print(f"  {'cnntrain':<14}{ours.images_per_s:>10,.0f}{'':>13}   {len(ours.clean)} of {len(ours.others)}")
    for peer in PEERS:
        name, windows = peer.removesuffix("_peer"), runs.windows.get((peer, theirs_in))
        if windows is None:
            print(f"  {name:<14}{runs.reasons.get((peer, theirs_in), 'skipped: not installed')}")
            continue
        ratio = f"{ours.images_per_s / windows.images_per_s:.2f} x"
        clean = f"{len(windows.clean)} of {len(windows.other_cores)}"
        print(f"  {name:<14}{windows.images_per_s:>10,.0f}{ratio:>13}   {clean}")


def is_installed(python: str, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_root(parser)
    parser.add_argument("--models", nargs="+", default=["fmnist_cnn", "lenet5"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="of a run; the first one does not count")
    parser.add_argument("--images", type=int, default=12_800, help="training images of an epoch")
    parser.add_argument("--threads", type=int, help="CPU threads of every run")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the peers")
    options = parser.parse_args()
    installed = [peer for peer, module in PEERS.items() if is_installed(options.python, module)]
    with fashion_mnist(options.root) as root:
        for model in options.models:
            runs = measure(model, root, options, installed)
            show(model, runs, DEFAULTS, "fp32", DEFAULTS)
            for layout in LAYOUTS:
                show(model, runs, layout, layout, f"all in {layout}")


if __name__ == "__main__":
    main()
