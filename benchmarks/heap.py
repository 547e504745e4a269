"""The bare step with the C library as it comes, and with freed memory kept from step to step, as cnntrain has it.

    python benchmarks/heap.py
    python benchmarks/heap.py --rounds 3 --networks lenet5

Forward, backward and optimizer step on one batch of random numbers, in fp32 on the CPU, channels_last. Two processes
take turns, and each waits while the other works. Prints medians: milliseconds and page faults of a step, the most
memory that the process held, and the ratio of neighboring turns.
"""

import argparse
import subprocess
import sys
from statistics import median

TRIALS = (  # network, (C, H, W), batch
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

how, name, batch, *shape = sys.argv[1:]
if how == "kept":
    keep_freed_memory()
batch, (channels, *size) = int(batch), map(int, shape)
model = make_model(compose(f"model={name}"), channels, 10, tuple(size)).to(memory_format=torch.channels_last).train()
images = torch.randn(batch, channels, *size).contiguous(memory_format=torch.channels_last)
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
    seconds, now = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    print(seconds / steps, (now.ru_minflt - before) / steps, now.ru_maxrss / 1024, flush=True)
"""


def start(how: str, name: str, shape: tuple[int, ...], batch: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, how, name, str(batch), *map(str, shape)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    if child.stdout.readline() != "ready\n":
        sys.exit(f"{name} failed")
    return child


def turn(child: subprocess.Popen[str]) -> tuple[float, float, float]:
    """Seconds and page faults a step, and the most MiB so far."""
    assert child.stdin and child.stdout
    print(file=child.stdin, flush=True)
    seconds, faults, mib = map(float, child.stdout.readline().split())
    return seconds, faults, mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--networks", nargs="+", default=[name for name, _, _ in TRIALS])
    options = parser.parse_args()
    print(f"{'':<34}{'as it comes':^28}{'kept':^28}")
    print(f"{'network':<12}{'images':<22}" + f"{'ms':>8}{'faults':>10}{'MiB':>8}  " * 2 + "   times as fast")
    for name, shape, batch in TRIALS:
        if name not in options.networks:
            continue
        children = [start(how, name, shape, batch) for how in ("plain", "kept")]
        turns = [[turn(child) for child in children] for _ in range(options.rounds)]
        for child in children:
            child.kill()
        row = f"{name:<12}{f'{batch} x ' + 'x'.join(map(str, shape)):<22}"
        for side in (0, 1):
            seconds, faults, mib = (median(each[side][part] for each in turns) for part in range(3))
            row += f"{1000 * seconds:>8.1f}{faults:>10,.0f}{mib:>8,.0f}  "
        print(f"{row}{median(plain[0] / kept[0] for plain, kept in turns):>15.2f} x", flush=True)


if __name__ == "__main__":
    main()
