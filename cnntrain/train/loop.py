"""The training loop, in plain sight: read it from top to bottom."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from cnntrain.augment.pipeline import Pipeline
from cnntrain.data.loader import Loader
from cnntrain.errors import StoppedError
from cnntrain.models.modify import unfreeze
from cnntrain.randomness import epoch_order
from cnntrain.tasks.task import Meter, Task
from cnntrain.train.combine import accompany, align, combine, has_synchronized_norms
from cnntrain.train.device import Compute, seed_step
from cnntrain.train.distributed import merge, pack_states, states_of, unpack_state
from cnntrain.train.evaluate import evaluate, predict_batch
from cnntrain.train.nonfinite import NonFiniteGuard, diverged, diverged_in_validation, step_unless
from cnntrain.train.optim import set_learning_rate
from cnntrain.train.signals import StopFlag
from cnntrain.train.state import TrainingPlan, TrainState
from cnntrain.types import Batch


@dataclass(frozen=True)
class Trainer:
    """The parts of a training run that do not change; `TrainState` holds the parts that do.

    Attributes:
        validation: None if there is no validation split.
    """

    task: Task
    pipeline: Pipeline
    compute: Compute
    plan: TrainingPlan
    training: Loader
    validation: Loader | None = None


class Logger(Protocol):
    """Where a training's story goes: bars, TensorBoard, CSV."""

    def reading(self, step: int, epoch: int, batch: int, values: dict[str, float]) -> None: ...
    def epoch(self, step: int, row: dict[str, float], improved: bool) -> None: ...
    def saved(self, row: dict[str, float]) -> None: ...
    def batch_seen(self, step: int, batch: Batch) -> None: ...


class NullLogger:
    """A journal that keeps nothing."""

    def reading(self, step: int, epoch: int, batch: int, values: dict[str, float]) -> None: ...
    def epoch(self, step: int, row: dict[str, float], improved: bool) -> None: ...
    def saved(self, row: dict[str, float]) -> None: ...
    def batch_seen(self, step: int, batch: Batch) -> None: ...


class _Timed:
    """Wrapper of a journal that measures its time (`seconds`), so that drawing does not count as training time."""

    def __init__(self, journal: Logger) -> None:
        self.journal, self.seconds = journal, 0.0

    def reading(self, step: int, epoch: int, batch: int, values: dict[str, float]) -> None:
        started = time.perf_counter()
        self.journal.reading(step, epoch, batch, values)
        self.seconds += time.perf_counter() - started

    def epoch(self, step: int, row: dict[str, float], improved: bool) -> None:
        self.journal.epoch(step, row, improved)

    def saved(self, row: dict[str, float]) -> None:
        self.journal.saved(row)

    def batch_seen(self, step: int, batch: Batch) -> None:
        started = time.perf_counter()
        self.journal.batch_seen(step, batch)
        self.seconds += time.perf_counter() - started


