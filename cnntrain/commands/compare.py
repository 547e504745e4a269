"""Compare runs: differing settings, results, and learning curves in one figure.

`cnntrain compare RUN [RUN ...]`, each a run folder or a sweep folder. Runs that differ only in seed and fold are
averaged: mean and standard deviation in the table, mean and range in the figure. Writes compare.csv, compare.md and
curves.png.
"""

from pathlib import Path
from typing import Any

from cnntrain.config.command_line import Invocation
from cnntrain.config.compose import read_command_settings
from cnntrain.config.schema import CompareSettings
from cnntrain.errors import UserError, suggest
from cnntrain.io.safe_files import write_csv
from cnntrain.plots.curves import plot_learning_curves
from cnntrain.plots.figure import log_plot_errors, save_figure
from cnntrain.report.compare import comparison_rows, differing_keys, find_runs, group_runs, read_monitor, read_run
from cnntrain.report.console import console, log_to_console, markdown, print_rows
from cnntrain.train.run_dir import open_run_dir, provenance


def run(invocation: Invocation) -> int:
    if not invocation.words:
        raise UserError(
            "compare: give the folders of runs or sweeps, for example: cnntrain compare outputs/RUN outputs/RUN"
        )
    settings = read_command_settings(CompareSettings, "compare", invocation.overrides, invocation.config_dir)
    compare([Path(word) for word in invocation.words], settings, invocation.command_line)
    return 0


def compare(folders: list[Path], settings: CompareSettings, command_line: str = "") -> list[dict[str, Any]]:
    """Compare runs and return the rows of the table, one per group of runs that differ only in seed and fold."""
    log_to_console()
    run_folders = list(dict.fromkeys(each for folder in folders for each in find_runs(folder)))
    runs = [read_run(each) for each in run_folders]
    monitor = next((found for each in run_folders if (found := read_monitor(each))), ("loss", "min"))
    metric = settings.metric or monitor[0]
    known = sorted({key.removeprefix("val/") for run in runs for row in run.rows for key in row if key[:4] == "val/"})
    if metric not in known:
        raise UserError(f"metric: no run has {metric!r}{suggest(metric, known)} (available: {', '.join(known)})")
    groups = group_runs(runs, differing_keys(runs))
    rows = comparison_rows(groups, metric, monitor)
    with open_run_dir(settings.run_dir, "compare") as run_dir:
        run_dir.write_json("run.json", provenance(command_line))
        write_csv(run_dir.path / "compare.csv", rows)
        curves = {group.name: [run.rows for run in group.runs] for group in groups}
        with log_plot_errors("the learning curves"):
            save_figure(plot_learning_curves(curves, metric), run_dir.path / "curves.png")
        text = f"# Comparison\n\n```\n{command_line}\n```\n\n{markdown(rows)}\n\n![learning curves](curves.png)\n"
        run_dir.write_text("compare.md", text)
    print_rows(rows, title="Differing settings, and the best epoch on validation data", console=console)
    print(f"folder: {run_dir.path} (compare.md, compare.csv, curves.png)")
    return rows
