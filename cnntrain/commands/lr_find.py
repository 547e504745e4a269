"""Find a learning rate: train a copy of the network while the learning rate grows until the loss diverges.

`cnntrain lr-find model=... data=... optimizer=...` uses the batches, augmentation, loss, clipping and optimizer of
the training. The learning rate grows by a constant factor per step from `lr_find.lowest` to `lr_find.highest`, until
the loss diverges. Prints two suggestions: a tenth of the rate of divergence, which `optimizer.lr=auto` uses, and the
rate at which the loss decreases most steeply. Writes lr_find.json and a figure. Source: Smith 2017, Cyclical Learning
Rates, section 3.3.
"""

from pathlib import Path
from typing import Any

from cnntrain.config.command_line import Invocation
from cnntrain.config.compose import read_settings
from cnntrain.config.schema import Settings
from cnntrain.errors import UserError
from cnntrain.plots.curves import plot_lr_range_test
from cnntrain.plots.figure import log_plot_errors, save_figure
from cnntrain.report.console import log_to_console
from cnntrain.train.lr_finder import RangeTest
from cnntrain.train.prepare import build_training_parts, run_range_test, with_learning_rate
from cnntrain.train.run_dir import open_run_dir, provenance
from cnntrain.train.setup import build_components
from cnntrain.train.signals import stop_flag


def run(invocation: Invocation) -> int:
    if invocation.words:
        raise UserError(
            f"lr-find: {invocation.words[0]!r} is not an override; write KEY=VALUE, for example model=resnet18"
        )
    settings = read_settings(invocation.overrides, invocation.config_dir)
    return 0 if lr_find(settings, invocation.line)["suggestion"] is not None else 1


def lr_find(settings: Settings, command_line: str = "") -> dict[str, Any]:
    """Return the content of lr_find.json (`suggestion`, `steepest`, `diverged_at`, the curve) and `run_dir`.

    Raises:
        UserError: a setting is invalid, or the data cannot be read.
    """
    log_to_console()
    configured = settings.optimizer.get("lr")
    components = build_components(with_learning_rate(settings, 1.0) if configured == "auto" else settings)
    folder = Path(settings.run_dir) if settings.run_dir else None
    with stop_flag() as stop:
        data = components.load()
        plan, _, _ = build_training_parts(components, data)
        with open_run_dir(folder, f"lr-find-{settings.label}") as run_dir:
            test = run_range_test(components, data, plan, stop)
            report = summarize(test, configured)
            run_dir.write_json("run.json", provenance(command_line))
            run_dir.write_json("lr_find.json", report)
            if settings.log.figures:
                names = {"a tenth of divergence": test.suggestion, "steepest decrease": test.steepest,
                         "divergence": test.diverged_at}  # fmt: skip
                marks = {name: rate for name, rate in names.items() if rate}
                with log_plot_errors("the range test"):
                    figure = plot_lr_range_test(
                        test.rates, test.losses, test.smoothed, marks, f"Range test: {settings.label}"
                    )
                    save_figure(figure, run_dir.figures / "lr_find.png")
    for line in summary_lines(test, configured):
        print(line)
    print(f"run folder: {run_dir.path}")
    return {**report, "run_dir": str(run_dir.path)}


def summarize(test: RangeTest, configured: Any) -> dict[str, Any]:
    return {
        "suggestion": test.suggestion,
        "steepest": test.steepest,
        "diverged_at": test.diverged_at,
        "lowest_at": test.rates[test.lowest_step],
        "decrease": test.decrease,
        "configured": configured,
        "rates": test.rates,
        "losses": test.losses,
        "smoothed": test.smoothed,
    }


def summary_lines(test: RangeTest, configured: Any) -> list[str]:
    """Return the lines to print."""
    if test.suggestion is None:
        return [
            f"no suggestion: the loss does not decrease at any learning rate from {test.rates[0]:.1g} to "
            f"{test.rates[-1]:.1g}; `cnntrain overfit` and `cnntrain check` find out why a network does not learn"
        ]
    diverged = f"diverges at {test.diverged_at:.2g}" if test.diverged_at else "does not diverge"
    return [
        f"the loss decreases from {test.initial_loss:.3g} by {test.decrease:.0%} and {diverged} "
        f"({len(test.rates)} steps)",
        f"optimizer.lr={test.suggestion:.2g}  a tenth of the rate of divergence (used by optimizer.lr=auto)",
        f"optimizer.lr={test.steepest:.2g}  steepest decrease",
        f"configured: {configured}",
    ]