def fit(
    trainer: Trainer, state: TrainState, journal: Logger, save: Callable[..., None], stop: StopFlag
) -> None:
    """Train from where `state` stands to the end of the plan.

    `save("last")` and `save("last", "best")` write checkpoints, never after a non-finite loss. An epoch is logged
    before it is saved. After a kill between the two, the resumed run writes the row again, so no row is missing.

    If `plan.total_steps` ends training within an epoch, the partial epoch is validated and logged like a full one. The
    state keeps its position, so that a longer run can continue from there.

    Raises:
        DivergedError: a loss or a gradient is no longer finite.
        StoppedError: a signal came; the state has been saved.
    """
    task, pipeline, compute, plan = trainer.task, trainer.pipeline, trainer.compute, trainer.plan
    progress, ranks, timed = state.progress, compute.ranks, _Timed(journal)
    explain = partial(diverged, state, trainer.training, pipeline, task, compute, plan)
    finite = NonFiniteGuard(compute.device, state.scaler is not None, explain)
    # Stopped after the last step, an epoch is still to be judged.
    while not progress.finished and (progress.step < plan.total_steps or progress.batch):
        started, seconds_before, images_before = time.perf_counter(), progress.wall_s, progress.images
        timed.seconds = 0.0
        meter = task.meter()
        if progress.batch and state.meter:
            meter.load_state(unpack_state(state.meter, ranks), compute.device)

        def keep(meter: Meter = meter, started: float = started, before: float = seconds_before) -> None:
            finite.check()
            state.meter = pack_states(states_of(meter, ranks))
            progress.wall_s = before + time.perf_counter() - started - timed.seconds
            save("last")
            ranks.wait()  # for the one that writes

        try:
            train_epoch(trainer, state, meter, timed, finite, stop, keep)
            finite.check()
            align(state.model, ranks)
            train_metrics = merge(meter, task.meter(), ranks).compute()
            train_seconds = time.perf_counter() - started - timed.seconds
            val_metrics = {}
            if trainer.validation is not None:
                val_meter = evaluate(
                    trainer, state.eval_model, trainer.validation, plan.batch_size, plan.limit_batches, stop
                )
                if not val_meter.loss_is_finite():
                    raise diverged_in_validation(state, trainer.validation, pipeline, compute, plan)
                val_metrics = val_meter.compute()
        except StoppedError:
            keep()
            raise

        row = {"epoch": float(progress.epoch + 1), "step": float(progress.step)}
        # Mixed labels have no right answer to count.
        row |= {f"train/{k}": v for k, v in train_metrics.items() if k == "loss" or not pipeline.mixes_labels}
        row |= {f"val/{name}": value for name, value in val_metrics.items()}
        row["lr"] = state.optimizer.param_groups[0]["lr"]
        row["images_per_s"] = (progress.images - images_before) / train_seconds
        improved = is_better(row, progress.best, task.monitor)
        if improved:
            progress.best = row
        if progress.batch < plan.batches_per_epoch:  # `steps` ended the training within this epoch
            state.meter = pack_states(states_of(meter, ranks))
        else:
            state.schedule.observe(row.get("val/loss", row["train/loss"]))
            progress.epochs_since_best = 0 if improved else progress.epochs_since_best + 1
            progress.epoch, progress.batch, state.meter = progress.epoch + 1, 0, {}
        patience_over = plan.early_stopping is not None and progress.epochs_since_best >= plan.early_stopping
        progress.finished = progress.step >= plan.total_steps or patience_over
        progress.wall_s = seconds_before + time.perf_counter() - started - timed.seconds
        journal.epoch(progress.step, row, improved)
        save("last", *(["best"] if improved else []))
        journal.saved(row)


