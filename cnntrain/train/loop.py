"""The training loop."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cnntrain.augment.pipeline import Pipeline
from cnntrain.data.loader import Loader
from cnntrain.errors import StoppedError, UserError
from cnntrain.models.modify import unfreeze
from cnntrain.randomness import epoch_order, seed_all
from cnntrain.tasks.task import Meter, Task
from cnntrain.train.device import Compute
from cnntrain.train.distributed import check_replicas_equal, gather_states, merge_meters, rank_state
from cnntrain.train.evaluate import evaluate, predict_batch
from cnntrain.train.nonfinite import NonFiniteGuard, explain_divergence, explain_validation, step_unless
from cnntrain.train.optim import set_learning_rate
from cnntrain.train.signals import StopFlag
from cnntrain.train.state import Progress, TrainingPlan, TrainState
from cnntrain.types import Batch


@dataclass(frozen=True)
class Trainer:
    """The parts of a training run that do not change; `TrainState` holds the parts that do.

    Attributes:
        val_loader: None if there is no validation split.
    """

    task: Task
    pipeline: Pipeline
    compute: Compute
    plan: TrainingPlan
    train_loader: Loader
    val_loader: Loader | None = None

    def train_batches(self, progress: Progress) -> Iterator[tuple[Batch, int]]:
        """Yield the remaining augmented batches of an epoch, each with its number of images in all ranks."""
        plan, shard = self.plan, self.compute.world.shard(self.pipeline)
        order = epoch_order(plan.seed, progress.epoch, len(self.train_loader))
        transform = self.pipeline.sample_transform(plan.seed, progress.epoch)
        batches = self.train_loader.batches(
            order, plan.batch_size, progress.batch, plan.drop_last, transform=transform, shard=shard
        )
        augmented = self.pipeline.augment_batches(batches, plan.seed, progress.epoch, self.train_loader.is_cached)
        for number, batch in enumerate(augmented, progress.batch):
            rest = len(order) - number * plan.batch_size
            yield shard.drop_predecessor(batch), len(batch) if shard.count == 1 else min(plan.batch_size, rest)


Row = Mapping[str, float]  # metrics by name


class Logger:
    """Base class of loggers; every method does nothing."""

    def log_step(self, step: int, epoch: int, values: dict[str, float]) -> None: ...
    def log_epoch(self, step: int, row: dict[str, float], improved: bool) -> None: ...
    def log_checkpoint(self, row: dict[str, float]) -> None: ...
    def log_first_batch(self, batch: Batch) -> None: ...
    def finish(
        self, model: nn.Module, meter: Meter, mistakes: Any, split: str, best: Row, test: Row, step: int
    ) -> None: ...


class _Stopwatch(Logger):
    """Measures the time of an epoch without the time of its logger: drawing figures does not count as training."""

    def __init__(self, logger: Logger) -> None:
        self.logger, self.started = logger, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def log_step(self, step: int, epoch: int, values: dict[str, float]) -> None:
        with self._paused():
            self.logger.log_step(step, epoch, values)

    def log_first_batch(self, batch: Batch) -> None:
        with self._paused():
            self.logger.log_first_batch(batch)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        paused_at = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused_at


def fit(trainer: Trainer, state: TrainState, logger: Logger, save: Callable[..., None], stop: StopFlag) -> None:
    """Train from the position of `state` to the end of the plan.

    `save("last")` and `save("last", "best")` write checkpoints, never after a non-finite loss. An epoch is logged
    before it is saved. After a kill between the two, the resumed run writes the row again, so no row is missing.

    If `plan.total_steps` ends training within an epoch, the partial epoch is validated and logged like a full one. The
    state keeps its position, so that a longer run can continue from there.

    Raises:
        DivergedError: a loss or a gradient is no longer finite.
        StoppedError: a signal was received; the state has been saved.
    """
    plan, progress, world = trainer.plan, state.progress, trainer.compute.world
    guard = NonFiniteGuard(
        trainer.compute.device, state.scaler is not None, partial(explain_divergence, trainer, state)
    )
    world.replicate(state.model)  # before the clock starts
    # A run interrupted after its last step still has to validate that epoch.
    while not progress.finished and (progress.step < plan.total_steps or progress.batch):
        world.barrier()  # until rank 0 has logged and saved the previous epoch
        row = _fit_epoch(trainer, state, logger, guard, save, stop)
        improved = is_better(row, progress.best, trainer.task.monitor)
        if improved:
            progress.best = row
        if not progress.batch:
            progress.epochs_since_best = 0 if improved else progress.epochs_since_best + 1
        out_of_patience = plan.early_stopping is not None and progress.epochs_since_best >= plan.early_stopping
        progress.finished = progress.step >= plan.total_steps or out_of_patience
        logger.log_epoch(progress.step, row, improved)
        save("last", *(["best"] if improved else []))
        logger.log_checkpoint(row)


def _fit_epoch(
    trainer: Trainer,
    state: TrainState,
    logger: Logger,
    guard: NonFiniteGuard,
    save: Callable[..., None],
    stop: StopFlag,
) -> dict[str, float]:
    """Train and validate for the rest of an epoch, and advance the position; return the metrics."""
    task, plan, progress, world = trainer.task, trainer.plan, state.progress, trainer.compute.world
    stopwatch, seconds_before, images_before = _Stopwatch(logger), progress.wall_s, progress.images
    meter = task.meter()
    if progress.batch and state.meter:
        meter.load_state(rank_state(state.meter, world.rank, world.size), trainer.compute.device)

    def save_position() -> None:
        guard.raise_if_bad()
        state.meter = gather_states(meter, world)
        progress.wall_s = seconds_before + stopwatch.seconds
        save("last")
        world.barrier()  # rank 0 writes

    try:
        train_epoch(trainer, state, meter, stopwatch, guard, stop, save_position)
        guard.raise_if_bad()
        check_replicas_equal(state, world)
        train_metrics = merge_meters(meter, task.meter(), world).compute()
        images_per_s = (progress.images - images_before) / stopwatch.seconds
        val_metrics = _validate(trainer, state, stop)
    except StoppedError:
        save_position()
        raise
    row = {"epoch": float(progress.epoch + 1), "step": float(progress.step)}
    # Mixed labels have no correct answer to count.
    shown = ("loss",) if trainer.pipeline.mixes_labels else tuple(train_metrics)
    row |= {f"train/{name}": train_metrics[name] for name in shown}
    row |= {f"val/{name}": value for name, value in val_metrics.items()}
    row |= {"lr": state.optimizer.param_groups[0]["lr"], "images_per_s": images_per_s}
    if progress.batch < plan.batches_per_epoch:  # `steps` ended the training within this epoch
        state.meter = gather_states(meter, world)
    else:
        state.schedule.observe(row.get("val/loss", row["train/loss"]))
        progress.epoch, progress.batch, state.meter = progress.epoch + 1, 0, {}
    progress.wall_s = seconds_before + stopwatch.seconds
    return row


def _validate(trainer: Trainer, state: TrainState, stop: StopFlag) -> dict[str, float]:
    """Return the validation metrics; {} without a validation split."""
    if trainer.val_loader is None:
        return {}
    plan = trainer.plan
    meter = evaluate(trainer, state.eval_model, trainer.val_loader, plan.batch_size, plan.limit_batches, stop)
    if not meter.loss_is_finite():
        raise explain_validation(trainer, state)
    metrics, (monitored, _) = meter.compute(), trainer.task.monitor
    if monitored not in metrics:
        raise UserError(f"task: monitor {monitored!r} is not a metric; choose one of {', '.join(metrics)}")
    return metrics


def train_epoch(
    trainer: Trainer,
    state: TrainState,
    meter: Meter,
    logger: Logger,
    guard: NonFiniteGuard,
    stop: StopFlag,
    save_position: Callable[[], None] = lambda: None,
) -> None:
    """Train to the end of the epoch. The host waits for the device only to log, every `log.every_steps` steps."""
    compute, plan, world = trainer.compute, trainer.plan, trainer.compute.world
    progress, model = state.progress, state.model
    if plan.unfreeze_epoch is not None and progress.epoch + 1 >= plan.unfreeze_epoch:
        unfreeze(model)  # in every epoch: the model of a resumed run starts frozen
    model.train()
    replica = world.replicate(model)
    recent = torch.zeros(2, device=compute.device)  # loss sum and count since the last log entry
    sums: Tensor | None = None  # loss sum and count of this step's batches so far
    logged_at, images_since = time.perf_counter(), 0
    for batch, num_images in trainer.train_batches(progress):
        if progress.batch % plan.accumulate == 0:  # within a step there are gradients, which are not saved
            stop.check()
        if progress.batch >= plan.batches_per_epoch or progress.step >= plan.total_steps:
            break
        learning_rate = set_learning_rate(state.optimizer, state.schedule, progress.step)
        if progress.step == 0 and progress.batch == 0:
            logger.log_first_batch(batch)
        seed_all(plan.seed, "step", progress.epoch, progress.batch, *world.seed)
        ends_epoch = progress.batch + 1 >= plan.batches_per_epoch
        ends_step = ends_epoch or (progress.batch + 1) % plan.accumulate == 0

        with world.gradient_sync(replica, ends_step):
            outputs, loss_sum, count = train_step(trainer, state, batch, replica)
        with torch.no_grad():
            meter.update(outputs, batch.truth, loss_sum, count)
            own = torch.stack((loss_sum, count)).float()
            sums = own if sums is None else sums + own
            guard.record(loss_sum)
        progress.batch += 1
        progress.images += num_images
        images_since += num_images
        if not ends_step:
            continue

        world.sync_step(model, sums, guard.nonfinite)
        norm = apply_gradients(state, plan, sums[1], guard)
        recent += sums
        sums = None
        progress.step += 1
        if state.ema:
            state.ema.update(model, progress.step)

        if progress.step % plan.log_every_steps == 0 or ends_epoch:
            guard.raise_if_bad()
            loss, terms, grad_norm = torch.cat((recent, norm.reshape(1).to(recent))).tolist()
            values = {
                "loss": loss / max(terms, 1e-12),
                "lr": learning_rate,
                "images_per_s": images_since / max(time.perf_counter() - logged_at, 1e-9),
                "grad_norm": grad_norm,
            }
            logger.log_step(progress.step, progress.epoch, values)
            recent.zero_()
            logged_at, images_since = time.perf_counter(), 0
        saves = plan.save_every_steps is not None and progress.step % plan.save_every_steps == 0
        if saves and not ends_epoch:
            save_position()


def train_step(
    trainer: Trainer, state: TrainState, batch: Batch, replica: nn.Module | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward pass of one augmented batch; its gradients are added to those of the model.

    Args:
        replica: DDP around the model, if there are several ranks.

    Returns:
        Outputs (N, ...) float32, the sum of the loss, and the number of terms in that sum; all detached.
    """
    outputs = predict_batch(replica or state.model, batch.images, trainer.compute)
    loss_sum, count = trainer.task.loss(outputs, batch.truth)
    # With accumulation or several ranks the divisor is known only at the optimizer step: see apply_gradients.
    divisor = trainer.plan.batch_size if trainer.plan.sums_losses else count.clamp(min=1e-12)
    loss = loss_sum / divisor
    (state.scaler.scale(loss) if state.scaler else loss).backward()
    return outputs.detach(), loss_sum.detach(), count


