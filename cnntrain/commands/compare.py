"""Put runs side by side: the settings that differ, what they came to, and all learning curves on one picture.

`cnntrain compare RUN [RUN ...]`, each the folder of a run or of a sweep. Runs that differ in nothing but the seed and
the fold are taken together: mean and standard deviation in the table, mean and range in the picture. Writes
compare.csv, compare.md and curves.png.
"""

from pathlib import Path
from typing import Any

from cnntrain.config.compose import compose
from cnntrain.config.invocation import Invocation
from cnntrain.config.schema import CompareSettings, parse
from cnntrain.errors import UserError, suggest
from cnntrain.plots.curves import save, survive_drawing
from cnntrain.report.compare import differing_keys, find_runs, fold, monitor_of, read_run, table, write_csv
from cnntrain.report.comparison_table import learning_curves
from cnntrain.report.console import console, log_to_console
from cnntrain.report.table import markdown, print_rows
from cnntrain.train.run_dir import open_run_dir, provenance


def run(invocation: Invocation) -> int:
    if not invocation.words:
        raise UserError(
            "compare: needs folders of runs, or of a sweep, as: cnntrain compare outputs/RUN outputs/RUN"
        )
    composed = compose("compare", invocation.overrides, invocation.config_dir)
    composed.pop("choices")
    compare([Path(word) for word in invocation.words], parse(CompareSettings, composed), invocation.line)
    return 0


def compare(folders: list[Path], settings: CompareSettings, command_line: str = "") -> list[dict[str, Any]]:
    """The rows of the table, one for all runs that differ in nothing but the seed and the fold.

    Raises:
        UserError: no run in a folder, or no run has the metric.
    """
    log_to_console()
    places = list(dict.fromkeys(place for folder in folders for place in find_runs(folder)))
    runs = [read_run(place) for place in places]
    monitor = next((found for place in places if (found := monitor_of(place))), ("loss", "min"))
    metric = settings.metric or monitor[0]
    known = sorted(
        {key.removeprefix("val/") for run in runs for row in run.rows for key in row if key[:4] == "val/"}
    )
    if metric not in known:
        raise UserError(
            f"metric: no run has {metric!r}{suggest(metric, known)} (there is {', '.join(known)})"
        )
    groups = fold(runs, differing_keys(runs))
    rows = table(groups, metric, monitor)
    place = Path(settings.run_dir) if settings.run_dir else None
    with open_run_dir(place, "compare") as folder:
        folder.write_json("run.json", provenance(command_line))
        write_csv(folder.path / "compare.csv", rows)
        curves = {group.name: [run.rows for run in group.runs] for group in groups}
        with survive_drawing("the learning curves"):
            save(learning_curves(curves, metric), folder.path / "curves.png")
        text = f"# Comparison\n\n```\n{command_line}\n```\n\n{markdown(rows)}\n\n![learning curves](curves.png)\n"
        folder.write_text("compare.md", text)
    print_rows(rows, title="the settings that differ, and the best epoch on validation data", console=console)
    print(f"folder: {folder.path} (compare.md, compare.csv, curves.png)")
    return rows
