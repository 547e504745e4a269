"""Time `cnntrain` from launch to the end of the first training step, and compare it with a minimal script.

    python benchmarks/startup.py                  # lenet5, random images instead of Fashion-MNIST
    python benchmarks/startup.py --root DATA --model fmnist_cnn --rounds 5

The minimal script imports torch, builds the same network and optimizer, and takes one step on random images. Both are
launched alternately, each in its own process, after one launch that warms the file cache. Prints medians of the wall
time, of the CPU time (which other processes affect less), and their ratio, which should be 1.15 or less. Launches
during which other processes took CPU time are excluded if there are undisturbed ones.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from common import add_root, fashion_mnist, parser_of

from cnntrain.benchmark.measurement import BUSY_CORES, other_cores, read_cpu_times

# A child calls `report` after its first step: it prints the time and exits.
REPORT = """
import os, resource, sys, time
def report():
    usage = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(each.ru_utime + each.ru_stime for each in usage)
    print(f"FIRST STEP {time.monotonic()} {cpu}", flush=True)
    os._exit(0)
"""
MINIMAL = """
import torch
from torch import nn
{network}
model = {model}()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
images, labels = torch.randn({batch_size}, 1, 28, 28), torch.arange({batch_size}) % 10
nn.functional.cross_entropy(model(images), labels).backward()
optimizer.step()
report()
"""
CNNTRAIN = """
from cnntrain.cli import main
class LoopFinder:
    # Patches cnntrain.train.loop when it is imported, so that the first step calls `report`.
    def find_spec(self, name, path=None, target=None):
        if name == "cnntrain.train.loop":
            sys.meta_path.remove(self)
            import importlib.util
            spec = importlib.util.find_spec(name)
            exec_module = spec.loader.exec_module
            def exec_and_patch(module):
                exec_module(module)
                step = module.apply_gradients
                def step_and_report(*arguments):
                    step(*arguments)
                    report()
                module.apply_gradients = step_and_report
            spec.loader.exec_module = exec_and_patch
            return spec
sys.meta_path.insert(0, LoopFinder())
sys.exit(main({overrides!r}))
"""


class Launch(NamedTuple):
    """Seconds from launch to the end of the first step; `other_cores` were used by other processes."""

    wall_s: float
    cpu_s: float
    other_cores: float


def launch(code: str) -> Launch:
    before, started = read_cpu_times(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", REPORT + code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    others = other_cores(before, read_cpu_times())
    reports = [line.split()[2:] for line in done.stdout.splitlines() if line.startswith("FIRST STEP")]
    if not reports:
        sys.exit(f"a launch failed:\n{done.stderr}")
    ended, cpu_s = map(float, reports[0])
    return Launch(ended - started, cpu_s, others or 0.0)


def network_source() -> str:
    """Return the source of the networks in benchmarks/peers/common.py, without the imports of that module."""
    source = (Path(__file__).parent / "peers" / "common.py").read_text()
    constants = [line for line in source.splitlines() if line.startswith("DROPOUT")]
    return "\n".join([*constants, source[source.index("def lenet5") : source.index("def print_speed")]])


def main() -> None:
    parser = parser_of(__doc__)
    add_root(parser)
    parser.add_argument("--model", choices=["lenet5", "fmnist_cnn"], default="lenet5")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    model, batch_size = options.model, options.batch_size
    with fashion_mnist(options.root) as root:
        overrides = [f"model={model}", "data=fashion_mnist", f"data.root={root}", f"batch_size={batch_size}"]
        codes = {
            "minimal script": MINIMAL.format(network=network_source(), model=model, batch_size=batch_size),
            "cnntrain": CNNTRAIN.format(overrides=overrides),
        }
        for code in codes.values():
            launch(code)
        launches: dict[str, list[Launch]] = {name: [] for name in codes}
        for _ in range(options.rounds):
            for name, code in codes.items():
                launches[name].append(launch(code))
    print(f"{model}, batch {batch_size}: launch to the end of the first step, medians")
    print(f"{'':<16}{'wall s':>8}{'CPU s':>8}   clean launches")
    medians = []
    for name, runs in launches.items():
        clean = [run for run in runs if run.other_cores <= BUSY_CORES]
        wall_s = median(run.wall_s for run in clean or runs)
        cpu_s = median(run.cpu_s for run in clean or runs)
        medians.append((wall_s, cpu_s))
        print(f"{name:<16}{wall_s:>8.2f}{cpu_s:>8.2f}   {len(clean)} of {len(runs)}")
    (minimal_wall_s, minimal_cpu_s), (wall_s, cpu_s) = medians
    print(f"{'ratio':<16}{wall_s / minimal_wall_s:>8.2f}{cpu_s / minimal_cpu_s:>8.2f}")


if __name__ == "__main__":
    main()
