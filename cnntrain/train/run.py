"""A training from its first step to its results: fitting, the best epoch judged, the test set used once, the log."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cnntrain.config.command_text import typed
from cnntrain.data.load import Data
from cnntrain.data.loader import Loader
from cnntrain.data.workers import explain_worker_error
from cnntrain.errors import DivergedError, StoppedError
from cnntrain.io.safe_files import read_text
from cnntrain.plots.figure import log_plot_errors
from cnntrain.report.run_logger import RunLogger, statistics
from cnntrain.tasks.meter import HardestExamples
from cnntrain.tasks.task import Task
from cnntrain.train import checkpoint
from cnntrain.train.checkpoint import CheckpointWriter, checkpoint_metadata, load_weights
from cnntrain.train.distributed import synchronize_norms
from cnntrain.train.evaluate import evaluate
from cnntrain.train.loop import NullLogger, Trainer, fit
from cnntrain.train.optim import learning_rate_at
from cnntrain.train.resume import flatten_settings
from cnntrain.train.run_dir import RunDir
from cnntrain.train.setup import Components, build_training_parts
from cnntrain.train.signals import StopFlag
from cnntrain.train.state import ModelEMA, TrainingPlan, TrainState
from cnntrain.types import Batch

log = logging.getLogger("cnntrain")
MISTAKES_SHOWN = 24


def prepare(assembly: Components, data: Data) -> tuple[TrainingPlan, TrainState]:
    """How long to train, and the training at its start."""
    settings, compute = assembly.settings, assembly.compute
    plan, optimizer, schedule = build_training_parts(assembly, data)
    if compute.world.size > 1 and compute.device.type == "cuda":
        assembly.model = synchronize_norms(assembly.model)
    compute.place(assembly.model)
    state = TrainState(
        assembly.model,
        optimizer,
        schedule,
        torch.amp.GradScaler(compute.device.type) if compute.precision == "fp16" else None,
        ModelEMA(assembly.model, settings.ema_decay) if settings.ema_decay else None,
    )
    return plan, state


def train_to_the_end(
    run: RunDir,
    assembly: Components,
    data: Data,
    plan: TrainingPlan,
    state: TrainState,
    identity: Mapping[str, Any],
    stop: StopFlag,
    watch: Callable[[dict[str, float]], None] | None,
) -> dict[str, Any]:
    """Fit, then judge the best epoch's weights; what results.json holds, {} on all processes but the first.

    Args:
        state: at its start, or where a checkpoint left it.
        identity: the run's identity, stored in its checkpoints (`cnntrain.train.resume.run_identity`).
        watch: see `train`.

    Raises:
        StoppedError: a signal stopped it; its state is saved.
        DivergedError: the loss is no number any more, or the like.
        MachineError: a worker died.
    """
    settings, compute, task = assembly.settings, assembly.compute, assembly.task
    metadata, world = checkpoint_metadata(assembly, data, identity), assembly.compute.world

    training = assembly.loader(data.train, augmented=True)
    validation = assembly.loader(data.val) if data.val else None
    with (
        CheckpointWriter(run, state, metadata, settings.checkpoint.keep, world.is_main) as writer,
        _journal(run, assembly, plan, state, watch) if world.is_main else contextlib.nullcontext() as journal,
    ):
        hparams = flatten_settings(
            {
                k: v
                for k, v in metadata["config"].items()
                if k not in ("run_dir", "resume", "log", "expect", "sweep")
            }
        )
        if journal:
            journal.start(hparams, read_text(run.path / "config.yaml"), data.test is not None)
        try:
            told = journal or NullLogger()
            trainer = Trainer(task, assembly.pipeline, compute, plan, training, validation)
            fit(trainer, state, told, writer.save, stop)
        except StoppedError as error:
            again = typed(run_dir=run.path, resume="auto")
            how = f"its state is saved; to continue, run the same command with {again}"
            raise StoppedError(
                error.exit_code - 128, f"{error} at step {state.progress.step}; {how}"
            ) from error
        except DivergedError as error:
            raise DivergedError(f"{error}\nlast good checkpoint: {writer.last_saved}") from error
        except (RuntimeError, OSError, EOFError) as error:
            # A worker's death shows wherever the main process is.
            explained = explain_worker_error(error, assembly.data_settings.timeout_s)
            if explained is None:
                raise
            raise explained from error

        if journal and (said := _early_stop(state, plan, task)):
            log.info("%s", said)
        best = state.eval_model
        writer.flush()
        if world.is_main:
            kept = checkpoint.load(run.best)["state"]
            load_weights(best, kept["ema"] or kept["model"])
        world.broadcast_(list(best.state_dict().values()))
        judged = validation or training
        meter, worst = _judge(best, assembly, judged, plan, stop)
        test = {}
        if data.test is not None:
            test_meter, _ = _judge(best, assembly, assembly.loader(data.test), plan, stop)
            test = {f"test/{name}": value for name, value in test_meter.compute().items()}
        if not journal:
            return {}
        mistakes = _draw_mistakes(best, assembly, judged, worst) if settings.log.figures else None
        split = "validation" if validation else "training"
        journal.finish(best, meter, mistakes, split, state.progress.best, test, state.progress.step)
    ended_by = "early_stopping" if _early_stop(state, plan, task) else "steps" if settings.steps else "epochs"
    return {**_summary(state, best, test), "ended_by": ended_by}


def _early_stop(state: TrainState, plan: TrainingPlan, task: Task) -> str:
    """Return the message for a training run ended by early stopping; empty if it ran to completion."""
    progress = state.progress
    if plan.early_stopping is None or progress.step >= plan.total_steps:
        return ""
    if progress.epochs_since_best < plan.early_stopping:
        return ""
    name = next(
        (key for key in (f"val/{task.monitor[0]}", f"train/{task.monitor[0]}") if key in progress.best), ""
    )
    planned = -(-plan.total_steps // plan.steps_per_epoch)
    return (
        f"early stopping: ended after epoch {progress.epoch} of {planned}; no improvement of {name or 'train/loss'} "
        f"for {progress.epochs_since_best} epochs; the best epoch is {progress.best['epoch']:.0f}"
    )


def _journal(
    run: RunDir,
    assembly: Components,
    plan: TrainingPlan,
    state: TrainState,
    watch: Callable[[dict[str, float]], None] | None,
) -> RunLogger:
    progress, settings = state.progress, assembly.settings
    return RunLogger(
        run.path,
        assembly.task,
        assembly.spec,
        plan.total_steps,
        -(-plan.total_steps // plan.steps_per_epoch),
        progress.step,
        progress.epoch,
        settings.log.tensorboard,
        settings.log.figures,
        watch,
        lambda step: learning_rate_at(state.optimizer, state.schedule, step),
    )


def _judge(model: nn.Module, assembly: Components, loader: Loader, plan: TrainingPlan, stop: StopFlag):
    """Metrics over a split, and which of its examples are answered worst."""
    worst, world = HardestExamples(MISTAKES_SHOWN), assembly.compute.world

    def look(batch: Batch, outputs: Tensor) -> None:
        worst.update(assembly.task.mistake_score(outputs, batch.truth), batch.index)

    meter = evaluate(assembly, model, loader, plan.batch_size, plan.limit_batches, stop, look)
    for rank, (scores, rows) in enumerate(world.all_gather(worst.state()) if world.size > 1 else ()):
        if rank != world.rank and len(scores):
            worst.update(scores, rows)
    return meter, worst


@torch.no_grad()
def _draw_mistakes(model: nn.Module, assembly: Components, loader: Loader, worst: HardestExamples):
    """The answers that are wrong with the most confidence, as a figure; None when all are right."""
    rows = worst.rows()
    if not len(rows):
        return None
    batch = assembly.pipeline.eval_transform(next(iter(loader.batches(rows, len(rows)))))
    model.eval()
    outputs = model(batch.images.contiguous(memory_format=assembly.compute.memory_format)).float()
    names = [loader.examples.names[row] for row in batch.index.tolist()]
    with log_plot_errors("the mistakes"):
        return assembly.task.draw(batch.images, outputs, batch.truth, names, *statistics(assembly.spec))


def _summary(state: TrainState, model: nn.Module, test: Mapping[str, float]) -> dict[str, Any]:
    """What results.json holds."""
    progress = state.progress
    best = {name: value for name, value in progress.best.items() if not name.startswith("images_per_s")}
    parameters = sum(p.numel() for p in model.parameters())
    statistics_count = sum(
        b.numel() for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))
    )
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
