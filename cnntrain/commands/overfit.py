"""Overfit one training example: does everything from the pixels to the optimizer work?

`cnntrain overfit model=... data=...`. Augmentation, dropout, mixing, label smoothing and weight decay are off; the
configured optimizer runs at its peak learning rate. The exit code is 0 if the example was learned and 1 if not; the
likely cause is printed. If a higher learning rate is much faster, the verdict is WARN and the exit code 0
(`overfit.strict=true`: FAIL and 1). Writes overfit.json and a figure. `overfit.examples=8` learns several examples.
"""

from collections.abc import Callable
from typing import Any

from cnntrain.checks.overfit import overfit
from cnntrain.config.command_line import Invocation
from cnntrain.config.compose import read_settings
from cnntrain.config.schema import Settings


def run(invocation: Invocation) -> int:
    if invocation.multirun:
        # Imported here because they import optuna, which a single run does not need.
        from cnntrain.sweep.run_workers import SweepTarget
        from cnntrain.sweep.sweep_run import run_sweep

        return run_sweep(invocation, SweepTarget(overfit_run))
    settings = read_settings(invocation.overrides, invocation.config_dir)
    return 1 if overfit(settings, invocation.command_line)["verdict"] == "FAIL" else 0


def overfit_run(settings: Settings, command_line: str, on_epoch: Callable[[dict[str, float]], None]) -> dict[str, Any]:
    """Run one trial of a sweep; there are no epochs to pass to `on_epoch`."""
    return overfit(settings, command_line)
