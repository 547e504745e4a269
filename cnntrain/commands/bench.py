"""Time the training step beside the bare step, and tell the fastest settings: precision, layout, batch size, compile.

`cnntrain bench model=... data=...` trains nothing: it times copies. A table tells for each setting the images/s of the
training as it is (batches, augmentation, metrics, logging), of the bare step (forward, backward and optimizer step on
a batch that is on the device), the share of the one in the other, and the peak of memory (on a CPU the process's, on a
GPU torch's). A second one tells where the configured setting's time goes. Then come the overrides to type. It takes
about `bench.budget_s`. TimingWindows in which other processes took CPU time are dropped, and said. Writes bench.json.
"""

import dataclasses
import io
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cnntrain.benchmark.throughput import Speed, load_line, part_rows, recommend, speed_rows
from cnntrain.config.compose import read_settings
from cnntrain.config.invocation import Invocation
from cnntrain.config.schema import Settings
from cnntrain.data.loader import Loader
from cnntrain.errors import UserError, is_out_of_memory
from cnntrain.memory import free_host_bytes
from cnntrain.report.console import log_to_console
from cnntrain.report.journal import RunLogger
from cnntrain.report.progress import Bar
from cnntrain.report.table import print_rows
from cnntrain.train.device import Compute
from cnntrain.train.measurement import TimingWindows, interleave, peak_memory_mib, reset_peak_memory
from cnntrain.train.optim import make_optimizer
from cnntrain.train.run_dir import open_run_dir, provenance
from cnntrain.train.setup import Components, assemble, build_training_parts
from cnntrain.train.signals import StopFlag, stop_flag
from cnntrain.train.state import TrainingPlan
from cnntrain.train.step_timer import StepTimer, make_step_timer

log = logging.getLogger("cnntrain")
ROUNDS = 5  # windows of each kind that a setting gets
SHARE_OF_PARTS = 0.35  # of the budget, for where the time goes
GROWTH = 0.8  # of the free memory of a CPU that a larger batch may be expected to take


def run(invocation: Invocation) -> int:
    if invocation.words:
        raise UserError(f"bench: {invocation.words[0]!r} is no override; write KEY=VALUE, as model=resnet18")
    bench(read_settings(invocation.overrides, invocation.config_dir), invocation.line)
    return 0


def bench(settings: Settings, command_line: str = "") -> dict[str, Any]:
    """What bench.json holds: `settings`, `parts`, `recommendation`, `load`, with `run_dir`.

    Raises:
        UserError: the parts can't be built, or the data can't be read.
    """
    log_to_console()
    assembly = assemble(settings)
    data = assembly.load()
    plan, _, _ = build_training_parts(assembly, data)
    loader = assembly.loader(data.train, augmented=True)
    folder = Path(settings.run_dir) if settings.run_dir else None
    with (
        stop_flag() as stop,
        open_run_dir(folder, f"bench-{settings.label}") as run_folder,
        _journal(assembly) as journal,
    ):
        run_folder.write_json("run.json", provenance(command_line))
        images = min(plan.batch_size, len(data.train)) * plan.accumulate
        timings = Timings(assembly, plan, loader, journal, stop, settings.bench.budget_s)
        speeds, parts = timings.measure()
        report = {
            "device": _describe(assembly.compute.device),
            "threads": torch.get_num_threads(),
            "settings": [dataclasses.asdict(speed) for speed in speeds],
            "parts": part_rows({name: each.median for name, each in parts.items()}, images),
            "recommendation": recommend(speeds),
            "load": load_line(*timings.load()),
        }
        run_folder.write_json("bench.json", report)
    print_rows(speed_rows(speeds), f"{settings.label}, images/s on {report['device']}")
    print_rows(report["parts"], f"where the time of the configured step goes ({images} images)")
    print(f"{report['load']}\n{report['recommendation']}\nrun folder: {run_folder.path}")
    return {**report, "run_dir": str(run_folder.path)}


