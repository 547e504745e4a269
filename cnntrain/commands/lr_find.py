"""Find a learning rate: train a copy while the rate grows step by step, and see where the loss falls and diverges.

`cnntrain lr-find model=... data=... optimizer=...`. Batches, augmentation, loss, clipping and optimizer are the
training's own; the rate grows by the same factor each step, `lr_find.lowest` to `lr_find.highest`, until the loss
diverges. Prints two suggestions: a tenth of the rate of divergence, which `optimizer.lr=auto` takes, and the rate at
which the loss falls most steeply. Writes lr_find.json and a picture. Nothing of a run is changed. Source: Smith 2017,
Cyclical Learning Rates, section 3.3.
"""

from pathlib import Path
from typing import Any

from cnntrain.config.compose import read_settings
from cnntrain.config.invocation import Invocation
from cnntrain.config.schema import Settings
from cnntrain.errors import UserError
from cnntrain.plots.curves import plot_lr_range_test
from cnntrain.plots.figure import log_plot_errors, save_figure
from cnntrain.report.console import log_to_console
from cnntrain.train.lr_finder import RangeTest
from cnntrain.train.run_dir import open_run_dir, provenance
from cnntrain.train.setup import assemble, build_training_parts, try_learning_rates, with_rate
from cnntrain.train.signals import stop_flag


def run(invocation: Invocation) -> int:
    if invocation.words:
        raise UserError(
            f"lr-find: {invocation.words[0]!r} is no override; write KEY=VALUE, as model=resnet18"
        )
    settings = read_settings(invocation.overrides, invocation.config_dir)
    return 0 if lr_find(settings, invocation.line)["suggestion"] is not None else 1


def lr_find(settings: Settings, command_line: str = "") -> dict[str, Any]:
    """What lr_find.json holds: `suggestion`, `steepest`, `diverged_at` and the curve, and `run_dir`.

    Raises:
        UserError: the parts can't be built, or the data can't be read.
    """
    log_to_console()
    configured = settings.optimizer.get("lr")
    assembly = assemble(with_rate(settings, 1.0) if configured == "auto" else settings)
    folder = Path(settings.run_dir) if settings.run_dir else None
    with stop_flag() as stop:
        data = assembly.load()
        plan, _, _ = build_training_parts(assembly, data)
        with open_run_dir(folder, f"lr-find-{settings.label}") as run_folder:
            test = try_learning_rates(assembly, data, plan, stop)
            report = summarize(test, configured)
            run_folder.write_json("run.json", provenance(command_line))
            run_folder.write_json("lr_find.json", report)
            if settings.log.figures:
                names = {"a tenth of divergence": test.suggestion, "steepest descent": test.steepest,
                         "divergence": test.diverged_at}  # fmt: skip
                marks = {name: rate for name, rate in names.items() if rate}
                with log_plot_errors("the range test"):
                    figure = plot_lr_range_test(
                        test.rates, test.losses, test.smoothed, marks, f"Range test: {settings.label}"
                    )
                    save_figure(figure, run_folder.figures / "lr_find.png")
    for line in tell(test, configured):
        print(line)
    print(f"run folder: {run_folder.path}")
    return {**report, "run_dir": str(run_folder.path)}


def summarize(test: RangeTest, configured: Any) -> dict[str, Any]:
    return {
        "suggestion": test.suggestion,
        "steepest": test.steepest,
        "diverged_at": test.diverged_at,
        "lowest_at": test.rates[test.lowest_at],
        "fall": test.fall,
        "configured": configured,
        "rates": test.rates,
        "losses": test.losses,
        "smoothed": test.smoothed,
    }


def tell(test: RangeTest, configured: Any) -> list[str]:
    """The test in a few lines."""
    if test.suggestion is None:
        return [
            f"no suggestion: the loss falls at no learning rate from {test.rates[0]:.1g} to {test.rates[-1]:.1g}; "
            "`cnntrain overfit` and `cnntrain check` find what keeps a network from learning"
        ]
    diverged = f"diverges at {test.diverged_at:.2g}" if test.diverged_at else "diverges nowhere"
    return [
        f"the loss falls from {test.start:.3g} by {test.fall:.0%} and {diverged} ({len(test.rates)} steps)",
        f"optimizer.lr={test.suggestion:.2g}  a tenth of the rate of divergence (optimizer.lr=auto takes it)",
        f"optimizer.lr={test.steepest:.2g}  steepest descent",
        f"configured: {configured}",
    ]
