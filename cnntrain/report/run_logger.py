"""Log a training run to the progress bar, metrics.csv, TensorBoard and PNG figures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch import nn

from cnntrain.errors import CnntrainError
from cnntrain.plots.curves import plot_training_curves
from cnntrain.plots.figure import label_split, log_plot_errors, save_figure
from cnntrain.plots.images import plot_filters
from cnntrain.report.metrics import MetricsFile
from cnntrain.report.progress import ProgressBar
from cnntrain.report.tensorboard import TensorBoardWriter
from cnntrain.tasks.meter import Meter
from cnntrain.train.loop import Logger
from cnntrain.train.setup import Components
from cnntrain.train.state import Progress, TrainingPlan
from cnntrain.types import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES_IN_FIGURE = 32  # of the first batch


class RunLogger(Logger):
    """Log a run to its folder. Use as a context manager.

    Args:
        folder: the run folder.
        progress: position before the first step; not 0 when a run is resumed.
        on_epoch: called with the row of each epoch once its checkpoint is saved; exceptions end the run.
        learning_rate_at: learning rate of a step (from 0), for the figure of the curves.
    """

    def __init__(
        self,
        folder: Path,
        components: Components,
        plan: TrainingPlan,
        progress: Progress,
        on_epoch: Callable[[dict[str, float]], None] | None = None,
        learning_rate_at: Callable[[int], float] | None = None,
    ) -> None:
        settings, done_steps = components.settings.log, progress.step
        self.folder, self.task = folder, components.task
        self.draws_figures = settings.figures
        self.on_epoch, self.learning_rate_at = on_epoch, learning_rate_at
        self.metrics = MetricsFile(folder / "metrics.csv", progress.epoch + 1 if done_steps else None)
        epochs = -(-plan.total_steps // plan.steps_per_epoch)
        self.bar = ProgressBar(plan.total_steps, epochs, done_steps, metrics=(self.task.monitor[0],))
        self.events = None
        if settings.tensorboard:
            self.events = TensorBoardWriter(folder, purge_step=done_steps + 1 if done_steps else None)
        self._warned = False
        self.first_batch: Batch | None = None

    def __enter__(self) -> RunLogger:
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.__exit__(kind, error, trace)
        if kind is None or issubclass(kind, CnntrainError):  # if the run ended before the first logged step
            self._draw_batch()
        if self.events:
            self.events.finish(success=kind is None)
            self.events.close()

    def start(self, hparams: Mapping[str, object], config: str, test: bool) -> None:
        """Write the config and the run's row in the HParams tab."""
        if self.events:
            name = self.task.monitor[0]
            test_tags = [f"test/{name}"] if test else []
            self.events.hparams(hparams, [f"val/{name}", "val/loss", f"best/{name}", *test_tags, "train/loss"])
            self.events.text("config", config)

    def log_step(self, step: int, epoch: int, values: dict[str, float]) -> None:
        self.bar.log_step(step, epoch, values)
        if self.events:
            self.events.scalars({f"steps/{name}": value for name, value in values.items()}, step)
        self._draw_batch()

    def log_first_batch(self, batch: Batch) -> None:
        """Keep the batch to draw it at the next logged step: importing matplotlib would delay the first step."""
        self.first_batch = batch if self.draws_figures else None

    def _draw_batch(self) -> None:
        """Draw the first batch as the network gets it."""
        if self.first_batch is None:
            return
        batch, self.first_batch = self.first_batch, None
        shown = slice(0, IMAGES_IN_FIGURE)
        images, targets = batch.images[shown], {name: target[shown] for name, target in batch.targets.items()}
        names = [f"#{row}" for row in batch.index[shown].tolist()]
        with self.bar.paused(), log_plot_errors("the first batch"):
            self.figure("first_batch", self.task.draw(images, None, targets, names), 0)

    def log_epoch(self, step: int, row: dict[str, float], improved: bool) -> None:
        self.metrics.append(row)
        self.bar.log_epoch(int(row["epoch"]) - 1, row, improved)
        if self.events:
            self.events.scalars({name: row[name] for name in row if name not in ("epoch", "step")}, step)

    def log_checkpoint(self, row: dict[str, float]) -> None:
        if self.on_epoch:
            with self.bar.paused():
                self.on_epoch(row)

    def finish(
        self,
        model: nn.Module,
        meter: Meter,
        mistakes: Figure | None,
        split: str,
        best: Mapping[str, float],
        test: Mapping[str, float],
        step: int,
    ) -> None:
        """Draw the final figures and write the test metrics.

        Args:
            model: the best model; the filters of its first convolution are drawn.
            meter: meter of the best model on the split that selected it.
            mistakes: figure of the most confident mistakes on this split.
            split: name of this split.
            best: metrics of the best epoch, `val/...`.
            test: metrics of the test set, `test/...`; empty without a test set.
        """
        if self.events:
            name = self.task.monitor[0]
            chosen = {f"best/{name}": best[f"val/{name}"]} if f"val/{name}" in best else {}
            self.events.scalars({**chosen, **test}, step)
        if not self.draws_figures:
            return
        with log_plot_errors("the curves"):
            figure = plot_training_curves(self.metrics.rows, self.task.monitor, self.learning_rate_at)
            self.figure("curves", figure, step)
        with log_plot_errors("the task's figures"):
            for name, figure in self.task.figures(meter).items():
                self.figure(name, label_split(figure, split), step)
        with log_plot_errors("the mistakes"):
            if mistakes is not None:
                self.figure("mistakes", label_split(mistakes, split), step)
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        with log_plot_errors("the filters of the first layer"):
            if first is not None:
                self.figure("filters", plot_filters(first.weight), step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        try:
            save_figure(figure, self.folder / "figures" / f"{name}.png")
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"cannot write figures to {self.folder}: {error}", stacklevel=2)
        if self.events:
            self.events.figure(name, figure, step)
