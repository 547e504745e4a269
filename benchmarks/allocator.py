"""Time a training step with glibc's default allocator and with `keep_freed_memory`, which cnntrain enables.

    python benchmarks/allocator.py
    python benchmarks/allocator.py --rounds 3 --networks lenet5

A step is forward, backward and optimizer step on one random batch, in fp32 on the CPU, channels_last. Two processes run
alternately: one waits while the other works. Prints medians of milliseconds and page faults per step, of the peak
memory of the process, and of the ratio of consecutive windows.
"""

import subprocess
import sys
from statistics import median

from common import parser_of

CASES = (  # network, (C, H, W), batch size
    ("lenet5", (1, 28, 28), 128),
    ("fmnist_cnn", (1, 28, 28), 128),
    ("fmnist_cnn", (1, 28, 28), 512),
    ("resnet18", (3, 96, 96), 32),
    ("unet_small", (3, 256, 256), 8),
)
CHILD = """
import resource, sys, time
import torch
from cnntrain import compose
from cnntrain.train.setup import make_model
from cnntrain.memory import keep_freed_memory

allocator, name, batch_size, *shape = sys.argv[1:]
if allocator == "kept":
    keep_freed_memory()
batch_size, (channels, *size) = int(batch_size), map(int, shape)
model = make_model(compose(f"model={name}"), channels, 10, tuple(size)).to(memory_format=torch.channels_last).train()
images = torch.randn(batch_size, channels, *size).contiguous(memory_format=torch.channels_last)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
with torch.no_grad():
    labels = model(images).argmax(1)

def step():
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()

step()
step()
started = time.perf_counter()
step()
steps = max(1, round(1 / (time.perf_counter() - started)))
print("ready", flush=True)
for _ in sys.stdin:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    for _ in range(steps):
        step()
    seconds, usage = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    print(seconds / steps, (usage.ru_minflt - before) / steps, usage.ru_maxrss / 1024, flush=True)
"""


def start(allocator: str, name: str, shape: tuple[int, ...], batch_size: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, allocator, name, str(batch_size), *map(str, shape)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    if child.stdout.readline() != "ready\n":
        sys.exit(f"{name} failed")
    return child


def measure_window(child: subprocess.Popen[str]) -> tuple[float, float, float]:
    """Return seconds and page faults per step, and the peak memory in MiB so far."""
    assert child.stdin and child.stdout
    print(file=child.stdin, flush=True)
    seconds, faults, peak_mib = map(float, child.stdout.readline().split())
    return seconds, faults, peak_mib


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--networks", nargs="+", default=[name for name, _, _ in CASES])
    options = parser.parse_args()
    print(f"{'':<34}{'default':^28}{'kept':^28}")
    print(f"{'network':<12}{'images':<22}" + f"{'ms':>8}{'faults':>10}{'MiB':>8}  " * 2 + "   times as fast")
    for name, shape, batch_size in CASES:
        if name not in options.networks:
            continue
        children = [start(allocator, name, shape, batch_size) for allocator in ("default", "kept")]
        rounds = [[measure_window(child) for child in children] for _ in range(options.rounds)]
        for child in children:
            child.kill()
        row = f"{name:<12}{f'{batch_size} x ' + 'x'.join(map(str, shape)):<22}"
        for windows in zip(*rounds, strict=True):
            seconds, faults, peak_mib = map(median, zip(*windows, strict=True))
            row += f"{1000 * seconds:>8.1f}{faults:>10,.0f}{peak_mib:>8,.0f}  "
        print(f"{row}{median(default[0] / kept[0] for default, kept in rounds):>15.2f} x", flush=True)


if __name__ == "__main__":
    main()
