"""Train a network to the end: fit, evaluate the best epoch, test once, and summarize."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cnntrain.config.command_line import format_overrides
from cnntrain.data.load import DataSplits
from cnntrain.data.loader import Loader
from cnntrain.data.workers import explain_worker_error
from cnntrain.errors import DivergedError, StoppedError
from cnntrain.plots.figure import log_plot_errors
from cnntrain.tasks.meter import HardestExamples, Meter
from cnntrain.tasks.task import Task
from cnntrain.train import checkpoint
from cnntrain.train.checkpoint import CheckpointWriter, load_weights
from cnntrain.train.evaluate import evaluate, predict_batch
from cnntrain.train.loop import Logger, Trainer, fit, monitored_key
from cnntrain.train.setup import Components
from cnntrain.train.signals import StopFlag
from cnntrain.train.state import Progress, TrainingPlan, TrainState
from cnntrain.types import Batch

log = logging.getLogger("cnntrain")
MISTAKES_SHOWN = 24


def fit_and_test(
    components: Components,
    data: DataSplits,
    plan: TrainingPlan,
    state: TrainState,
    writer: CheckpointWriter,
    logger: Logger,
    stop: StopFlag,
) -> dict[str, Any]:
    """Train, evaluate the weights of the best epoch, and use the test set once.

    Args:
        state: the initial state, or the state of a checkpoint.
        logger: does nothing on all ranks but rank 0.

    Returns:
        The content of results.json; {} on all ranks but rank 0.

    Raises:
        StoppedError: a signal stopped the run; its state is saved.
        DivergedError: the loss or a gradient is not finite.
        MachineError: a loader worker died.
    """
    settings, task, progress = components.settings, components.task, state.progress
    world = components.compute.world
    train_loader = components.loader(data.train, augmented=True)
    val_loader = components.loader(data.val) if data.val else None
    trainer = Trainer(task, components.pipeline, components.compute, plan, train_loader, val_loader)
    _fit(trainer, state, writer, logger, stop)
    stopped_early = progress.step < plan.total_steps
    if stopped_early and world.is_main:
        _log_early_stop(progress, plan, task)
    best = state.eval_model
    writer.flush()
    if world.is_main:
        kept = checkpoint.load(writer.run.best)["state"]
        load_weights(best, kept["ema"] or kept["model"])
    world.broadcast_(list(best.state_dict().values()))
    selection = val_loader or train_loader
    meter, hardest = _evaluate(best, components, selection, plan, stop)
    test = {}
    if data.test is not None:
        test_meter, _ = _evaluate(best, components, components.loader(data.test), plan, stop)
        test = {f"test/{name}": value for name, value in test_meter.compute().items()}
    if not world.is_main:
        return {}
    mistakes = _draw_mistakes(best, components, selection, hardest) if settings.log.figures else None
    split = "validation" if val_loader else "training"
    logger.finish(best, meter, mistakes, split, progress.best, test, progress.step)
    ended_by = "early_stopping" if stopped_early else "steps" if settings.steps else "epochs"
    return {**_summary(state, best, test), "ended_by": ended_by}


def _fit(trainer: Trainer, state: TrainState, writer: CheckpointWriter, logger: Logger, stop: StopFlag) -> None:
    """Call `fit`; add to its errors what the user can do."""
    try:
        fit(trainer, state, logger, writer.save, stop)
    except StoppedError as error:
        override = format_overrides(run_dir=writer.run.path, resume="auto")
        raise StoppedError(
            error.signal_number,
            f"{error} at step {state.progress.step}; its state is saved; to continue, run the same command with "
            f"{override}",
        ) from error
    except DivergedError as error:
        raise DivergedError(f"{error}\nlast good checkpoint: {writer.last_saved}") from error
    except (RuntimeError, OSError, EOFError) as error:
        # The death of a loader worker can raise an error anywhere in the main process.
        explained = explain_worker_error(error)
        if explained is None:
            raise
        raise explained from error


def _log_early_stop(progress: Progress, plan: TrainingPlan, task: Task) -> None:
    log.info(
        "early stopping: ended after epoch %d of %d; no improvement of %s for %d epochs; the best epoch is %d",
        progress.epoch,
        -(-plan.total_steps // plan.steps_per_epoch),
        monitored_key(progress.best, task.monitor[0]),
        progress.epochs_since_best,
        progress.best["epoch"],
    )


def _evaluate(
    model: nn.Module, components: Components, loader: Loader, plan: TrainingPlan, stop: StopFlag
) -> tuple[Meter, HardestExamples]:
    """Return the metrics of a split, and its hardest examples."""
    hardest, world = HardestExamples(MISTAKES_SHOWN), components.compute.world

    def add(batch: Batch, outputs: Tensor) -> None:
        hardest.update(components.task.mistake_score(outputs, batch.truth), batch.index)

    meter = evaluate(components, model, loader, plan.batch_size, plan.limit_batches, stop, add)
    for rank, (scores, rows) in enumerate(world.all_gather(hardest.state()) if world.size > 1 else ()):
        if rank != world.rank and len(scores):
            hardest.update(scores, rows)
    return meter, hardest


@torch.no_grad()
def _draw_mistakes(model: nn.Module, components: Components, loader: Loader, hardest: HardestExamples) -> Any:
    """Draw the most confident mistakes; return None if there are none."""
    rows = hardest.rows()
    if not len(rows):
        return None
    batch = components.pipeline.eval_transform(next(iter(loader.batches(rows, len(rows)))))
    model.eval()
    outputs = predict_batch(model, batch.images, components.compute)
    names = [loader.examples.names[row] for row in batch.index.tolist()]
    with log_plot_errors("the mistakes"):
        return components.task.draw(batch.images, outputs, batch.truth, names)


def _summary(state: TrainState, model: nn.Module, test: Mapping[str, float]) -> dict[str, Any]:
    """Return the content of results.json."""
    progress = state.progress
    best = {name: value for name, value in progress.best.items() if not name.startswith("images_per_s")}
    parameters = sum(p.numel() for p in model.parameters())
    statistics_count = sum(b.numel() for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var")))
    return {
        "parameters": parameters,
        "parameters_keras": parameters + statistics_count,
        "epochs": progress.epoch,
        "steps": progress.step,
        "wall_s": round(progress.wall_s, 3),
        "images_per_s": round(progress.images / max(progress.wall_s, 1e-9), 1),
        "best": {**best, "epoch": int(best["epoch"]), "step": int(best["step"])},
        "test": dict(test) or None,
    }