class Timings:
    """Times one setting after the other, the configured one first, until the budget is used up."""

    def __init__(
        self,
        assembly: Components,
        plan: TrainingPlan,
        loader: Loader,
        journal: RunLogger,
        stop: StopFlag,
        budget_s: float,
    ) -> None:
        self.assembly, self.plan, self.loader, self.journal, self.stop = assembly, plan, loader, journal, stop
        self.budget_s, self.ends_at = budget_s, time.monotonic() + budget_s
        self.all: list[TimingWindows] = []

    def measure(self) -> tuple[list[Speed], dict[str, TimingWindows]]:
        """Every setting's speed, and the windows of the parts of the configured one."""
        here, batch_size = self.assembly.compute, self.plan.batch_size
        parts: dict[str, TimingWindows] = {}
        speeds = [self._time(here, batch_size, self.budget_s * (1 - SHARE_OF_PARTS) / 6, parts)]
        for precision, channels_last in self._layouts():
            compute = dataclasses.replace(
                here, precision=precision, channels_last=channels_last, compile="off"
            )
            if compute != here:
                speeds.append(self._time(compute, batch_size, self._share(6 - len(speeds))))
        fastest = max(speeds, key=lambda speed: speed.loop or 0)
        compute = dataclasses.replace(
            here, precision=fastest.precision, channels_last=fastest.channels_last, compile=fastest.compile
        )
        for size in self._batch_sizes():
            reason = self._too_large(size, speeds)
            speeds.append(
                Speed(compute.precision, compute.channels_last, compute.compile, size, note=reason)
                if reason
                else self._time(compute, size, self._share(2))
            )
        return speeds, parts

    def load(self) -> tuple[int, int, float]:
        """Clean windows, all windows, and the most cores that others kept busy in one."""
        return (
            sum(len(windows.clean) for windows in self.all),
            sum(len(windows.other_cores) for windows in self.all),
            max((windows.max_other_cores for windows in self.all), default=0.0),
        )

    def _layouts(self) -> list[tuple[str, bool]]:
        precisions = ["bf16", "fp32", *["fp16"] * (self.assembly.compute.device.type == "cuda")]
        return [(precision, layout) for layout in (True, False) for precision in precisions]

    def _batch_sizes(self) -> list[int]:
        size = self.plan.batch_size
        sizes = [size // 2, size * 2, *[size * 4] * (self.assembly.compute.device.type == "cuda")]
        return [each for each in sizes if 1 < each <= len(self.loader)]

    def _share(self, settings_left: int) -> float:
        return (self.ends_at - time.monotonic()) / max(settings_left, 1)

    def _too_large(self, size: int, speeds: list[Speed]) -> str:
        """Why a batch should not be tried on a CPU, whose memory is everybody's; empty when it may be."""
        if (
            self.assembly.compute.device.type != "cpu"
            or size <= self.plan.batch_size
            or not speeds[0].peak_mib
        ):
            return ""
        expected_mib = speeds[0].peak_mib * size / self.plan.batch_size
        fits = (expected_mib - speeds[0].peak_mib) * 2**20 <= GROWTH * free_host_bytes()
        return "" if fits else "not tried: it may not fit in memory"

    def _time(
        self, compute: Compute, batch_size: int, share_s: float, parts: dict[str, TimingWindows] | None = None
    ) -> Speed:
        """One setting, in about `share_s` seconds; fills `parts` where they are asked for."""
        speed = Speed(compute.precision, compute.channels_last, compute.compile, batch_size)
        if share_s <= 0:
            return dataclasses.replace(speed, note="not timed: bench.budget_s is used up")
        reset_peak_memory(compute.device)
        started = time.monotonic()
        try:
            rig = self._rig(compute, batch_size)
            rig.warm_up()
            if compute.compile != "off":  # compiling comes on top of the budget
                compiling_s = time.monotonic() - started
                started, self.ends_at = started + compiling_s, self.ends_at + compiling_s
            runs = {"bare": rig.bare, "loop": rig.loop}
            found = interleave(runs, ROUNDS, started + share_s, self.stop)
            peak = peak_memory_mib(compute.device)
            if parts is not None:
                ends_at = time.monotonic() + SHARE_OF_PARTS * self.budget_s
                parts.update(interleave(rig.parts(), ROUNDS, ends_at, self.stop))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if parts is not None:
                raise
            return dataclasses.replace(speed, note="out of memory")
        self.all += [*found.values(), *(parts or {}).values()]
        return dataclasses.replace(
            speed,
            loop=found["loop"].images_per_s,
            bare=found["bare"].images_per_s,
            peak_mib=peak,
            clean=min(len(windows.clean) for windows in found.values()),
            windows=len(found["loop"].other_cores),
        )

    def _rig(self, compute: Compute, batch_size: int) -> StepTimer:
        assembly, plan = self.assembly, dataclasses.replace(self.plan, batch_size=batch_size)
        return make_step_timer(
            assembly.model, partial(make_optimizer, assembly.settings), assembly.task, compute, plan, self.loader,
            assembly.pipeline, assembly.settings.ema_decay, self.journal,
        )  # fmt: skip


@contextmanager
def _journal(assembly: Components) -> Iterator[RunLogger]:
    """Where a training's story would go, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        journal = RunLogger(
            Path(folder), assembly.task, assembly.spec, 1, 1,
            tensorboard=assembly.settings.log.tensorboard, pictures=False,
        )  # fmt: skip
        journal.bar = Bar(1, 1, watch=(assembly.task.monitor[0],), console=Console(file=io.StringIO()))
        with journal:
            yield journal


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
