"""Seconds from launch to the end of the first training step: `cnntrain` beside the least that is possible (import
torch, build the same network and optimizer, one step on random images).

    python benchmarks/startup.py                  # lenet5, a stand-in for Fashion-MNIST
    python benchmarks/startup.py --root DATA --model fmnist_cnn --rounds 5

Both are launched in turns, each in a process of its own, after one launch that warms the file cache. Prints medians of
the wall time and of the CPU time (which other processes disturb less), and the ratio, which should be 1.15 or less.
Launches during which another process took CPU time do not count while there are clean ones.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fashion import add_root, fashion_mnist

from cnntrain.benchmark.measurement import BUSY_CORES, other_cores, read_cpu_times

# What a child prints at the end of its first step; then it is over.
REPORT = """
import os, resource, sys, time
def report():
    used = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(each.ru_utime + each.ru_stime for each in used)
    print(f"FIRST STEP {time.monotonic()} {cpu}", flush=True)
    os._exit(0)
"""
LEAST = """
import torch
from torch import nn
{network}
model = {model}()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
images, labels = torch.randn({batch}, 1, 28, 28), torch.arange({batch}) % 10
nn.functional.cross_entropy(model(images), labels).backward()
optimizer.step()
report()
"""
OURS = """
from cnntrain.cli import main
class Watched:
    # The loop's module, as soon as it has been imported, tells when its first step is over.
    def find_spec(self, name, path=None, target=None):
        if name == "cnntrain.train.loop":
            sys.meta_path.remove(self)
            import importlib.util
            spec = importlib.util.find_spec(name)
            load = spec.loader.exec_module
            def load_and_watch(module):
                load(module)
                step = module.apply_gradients
                def watched(*arguments):
                    step(*arguments)
                    report()
                module.apply_gradients = watched
            spec.loader.exec_module = load_and_watch
            return spec
sys.meta_path.insert(0, Watched())
sys.exit(main({overrides!r}))
"""


def launch(code: str) -> tuple[float, float, float | None]:
    """Seconds until the first step was over, CPU seconds until then, and the cores that others kept busy."""
    before, started = read_cpu_times(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", REPORT + code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    others = other_cores(before, read_cpu_times())
    told = [line.split()[2:] for line in done.stdout.splitlines() if line.startswith("FIRST STEP")]
    if not told:
        sys.exit(f"a launch failed:\n{done.stderr}")
    return float(told[0][0]) - started, float(told[0][1]), others


def network_source() -> str:
    """The plain networks' source: the peers' common module without what it imports for its own ends."""
    source = (Path(__file__).parent / "peers" / "common.py").read_text()
    constants = [line for line in source.splitlines() if line.startswith("DROPOUT")]
    return "\n".join([*constants, source[source.index("def lenet5") : source.index("def tell")]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_root(parser)
    parser.add_argument("--model", choices=["lenet5", "fmnist_cnn"], default="lenet5")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    with fashion_mnist(options.root) as root:
        overrides = [
            f"model={options.model}",
            "data=fashion_mnist",
            f"data.root={root}",
            f"batch_size={options.batch_size}",
        ]
        codes = {
            "least possible": LEAST.format(network=network_source(), model=options.model, batch=options.batch_size),
            "cnntrain": OURS.format(overrides=overrides),
        }
        for code in codes.values():
            launch(code)
        taken = {name: [] for name in codes}
        for _ in range(options.rounds):
            for name, code in codes.items():
                taken[name].append(launch(code))
    print(f"{options.model}, batch {options.batch_size}: launch to the end of the first step, medians")
    print(f"{'':<16}{'wall s':>8}{'CPU s':>8}   clean launches")
    medians = {}
    for name, launches in taken.items():
        clean = [each for each in launches if (each[2] or 0) <= BUSY_CORES]
        wall, cpu = (statistics.median(each[column] for each in clean or launches) for column in (0, 1))
        medians[name] = wall, cpu
        print(f"{name:<16}{wall:>8.2f}{cpu:>8.2f}   {len(clean)} of {len(launches)}")
    (least_wall, least_cpu), (wall, cpu) = medians.values()
    print(f"{'ratio':<16}{wall / least_wall:>8.2f}{cpu / least_cpu:>8.2f}")


if __name__ == "__main__":
    main()
