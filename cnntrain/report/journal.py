"""Where a training's story goes: the bar, metrics.csv, TensorBoard and PNG figures."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch import nn

from cnntrain.errors import CnntrainError
from cnntrain.plots.curves import batch_grid, curves, filters, save, sign, survive_drawing
from cnntrain.report.metrics import MetricsFile
from cnntrain.report.progress import Bar
from cnntrain.report.tensorboard import TensorBoardWriter
from cnntrain.tasks.meter import Meter
from cnntrain.tasks.task import Task
from cnntrain.types import Batch, DataSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class BarLogHandler(logging.Handler):
    """Lets log lines appear above the bar instead of through it."""

    def __init__(self, bar: Bar) -> None:
        super().__init__(logging.INFO)
        self.bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        self.bar.log(self.format(record))


class RunLogger:
    """Keeps a training's records in its folder. A context manager.

    Args:
        folder: the run's.
        total_steps, epochs: of the whole training, for the bar.
        done_steps, done_epochs: where a resumed training stands.
        tensorboard, pictures: whether to write events, and to draw.
        watch: shown every epoch's row once it is saved; what it raises ends the training.
        rate_at: the learning rate of a step, counted from 0, for the picture of the curves.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        spec: DataSpec,
        total_steps: int,
        epochs: int,
        done_steps: int = 0,
        done_epochs: int = 0,
        tensorboard: bool = True,
        pictures: bool = True,
        watch: Callable[[dict[str, float]], None] | None = None,
        rate_at: Callable[[int], float] | None = None,
    ) -> None:
        self.folder, self.task, self.spec, self.pictures = folder, task, spec, pictures
        self.watch, self.rate_at = watch, rate_at
        self.metrics = MetricsFile(folder / "metrics.csv", done_epochs + 1 if done_steps else None)
        self.bar = Bar(total_steps, epochs, done_steps, watch=(task.monitor[0],))
        self.events = (
            TensorBoardWriter(folder, purge_step=done_steps + 1 if done_steps else None)
            if tensorboard
            else None
        )
        self.best: float | None = None
        self._warned = False
        self.first_batch: tuple[int, Batch] | None = None

    def __enter__(self) -> RunLogger:
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.__exit__(kind, error, trace)
        if kind is None or issubclass(kind, CnntrainError):  # it ended before the first reading
            self._draw_batch()
        if self.events:
            self.events.finish(success=kind is None)
            self.events.close()

    def start(self, hparams: Mapping[str, object], config: str, test: bool) -> None:
        """The config, and the run's row in the HParams tab with the metrics that it will have."""
        if self.events:
            name = self.task.monitor[0]
            tags = [
                f"val/{name}",
                "val/loss",
                f"best/{name}",
                *([f"test/{name}"] if test else []),
                "train/loss",
            ]
            self.events.hparams(hparams, tags)
            self.events.text("config", config)

    def reading(self, step: int, epoch: int, batch: int, values: dict[str, float]) -> None:
        self.bar.reading(step, epoch, values)
        if self.events:
            self.events.scalars({f"steps/{name}": value for name, value in values.items()}, step)
        self._draw_batch()

    def batch_seen(self, step: int, batch: Batch) -> None:
        """Keeps the batch, to be drawn at the next reading: importing matplotlib would hold up the first step."""
        self.first_batch = (step, batch) if self.pictures else None

    def _draw_batch(self) -> None:
        if self.first_batch is None:
            return
        (step, batch), self.first_batch = self.first_batch, None
        with self.bar.paused():
            self._draw(step, batch)

    def _draw(self, step: int, batch: Batch) -> None:
        with survive_drawing("the first batch"):
            self._draw_images(step, batch)

    def _draw_images(self, step: int, batch: Batch) -> None:
        shown = slice(0, 32)
        mean, std = statistics(self.spec)
        targets = {name: target[shown] for name, target in batch.targets.items()}
        names = [f"#{row}" for row in batch.index[shown].tolist()]
        if self.spec.keypoints or "mask" in targets:
            figure = self.task.draw(batch.images[shown], None, targets, names, mean, std)
        else:
            labels = targets["label"].tolist() if "label" in targets else []
            captions = [self.spec.classes[i] for i in labels] if self.spec.classes else names
            title = "first batch, as the network sees it"
            figure = batch_grid(batch.images[shown], captions, mean, std, title)
        self.figure("first_batch", figure, step)

    def epoch(self, step: int, row: dict[str, float], improved: bool) -> None:
        self.metrics.append(row)
        self.bar.epoch(int(row["epoch"]) - 1, row, improved)
        if self.events:
            tags = {name: value for name, value in row.items() if name not in ("epoch", "step")}
            self.events.scalars(tags, step)

    def saved(self, row: dict[str, float]) -> None:
        if self.watch:
            with self.bar.paused():
                self.watch(row)

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
        """The closing pictures, and the test set's metrics.

        Args:
            model: the best one; its first convolution is drawn.
            meter: of the best model on the data that chose it.
            mistakes: the most confident ones among them, drawn.
            split: what these data are called.
            best: metrics of the best epoch, `val/...`.
            test: metrics of the test set, `test/...`; empty where there is none.
        """
        if self.events:
            name = self.task.monitor[0]
            chosen = {f"best/{name}": best[f"val/{name}"]} if f"val/{name}" in best else {}
            self.events.scalars({**chosen, **test}, step)
        if not self.pictures:
            return
        with survive_drawing("the curves"):
            self.figure("curves", curves(self.metrics.rows, self.task.monitor, self.rate_at), step)
        with survive_drawing("the task's figures"):
            for name, figure in self.task.figures(meter).items():
                self.figure(name, sign(figure, split), step)
        with survive_drawing("the mistakes"):
            if mistakes is not None:
                self.figure("mistakes", sign(mistakes, split), step)
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        with survive_drawing("the first layer's filters"):
            if first is not None:
                self.figure("filters", filters(first.weight), step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        try:
            save(figure, self.folder / "figures" / f"{name}.png")
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"figures in {self.folder} are not being written: {error}", stacklevel=2)
        if self.events:
            self.events.figure(name, figure, step)


def statistics(spec: DataSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which images are normalized; 0 and 1 where the data have none."""
    return spec.mean or (0.0,) * spec.channels, spec.std or (1.0,) * spec.channels
