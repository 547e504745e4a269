"""Evaluate a checkpoint on a split: the metrics of training, and one row per example, the hardest first.

`cnntrain evaluate checkpoint=RUN split=test`. Preprocessing, classes and split come from the checkpoint; `data.root=`
sets another folder of the data. Writes results.json, examples.csv and figures.
"""

import logging
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from cnntrain.config.command_line import Invocation
from cnntrain.config.compose import read_command_settings
from cnntrain.config.schema import EvaluateSettings
from cnntrain.errors import DivergedError, UserError
from cnntrain.io.safe_files import exists, is_folder, run_folder_of, write_csv
from cnntrain.plots.figure import label_split, log_plot_errors, save_figure
from cnntrain.report.console import console, log_to_console, print_rows
from cnntrain.train.checkpoint import load_validated
from cnntrain.train.evaluate import evaluate
from cnntrain.train.restore import restore
from cnntrain.train.resume import locate_checkpoint
from cnntrain.train.run_dir import open_run_dir, provenance
from cnntrain.train.signals import stop_flag
from cnntrain.types import Batch

log = logging.getLogger("cnntrain")
NAMES = {"train": "training", "val": "validation", "test": "test"}  # in figures


def run(invocation: Invocation) -> int:
    settings = read_command_settings(EvaluateSettings, "evaluate", invocation.overrides, invocation.config_dir)
    evaluate_checkpoint(settings, invocation.command_line)
    return 0


def evaluate_checkpoint(settings: EvaluateSettings, command_line: str = "") -> dict[str, float]:
    """Evaluate a checkpoint and return its metrics by name, `SPLIT/NAME`."""
    log_to_console()
    path = locate_checkpoint(Path(settings.checkpoint), "best.pt")
    saved = load_validated(path)
    components = restore(saved, settings)
    data = components.load(augmented=False)
    if saved["fingerprint"] != data.fingerprint:
        log.warning(
            "the data differ from the training data (fingerprint %s, now %s)", saved["fingerprint"], data.fingerprint
        )
    examples = {"train": data.train, "val": data.val, "test": data.test}[settings.split]
    if examples is None:
        raise UserError("split: this dataset has no test set; use split=val")
    rows: list[dict[str, Any]] = []

    def add_rows(batch: Batch, outputs: Tensor) -> None:
        for index, row in zip(batch.index.tolist(), components.task.per_example(outputs, batch.truth), strict=True):
            rows.append({"name": examples.names[index], **row})

    folder = Path(settings.run_dir) if settings.run_dir else run_folder_of(path) / f"evaluate-{settings.split}"
    if not settings.run_dir and exists(folder) and not is_folder(folder, run_folder_of(path)):
        raise UserError(f"{folder}: is a link or a file; remove it, or choose another folder with run_dir=")
    with open_run_dir(folder, "evaluate") as run_dir, stop_flag() as stop:
        batch_size = settings.batch_size or saved["config"]["batch_size"]
        meter = evaluate(
            components, components.model, components.loader(examples), batch_size, stop=stop, on_batch=add_rows
        )
        if not meter.loss_is_finite():
            weights = [*components.model.named_parameters(), *components.model.named_buffers()]
            broken = next((name for name, weight in weights if not weight.isfinite().all()), None)
            cause = f"{broken} contains NaN or inf" if broken else "the weights are finite, so check the images"
            raise DivergedError(f"evaluate: the loss over {settings.split} is not finite; {cause}")
        values = {**meter.compute(), **meter.details()}
        metrics = {f"{settings.split}/{name}": value for name, value in values.items()}
        rows.sort(key=_hardest_first)
        write_csv(run_dir.path / "examples.csv", rows)
        with log_plot_errors("the figures"):
            for name, figure in components.task.figures(meter).items():
                save_figure(label_split(figure, NAMES[settings.split]), run_dir.figures / f"{name}.png")
        run_dir.write_json("run.json", provenance(command_line))
        run_dir.write_json("results.json", metrics)
    print_rows([{"metric": name, "value": value} for name, value in metrics.items()], console=console)
    print(f"results: {folder}")
    return metrics


def _hardest_first(row: dict[str, Any]) -> tuple[bool, float]:
    """Sort by decreasing loss; examples without a loss (nothing labeled) come last."""
    loss = float(row["loss"])
    return math.isnan(loss), -loss