def apply_gradients(state: TrainState, plan: TrainingPlan, count: Tensor, guard: NonFiniteGuard) -> Tensor:
    """Do one optimizer step, or skip it if a value is not finite; return the gradient norm before clipping.

    Args:
        count: number of terms in the loss of this step, over all of its batches and all ranks.
    """
    optimizer, scaler = state.optimizer, state.scaler
    if scaler:
        scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if plan.sums_losses and gradients:
        scale = plan.batch_size / count.clamp(min=1e-12)
        torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
    norm = nn.utils.get_total_norm(gradients).to(count.device)
    if plan.clip_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, plan.clip_grad_norm, norm)
    step_unless(guard.should_skip(norm, state.progress.batch - 1), optimizer)
    if scaler:
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def monitored_key(row: Mapping[str, float], name: str) -> str:
    """Return the key of the monitored metric: on validation data if there are any, else on training data."""
    return next((key for key in (f"val/{name}", f"train/{name}") if key in row), "train/loss")


def is_better(row: dict[str, float], best: dict[str, float], monitor: tuple[str, str]) -> bool:
    """Return True if this epoch is better than the best so far, on validation data if there are any."""
    name, direction = monitor
    key = monitored_key(row, name)
    if key == "train/loss":
        direction = "min"
    if not best or key not in best or math.isnan(best[key]):
        return True
    return row[key] > best[key] if direction == "max" else row[key] < best[key]
