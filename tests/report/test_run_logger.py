"""The files of a run's logger. Whole runs are tested in tests/train/test_training.py."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cnntrain.errors import StoppedError
from cnntrain.report.metrics import read_metrics
from cnntrain.report.run_logger import RunLogger
from cnntrain.tasks.classification import Classification
from cnntrain.train.state import Progress
from cnntrain.types import Batch, DataSpec

PLAN: Any = SimpleNamespace(total_steps=4, steps_per_epoch=2)
BATCH = Batch(torch.zeros(2, 1, 8, 8), {"label": torch.tensor([0, 1])}, torch.arange(2), torch.arange(2))


def make_logger(folder: Path, progress: Progress, **arguments: Any) -> RunLogger:
    settings = SimpleNamespace(log=SimpleNamespace(figures=True, tensorboard=True))
    task = Classification(DataSpec(1, 8, 8, classes=("cat", "dog")))
    components: Any = SimpleNamespace(settings=settings, task=task)
    return RunLogger(folder, components, PLAN, progress, **arguments)


def log_epochs(logger: RunLogger, epochs: range) -> None:
    for epoch in epochs:
        logger.log_step(2 * epoch + 2, epoch, {"loss": 1.0})
        logger.log_epoch(2 * epoch + 2, {"epoch": epoch + 1, "step": 2 * epoch + 2, "val/top1": 0.5}, True)


def test_a_resumed_run_replaces_the_rows_of_repeated_epochs(tmp_path: Path) -> None:
    with make_logger(tmp_path, Progress()) as logger:
        log_epochs(logger, range(2))
    with make_logger(tmp_path, Progress(epoch=1, step=2)) as logger:
        log_epochs(logger, range(1, 2))
    assert [row["epoch"] for row in read_metrics(tmp_path / "metrics.csv")] == [1, 2]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2


@pytest.mark.parametrize("stopped", [False, True])
def test_the_first_batch_is_drawn_once(tmp_path: Path, stopped: bool) -> None:
    logger = make_logger(tmp_path, Progress())
    logger.log_first_batch(BATCH)
    assert not (tmp_path / "figures").exists()  # the first step is not delayed
    logger.__exit__(StoppedError if stopped else None, None, None)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["first_batch.png"]


def test_checkpoints_call_on_epoch(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    with make_logger(tmp_path, Progress(), on_epoch=rows.append) as logger:
        logger.log_checkpoint({"epoch": 1})
    assert rows == [{"epoch": 1}]


def test_figures_that_cannot_be_written_are_reported_once(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "first_batch.png").mkdir()
    logger = make_logger(tmp_path, Progress())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            logger.log_first_batch(BATCH)
            logger.log_step(1, 0, {"loss": 1.0})
    assert sum("cannot write figures" in str(warning.message) for warning in caught) == 1
