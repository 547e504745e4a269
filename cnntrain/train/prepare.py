"""Prepare a training run once its data are known: the plan, the optimizer, `auto` values and the initial state."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from cnntrain.config.schema import Settings
from cnntrain.data.load import DataSplits
from cnntrain.data.loader import Loader
from cnntrain.errors import MachineError, UserError, is_out_of_memory
from cnntrain.memory import free_host_bytes, peak_memory_mib, reset_peak_memory
from cnntrain.train.device import Compute
from cnntrain.train.distributed import SINGLE, convert_sync_batchnorm, has_batch_norm
from cnntrain.train.loop import Trainer
from cnntrain.train.lr_finder import RangeTest, choose_learning_rate, range_test
from cnntrain.train.optim import make_optimizer
from cnntrain.train.setup import Components, build_schedule
from cnntrain.train.signals import StopFlag, stop_flag
from cnntrain.train.state import ModelEMA, TrainingPlan, TrainState
from cnntrain.train.step_timer import StepTimer
from cnntrain.transfer import free_bytes

log = logging.getLogger("cnntrain")
MIN_STEPS_PER_EPOCH = 16  # training with a few large steps per epoch learns little
GPU_SHARE = 0.9  # of the free GPU memory; the rest is a reserve because memory use varies between steps
CPU_SHARE = 0.25  # of the free host memory, which other programs need too
MIN_SPEEDUP = 1.05  # in images/s, when the batch size doubles on a CPU
SMALLEST_ON_CPU = 32
TIMED_WINDOWS = 3


def resolve_plan(components: Components, data: DataSplits) -> TrainingPlan:
    """Make the plan for a dataset; resolve `batch_size=auto` and `optimizer.lr=auto` in `components.settings`."""
    settings, world = components.settings, components.compute.world
    has_auto_lr = settings.optimizer.get("lr") == "auto"
    if has_auto_lr:  # any number, until the range test has found one
        settings = components.settings = with_learning_rate(settings, 1.0)
    batch_size = settings.fixed_batch_size or search_batch_size(components, data)
    settings = components.settings = dataclasses.replace(settings, batch_size=batch_size)
    plan = make_plan(settings, components, len(data.train), batch_size)
    if has_auto_lr:
        # On rank 0 alone, so that the result does not depend on the number of ranks.
        with stop_flag() as stop:
            rate = choose_learning_rate(run_range_test(components, data, plan, stop)) if world.is_main else None
        components.settings = with_learning_rate(settings, world.broadcast(rate))
    return plan


def make_plan(settings: Settings, components: Components, count: int, batch_size: int) -> TrainingPlan:
    """Compute the number of batches and steps for `count` training images; log what differs from the settings."""
    compute, world = components.compute, components.compute.world
    has_norm = has_batch_norm(components.model)
    rest, needed = count % batch_size, smallest_batch(has_norm, compute)
    if count < world.size:
        raise UserError(f"launch.devices: {count} training images are too few for {world.size} processes")
    if drop_last := count > batch_size and 0 < rest < needed:
        who = "BatchNorm needs" if has_norm else f"{world.size} processes need"
        log.info("the last batch of each epoch is dropped: it has %d images, and %s at least %d", rest, who, needed)
    if has_norm and world.size > 1 and compute.device.type != "cuda":
        log.info(
            "BatchNorm is not synchronized on CPUs: each process normalizes its own part of a batch (%d images)",
            batch_size // world.size,
        )
    batches = count // batch_size if drop_last else -(-count // batch_size)
    if settings.limit_batches is not None:
        batches = min(batches, settings.limit_batches)
        log.info(
            "limit_batches=%d: each epoch, validation and test uses at most %d images; the metrics are not those of "
            "the whole dataset",
            settings.limit_batches,
            settings.limit_batches * batch_size,
        )
    steps_per_epoch = -(-batches // settings.accumulate)
    plan = TrainingPlan(
        seed=settings.seed,
        batch_size=batch_size,
        batches_per_epoch=batches,
        steps_per_epoch=steps_per_epoch,
        total_steps=settings.steps or settings.epochs * steps_per_epoch,
        accumulate=settings.accumulate,
        clip_grad_norm=settings.clip_grad_norm,
        early_stopping=settings.early_stopping,
        log_every_steps=settings.log.every_steps,
        save_every_steps=settings.checkpoint.every_steps,
        limit_batches=settings.limit_batches,
        drop_last=drop_last,
        unfreeze_epoch=settings.model.get("unfreeze"),
        processes=world.size,
    )
    if plan.unfreeze_epoch and (plan.unfreeze_epoch - 1) * steps_per_epoch >= plan.total_steps:
        log.warning("model.unfreeze=%d: the training ends before that epoch", plan.unfreeze_epoch)
    return plan


def smallest_batch(has_norm: bool, compute: Compute) -> int:
    """Return the number of images that a batch needs so that each rank gets one, and each BatchNorm two."""
    size = compute.world.size
    shares = 1 if compute.device.type == "cuda" else size  # SyncBatchNorm uses the images of all ranks
    return max(size, 2 * shares if has_norm else 1)


def run_range_test(
    components: Components, data: DataSplits, plan: TrainingPlan, stop: StopFlag, ends_at: float = math.inf
) -> RangeTest:
    """Run the learning rate range test with the `lr_find` settings on a copy of the network.

    `lr-find`, `optimizer.lr=auto` and `check` all call this function, so their results agree.

    Args:
        ends_at: deadline in `time.monotonic()` seconds.
    """
    settings, compute = components.settings, dataclasses.replace(components.compute, world=SINGLE)
    plan = dataclasses.replace(plan, processes=1)

    def optimizer(model: nn.Module) -> Optimizer:
        return make_optimizer(settings, model, compute)

    with contextlib.closing(components.loader(data.train, augmented=True)) as loader:
        trainer = Trainer(components.task, components.pipeline, compute, plan, loader)
        return range_test(trainer, components.model, optimizer, settings.lr_find, stop, ends_at)


def with_learning_rate(settings: Settings, rate: float) -> Settings:
    return dataclasses.replace(settings, optimizer={**settings.optimizer, "lr": rate})


def prepare_training(components: Components, data: DataSplits) -> tuple[TrainingPlan, TrainState]:
    """Build the plan and the initial state of a training run; move the model to its device."""
    plan, compute = resolve_plan(components, data), components.compute
    settings = components.settings
    schedule = build_schedule(settings, plan.total_steps, plan.steps_per_epoch)
    optimizer = make_optimizer(settings, components.model, compute)
    if compute.world.size > 1 and compute.device.type == "cuda":
        components.model = convert_sync_batchnorm(components.model)
    compute.place(components.model)
    ema = ModelEMA(components.model, settings.ema_decay) if settings.ema_decay else None
    return plan, TrainState(components.model, optimizer, schedule, compute.loss_scaler(), ema)


def search_batch_size(components: Components, data: DataSplits) -> int:
    """Find a power of two for `batch_size=auto` by training steps on copies; log the reason.

    On a GPU, return the largest size whose step needs at most 90 % of the free memory. On a CPU, return the smallest
    size of at least 32 for which doubling makes training less than 5 % faster or needs a quarter of the free memory.
    An epoch always has at least 16 steps.
    """
    with contextlib.closing(components.loader(data.train, augmented=True)) as loader:
        size, reason = _search_batch_size(components, loader)
    log.info("batch_size=auto: using batch_size=%d (%s); optimizer.lr is not changed", size, reason)
    return size


def _search_batch_size(components: Components, loader: Loader) -> tuple[int, str]:
    compute = dataclasses.replace(components.compute, compile="off")  # each batch size would be compiled
    device, seed = compute.device, components.settings.seed

    def step_timer(size: int) -> StepTimer:
        plan = TrainingPlan(seed, size, batches_per_epoch=1, steps_per_epoch=1, total_steps=1)
        return StepTimer(components, plan, loader, compute)

    min_size = 2 if has_batch_norm(components.model) else 1
    max_size = max(min_size, power_of_two(len(loader) // MIN_STEPS_PER_EPOCH))
    if device.type == "cuda":
        allowed_mib = (torch.cuda.memory_allocated(device) + GPU_SHARE * free_bytes(device)) / 2**20
        # As if the speed were proportional to the size: the largest size that fits.
        return fastest(
            lambda size: size if _fits(step_timer, device, size, allowed_mib) else None,
            max_size,
            min_size,
            start=min_size,
            too_large="does not fit in the device's memory",
        )
    return fastest(lambda size: _images_per_s(step_timer, device, size), max_size, min_size)


def power_of_two(limit: int) -> int:
    """Return the largest power of two up to `limit`, at least 1."""
    return 1 << (max(limit, 1).bit_length() - 1)


def fastest(
    images_per_s: Callable[[int], float | None],
    max_size: int,
    min_size: int = 1,
    start: int = SMALLEST_ON_CPU,
    too_large: str = "needs more than a quarter of the free memory",
) -> tuple[int, str]:
    """Return the smallest power of two from `start` to `max_size` for which doubling gains less than 5 %, and why.

    Smaller sizes are tried if `start` is too large.

    Args:
        images_per_s: returns the speed for a batch size, or None if it is too large.
        too_large: the reason in this case.
    """
    size = max(min_size, min(start, max_size))
    speed = images_per_s(size)
    if speed is None:
        while size > min_size:
            size //= 2
            if images_per_s(size) is not None:
                return size, f"{size * 2} {too_large}"
        raise MachineError(f"batch_size=auto: a step with batch_size={size} {too_large}")
    while size * 2 <= max_size:
        doubled = images_per_s(size * 2)
        if doubled is None:
            return size, f"{size * 2} {too_large}"
        if doubled < MIN_SPEEDUP * speed:
            return size, f"{size * 2} is {doubled / speed:.2f} times as fast"
        size, speed = size * 2, doubled
    return size, f"with more, an epoch would have fewer than {MIN_STEPS_PER_EPOCH} steps"


def _fits(make_step_timer: Callable[[int], StepTimer], device: torch.device, size: int, allowed_mib: float) -> bool:
    reset_peak_memory(device)
    try:
        make_step_timer(size).warm_up()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        torch.cuda.empty_cache()
    return peak_memory_mib(device) <= allowed_mib


def _images_per_s(make_step_timer: Callable[[int], StepTimer], device: torch.device, size: int) -> float | None:
    """Return the speed of the fastest of a few windows; None if the steps need too much additional memory."""
    free_mib = free_host_bytes() / 2**20
    reset_peak_memory(device)
    before_mib = peak_memory_mib(device)
    timer = make_step_timer(size)
    timer.warm_up()
    if peak_memory_mib(device) - before_mib > CPU_SHARE * free_mib:
        return None
    started, best = time.monotonic(), 0.0
    for _ in range(TIMED_WINDOWS):
        images, seconds = timer.bare()
        best = max(best, images / seconds)
        if time.monotonic() - started > TIMED_WINDOWS:
            break
    return best
