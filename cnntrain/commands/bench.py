"""Measure training speed and recommend settings: precision, memory layout, compilation and batch size.

`cnntrain bench model=... data=...` trains copies, so nothing is changed. The first table shows for each setting the
images/s of the training loop (data, augmentation, metrics, logging), the images/s of the bare step (forward, backward
and optimizer step on a batch that is on the device), their ratio, and the peak memory (of the process on a CPU, of
torch's allocations on a GPU). The second table shows the time per part of the configured step. The last line
recommends overrides. The measurement takes about `bench.budget_s` seconds; times at which other processes used the CPU
are ignored. Writes bench.json.
"""

import dataclasses
from typing import Any

import torch

from cnntrain.benchmark.throughput import ThroughputBenchmark, part_rows, recommend, speed_rows, temporary_logger
from cnntrain.config.command_line import Invocation
from cnntrain.config.compose import read_settings
from cnntrain.config.schema import Settings
from cnntrain.report.console import log_to_console, print_rows
from cnntrain.train.prepare import resolve_plan
from cnntrain.train.run_dir import open_run_dir, provenance
from cnntrain.train.setup import build_components
from cnntrain.train.signals import stop_flag


def run(invocation: Invocation) -> int:
    bench(read_settings(invocation.overrides, invocation.config_dir), invocation.command_line)
    return 0


def bench(settings: Settings, command_line: str = "") -> dict[str, Any]:
    """Return the content of bench.json (`settings`, `parts`, `recommendation`, `load`) and `run_dir`."""
    log_to_console()
    components = build_components(settings)
    data = components.load()
    plan = resolve_plan(components, data)
    with (
        stop_flag() as stop,
        open_run_dir(settings.run_dir, f"bench-{settings.label}") as run_dir,
        temporary_logger(components, plan) as logger,
    ):
        run_dir.write_json("run.json", provenance(command_line))
        images = min(plan.batch_size, len(data.train)) * plan.accumulate
        benchmark = ThroughputBenchmark(components, data, plan, logger, stop)
        speeds, parts = benchmark.measure()
        report = {
            "device": _describe(components.compute.device),
            "threads": torch.get_num_threads(),
            "settings": [dataclasses.asdict(speed) for speed in speeds],
            "parts": part_rows({name: windows.median for name, windows in parts.items()}, images),
            "recommendation": recommend(speeds),
            "load": benchmark.load_line(),
        }
        run_dir.write_json("bench.json", report)
    print_rows(speed_rows(speeds), f"{settings.label}, images/s on {report['device']}")
    print_rows(report["parts"], f"time per part of the configured step ({images} images)")
    print(f"{report['load']}\n{report['recommendation']}\nrun folder: {run_dir.path}")
    return {**report, "run_dir": str(run_dir.path)}


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
