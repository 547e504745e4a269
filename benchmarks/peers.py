"""Compare the images/s of `cnntrain` with a plain DataLoader loop, Lightning, Keras on torch, and fastai.

    pip install lightning keras fastai                 # optional; a peer that is not installed is skipped
    python benchmarks/peers.py                         # both networks; random images instead of Fashion-MNIST
    python benchmarks/peers.py --root DATA --models lenet5 --rounds 1 --images 2560
    python benchmarks/peers.py --python OTHER/bin/python   # where the peers are installed apart from cnntrain

Each peer is one script in benchmarks/peers/, written in its usual style: the same network, data, batch size 128 and
optimizer, no augmentation. Every run is its own process; programs run alternately, one run of each per round. The
figure of a run is the median over its epochs without the first. Runs during which other processes took CPU time are
excluded if there are undisturbed ones. Tables: cnntrain and the peers with their defaults (fp32 for the peers), then
all with the same precision and layout: fp32 and NCHW, and NHWC with bf16 if the machine supports it, else fp32.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from common import COMMAND, add_root, fashion_mnist, parser_of, steady_speeds

from cnntrain.benchmark.measurement import TimingWindows, other_cores, read_cpu_times
from cnntrain.train.device import choose_compute

SCRIPTS = Path(__file__).parent / "peers"
PEERS = {"dataloader": "torch", "lightning_peer": "lightning", "keras_peer": "keras", "fastai_peer": "fastai"}
# The peers' scripts do not support fp16.
FAST = "bf16" if choose_compute("auto", "auto", channels_last=True).precision == "bf16" else "fp32"
LAYOUTS = {  # name -> options of the peers, overrides of cnntrain
    "fp32": ([], ["precision=fp32", "channels_last=false"]),
    f"{FAST}, channels_last": (
        ["--precision", FAST, "--channels-last"],
        [f"precision={FAST}", "channels_last=true"],
    ),
}
DEFAULTS = "default settings"


class Runs:
    """Timings and failures of all programs.

    Attributes:
        windows: timings by (program, layout).
        errors: last line of the error message by (program, layout).
    """

    def __init__(self) -> None:
        self.windows: dict[tuple[str, str], TimingWindows] = {}
        self.errors: dict[tuple[str, str], str] = {}

    def add(self, name: str, layout: str, command: list[str], run_dir: Path | None = None) -> None:
        """Run a program; cnntrain's speed is read from `run_dir`, that of a peer from its last line of output."""
        if (name, layout) in self.errors:
            return
        before = read_cpu_times()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        others = other_cores(before, read_cpu_times())
        if done.returncode:
            self.errors[name, layout] = (done.stderr.strip() or "failed").splitlines()[-1]
            return
        if run_dir:
            images_per_s = median(steady_speeds(run_dir))
        else:
            images_per_s = json.loads(done.stdout.splitlines()[-1])["images_per_s"]
        self.windows.setdefault((name, layout), TimingWindows()).add(1, 1 / images_per_s, others)


def measure(model: str, root: Path, options: argparse.Namespace, installed: list[str]) -> Runs:
    runs = Runs()
    threads, epochs = options.threads, options.epochs
    for number in range(options.rounds):
        for layout, (flags, overrides) in {DEFAULTS: ([], []), **LAYOUTS}.items():
            with tempfile.TemporaryDirectory() as folder:
                run_dir = Path(folder) / "run"
                command = [
                    COMMAND,
                    f"model={model}",
                    "data=fashion_mnist",
                    f"data.root={root}",
                    "augment=none",
                    "batch_size=128",
                    "optimizer.lr=1e-3",
                    f"epochs={epochs}",
                    f"run_dir={run_dir}",
                    f"limit_batches={options.images // 128}",
                    *overrides,
                    *([f"threads={threads}"] if threads else []),
                ]
                runs.add("cnntrain", layout, command, run_dir)
            if layout == DEFAULTS:
                continue
            arguments = ["--root", str(root), *f"--model {model} --epochs {epochs} --limit {options.images}".split()]
            arguments += [*flags, *(["--threads", str(threads)] if threads else [])]
            for peer in installed:
                runs.add(peer, layout, [options.python, str(SCRIPTS / f"{peer}.py"), *arguments])
        print(f"{model}: round {number + 1} of {options.rounds} done", file=sys.stderr)
    return runs


def print_table(model: str, runs: Runs, our_layout: str, their_layout: str, title: str) -> None:
    """Compare cnntrain in one layout with the peers in theirs."""
    ours = runs.windows.get(("cnntrain", our_layout))
    if ours is None:
        print(f"\n{model}, {title}: cnntrain failed: {runs.errors['cnntrain', our_layout]}")
        return
    print(f"\n{model}, {title}")
    print(f"  {'':<14}{'images/s':>10}{'cnntrain is':>13}   clean runs")
    print(f"  {'cnntrain':<14}{ours.images_per_s:>10,.0f}{'':>13}   {clean_share(ours)}")
    for peer in PEERS:
        name, windows = peer.removesuffix("_peer"), runs.windows.get((peer, their_layout))
        if windows is None:
            print(f"  {name:<14}{runs.errors.get((peer, their_layout), 'skipped: not installed')}")
            continue
        ratio = f"{ours.images_per_s / windows.images_per_s:.2f} x"
        print(f"  {name:<14}{windows.images_per_s:>10,.0f}{ratio:>13}   {clean_share(windows)}")


def clean_share(windows: TimingWindows) -> str:
    return f"{len(windows.clean)} of {len(windows.other_cores)}"


def is_installed(python: str, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def main() -> None:
    parser = parser_of(__doc__)
    add_root(parser)
    parser.add_argument("--models", nargs="+", default=["fmnist_cnn", "lenet5"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="of a run; the first one is excluded")
    parser.add_argument("--images", type=int, default=12_800, help="training images of an epoch")
    parser.add_argument("--threads", type=int, help="CPU threads of every run")
    parser.add_argument("--python", default=sys.executable, help="interpreter with the peers installed")
    options = parser.parse_args()
    installed = [peer for peer, module in PEERS.items() if is_installed(options.python, module)]
    with fashion_mnist(options.root) as root:
        for model in options.models:
            runs = measure(model, root, options, installed)
            print_table(model, runs, DEFAULTS, "fp32", DEFAULTS)
            for layout in LAYOUTS:
                print_table(model, runs, layout, layout, f"all in {layout}")


if __name__ == "__main__":
    main()