def train_epoch(
    trainer: Trainer,
    state: TrainState,
    meter: Meter,
    journal: Logger,
    finite: NonFiniteGuard,
    stop: StopFlag,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """The rest of one epoch. Nothing in it waits for the device except a reading every so many steps."""
    pipeline, compute, plan, training = trainer.pipeline, trainer.compute, trainer.plan, trainer.training
    progress, model, optimizer = state.progress, state.model, state.optimizer
    order = epoch_order(plan.seed, progress.epoch, len(training))
    if plan.unfreeze_epoch is not None and progress.epoch + 1 >= plan.unfreeze_epoch:
        unfreeze(model)  # again in each epoch: a resumed run has a model that was just frozen
    model.train()
    recent = torch.zeros(2, device=compute.device)  # loss sum and count since the last reading
    sums: Tensor | None = None  # loss and count of this step's batches so far
    ranks = compute.ranks
    share, had_images = ranks.share(pipeline), False
    since, images_since = time.perf_counter(), 0
    stored = training.batches(
        order,
        plan.batch_size,
        progress.batch,
        plan.drop_last,
        transform=pipeline.sample_transform(plan.seed, progress.epoch),
        share=share,
    )
    for batch in pipeline.augment_batches(stored, plan.seed, progress.epoch, training.is_cached):
        if progress.batch % plan.accumulate == 0:  # between them there are gradients, which are not saved
            stop.check()
        if progress.batch >= plan.batches_per_epoch or progress.step >= plan.total_steps:
            break
        learning_rate = set_learning_rate(optimizer, state.schedule, progress.step)
        if len(batch):
            batch = share.trim(batch)
            if progress.step == 0 and progress.batch == 0:
                journal.batch_seen(0, batch)
            seed_step(plan.seed, "step", progress.epoch, progress.batch, *ranks.seed)

            outputs, loss_sum, count = train_step(trainer, state, batch)
            with torch.no_grad():
                meter.update(outputs, batch.truth, loss_sum, count)
                own = torch.stack((loss_sum, count)).float()
                sums = own if sums is None else sums + own
                finite.note(loss_sum)
            had_images = True
        elif has_synchronized_norms(model):  # a short last batch did not go round
            with compute.autocast():
                nothing = torch.zeros(
                    0, training.examples.images.shape[1], *pipeline.output_size, device=compute.device
                )
                accompany(model, nothing)
        # What all processes saw of the batch together.
        rest = len(training) - progress.batch * plan.batch_size
        images_seen = len(batch) if ranks.count == 1 else min(plan.batch_size, rest)
        progress.batch += 1
        progress.images += images_seen
        images_since += images_seen
        if progress.batch % plan.accumulate and progress.batch < plan.batches_per_epoch:
            continue

        reads = (progress.step + 1) % plan.log_every_steps == 0 or progress.batch >= plan.batches_per_epoch
        if sums is None:
            sums = torch.zeros(2, device=compute.device)
        if ranks.count > 1:
            combine(state, sums, had_images, finite, ranks)
        norm = apply_gradients(state, plan, sums[1], finite)
        recent += sums
        sums, had_images = None, False
        progress.step += 1
        if state.ema:
            state.ema.update(model, progress.step)

        if reads:
            finite.check()
            loss, counted, grad_norm = torch.cat((recent, norm.reshape(1).to(recent))).tolist()
            elapsed = time.perf_counter() - since
            reading = {
                "loss": loss / max(counted, 1e-12),
                "lr": learning_rate,
                "images_per_s": images_since / max(elapsed, 1e-9),
                "grad_norm": grad_norm,
            }
            journal.reading(progress.step, progress.epoch, progress.batch, reading)
            recent.zero_()
            since, images_since = time.perf_counter(), 0
        saves = plan.save_every_steps is not None and progress.step % plan.save_every_steps == 0
        if saves and progress.batch < plan.batches_per_epoch:
            keep()


def train_step(trainer: Trainer, state: TrainState, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward pass of one augmented batch; its gradients are added to those of the model.

    Returns:
        Outputs (N, ...) float32, the sum of the loss, and the number of terms in that sum; all detached.
    """
    outputs = predict_batch(state.model, batch.images, trainer.compute)
    loss_sum, count = trainer.task.loss(outputs, batch.truth)
    # With accumulation or several ranks the divisor is known only at the optimizer step: see apply_gradients.
    divisor = trainer.plan.batch_size if trainer.plan.sums_losses else count.clamp(min=1e-12)
    loss = loss_sum / divisor
    (state.scaler.scale(loss) if state.scaler else loss).backward()
    return outputs.detach(), loss_sum.detach(), count


def apply_gradients(
    state: TrainState, plan: TrainingPlan, group_count: Tensor, finite: NonFiniteGuard
) -> Tensor:
    """One optimizer step, or none where something is not finite; the gradient norm before clipping."""
    optimizer, scaler = state.optimizer, state.scaler
    if scaler:
        scaler.unscale_(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if plan.sums_losses and gradients:
        scale = plan.batch_size / group_count.clamp(min=1e-12)
        torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage]
    norm = nn.utils.get_total_norm(gradients).to(group_count.device)
    if plan.clip_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(
            [p for g in optimizer.param_groups for p in g["params"]], plan.clip_grad_norm, norm
        )
    step_unless(finite.skip(norm, state.progress.batch - 1), optimizer)
    if scaler:
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def is_better(row: dict[str, float], best: dict[str, float], monitor: tuple[str, str]) -> bool:
    """Whether this epoch beats the best so far, on validation where there is one."""
    name, direction = monitor
    key = f"val/{name}" if f"val/{name}" in row else f"train/{name}"
    if key not in row:
        key, direction = "train/loss", "min"
    if not best or key not in best or math.isnan(best[key]):
        return True
    return row[key] > best[key] if direction == "max" else row[key] < best[key]
