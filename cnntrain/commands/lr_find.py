"""Find a learning rate: train a copy of the network while the learning rate grows until the loss diverges.

`cnntrain lr-find model=... data=... optimizer=...` uses the batches, augmentation, loss, clipping and optimizer of
the training. The learning rate grows by a constant factor per step from `lr_find.lowest` to `lr_find.highest`, until
the loss diverges. Prints two suggestions: a tenth of the rate of divergence, which `optimizer.lr=auto` uses, and the
rate at which the loss decreases most steeply. Writes lr_find.json and a figure. Source: Smith 2017, Cyclical Learning
Rates, section 3.3.
"""

from typing import Any

from cnntrain.config.command_line import Invocation
from cnntrain.config.compose import read_settings
from cnntrain.config.schema import Settings
from cnntrain.plots.curves import plot_lr_range_test
from cnntrain.plots.figure import log_plot_errors, save_figure
from cnntrain.report.console import log_to_console
from cnntrain.train.lr_finder import RangeTest
from cnntrain.train.prepare import resolve_plan, run_range_test, with_learning_rate
from cnntrain.train.run_dir import open_run_dir, provenance
from cnntrain.train.setup import build_components
from cnntrain.train.signals import stop_flag


def run(invocation: Invocation) -> int:
    settings = read_settings(invocation.overrides, invocation.config_dir)
    return 0 if lr_find(settings, invocation.command_line)["suggestion"] is not None else 1


def lr_find(settings: Settings, command_line: str = "") -> dict[str, Any]:
    """Return the content of lr_find.json (`suggestion`, `steepest`, `diverged_at`, the curve) and `run_dir`."""
    log_to_console()
    configured = settings.optimizer.get("lr")
    components = build_components(with_learning_rate(settings, 1.0) if configured == "auto" else settings)
    with stop_flag() as stop:
        data = components.load()
        plan = resolve_plan(components, data)
        with open_run_dir(settings.run_dir, f"lr-find-{settings.label}") as run_dir:
            test = run_range_test(components, data, plan, stop)
            report = {
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
            run_dir.write_json("run.json", provenance(command_line))
            run_dir.write_json("lr_find.json", report)
            if settings.log.figures:
                marks = {"a tenth of divergence": test.suggestion, "steepest decrease": test.steepest}
                marks = {name: rate for name, rate in (*marks.items(), ("divergence", test.diverged_at)) if rate}
                title = f"Range test: {settings.label}"
                with log_plot_errors("the range test"):
                    figure = plot_lr_range_test(test.rates, test.losses, test.smoothed, marks, title)
                    save_figure(figure, run_dir.figures / "lr_find.png")
    print(summary_text(test, configured))
    print(f"run folder: {run_dir.path}")
    return {**report, "run_dir": str(run_dir.path)}


def summary_text(test: RangeTest, configured: Any) -> str:
    if test.suggestion is None:
        return (
            f"no suggestion: the loss does not decrease at any learning rate from {test.rates[0]:.1g} to "
            f"{test.rates[-1]:.1g}; `cnntrain overfit` and `cnntrain check` find out why a network does not learn"
        )
    diverged = f"diverges at {test.diverged_at:.2g}" if test.diverged_at else "does not diverge"
    return (
        f"the loss decreases from {test.initial_loss:.3g} by {test.decrease:.0%} and {diverged} "
        f"({len(test.rates)} steps)\n"
        f"optimizer.lr={test.suggestion:.2g}  a tenth of the rate of divergence (used by optimizer.lr=auto)\n"
        f"optimizer.lr={test.steepest:.2g}  steepest decrease\n"
        f"configured: {configured}"
    )
