"""Build the components of a run from its settings, and resolve `auto` values. Shared by all commands."""

import dataclasses
import logging
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from cnntrain.augment.pipeline import Pipeline
from cnntrain.config.schema import DataSettings, Settings
from cnntrain.data.examples import Examples, Source
from cnntrain.data.load import Data, align_labels, load_data
from cnntrain.data.loader import Loader, make_loader
from cnntrain.errors import UserError
from cnntrain.models.modify import count_trainable, is_pretrained
from cnntrain.models.pretrained import Preprocessing, Weights
from cnntrain.tasks.task import Task
from cnntrain.train.batch_size import choose_batch_size
from cnntrain.train.device import Compute, choose_compute, prepare_torch
from cnntrain.train.distributed import SINGLE, World, synchronize_norms
from cnntrain.train.loop import Trainer
from cnntrain.train.lr_finder import RangeTest, choose_learning_rate, range_test
from cnntrain.train.optim import check_optimizer, make_optimizer
from cnntrain.train.parts import (
    build_model,
    build_pipeline,
    build_schedule,
    build_source,
    build_task,
    find_pretrained_weights,
    split_data,
    with_configured_statistics,
)
from cnntrain.train.schedule import Schedule
from cnntrain.train.signals import StopFlag, stop_flag
from cnntrain.train.state import ModelEMA, TrainingPlan, TrainState
from cnntrain.train.step_timer import StepTimer, make_step_timer
from cnntrain.types import DataSpec

log = logging.getLogger("cnntrain")


@dataclass
class Components:
    """The parts of a run.

    Attributes:
        settings: `auto` values are replaced once they are resolved.
        data_settings: settings common to all data sources.
        spec: mean and std are None until `load` has measured them, unless they are configured.
        pretraining: preprocessing of the pretrained weights, if known.
    """

    settings: Settings
    compute: Compute
    source: Source
    data_settings: DataSettings
    spec: DataSpec
    task: Task
    model: nn.Module
    pipeline: Pipeline
    pretraining: Preprocessing | None = None

    def load(self, augmented: bool = True) -> Data:
        """Load the data and pass its statistics (mean and std) to the task and the pipeline.

        Args:
            augmented: whether training images will be augmented; random crops need images at a higher resolution.
        """
        chosen = self.data_settings
        magnification = self.pipeline.magnification if augmented else 1.0
        data = load_data(
            self.source, chosen.val_fraction, chosen.folds, chosen.fold, chosen.split_seed, chosen.limit,
            chosen.cache, chosen.scan, magnification, chosen.bits,
        )  # fmt: skip
        if self.spec.mean is None:
            self.spec = data.spec
        align_labels(data, self.spec)
        data.spec = self.spec
        self.pipeline = build_pipeline(self.settings, self.spec)
        scale = self.task.output_scale
        self.task = build_task(self.settings, self.spec, self.pipeline)
        self.task.output_scale = scale
        self.task.prepare(data.train.targets)
        return data

    def loader(self, examples: Examples, augmented: bool = False) -> Loader:
        """Build a loader for a split.

        Args:
            augmented: apply torchvision transforms of single images, in workers.
        """
        chosen, per_sample = self.data_settings, augmented and bool(self.pipeline.per_sample)
        if per_sample:
            log.info(
                "augment: %s transform single images, so workers load them",
                ", ".join(self.pipeline.per_sample),
            )
            names = [item.name for item in self.pipeline.per_sample.values()]
            if "RandomResizedCrop" in names:
                log.warning(
                    "augment: torchvision's RandomResizedCrop crops images that are already resized to data.size and "
                    "upsamples the crop; augment=random_resized_crop crops from images at a higher resolution"
                )
        return make_loader(examples, self.compute.device, chosen.workers, chosen.timeout_s, chosen.cache, per_sample)


def build_components(
    settings: Settings, spec: DataSpec | None = None, world: World = SINGLE, resumes: bool = False
) -> Components:
    """Build the parts of a run without reading data; check all settings and the shapes of the network.

    Args:
        spec: data spec of the checkpoint from which the weights will be loaded; default: that of the data source.
        world: the ranks that train together.
        resumes: the weights will be loaded from a checkpoint, so pretrained weights are not.

    Raises:
        UserError: a setting is invalid, or the network does not fit its input.
    """
    is_restored = spec is not None
    prepare_torch(settings.threads, settings.deterministic, world)
    compute = choose_compute(settings.device, settings.precision, settings.channels_last, world, settings.compile)
    weights = None if is_restored or resumes else find_pretrained_weights(settings)
    settings = use_pretrained_size(settings, weights)
    source, _ = build_source(settings)
    source_spec = spec or source.spec()
    settings = use_pretrained_statistics(settings, weights, source_spec.channels)
    _, data_settings = split_data(settings)
    spec = spec or with_configured_statistics(source_spec, data_settings)
    pipeline = build_pipeline(settings, spec)
    task = build_task(settings, spec, pipeline)
    if pipeline.can_flip and not spec.hflip_ok:
        log.warning("augment: a mirrored image of these data means something else (digits, text); take the flip out")
    model = build_model(settings, spec, task, pipeline.output_size, weights, show_warnings=not is_restored)
    if not is_restored:
        check_optimization(settings, compute)
        log_frozen_layers(settings, model, resumes)
    pretraining = weights.preprocessing if weights else None
    return Components(
        settings, compute, source, data_settings, spec, task, model.to(compute.device), pipeline, pretraining
    )


def check_optimization(settings: Settings, compute: Compute) -> None:
    """Check all keys of `optimizer` and `schedule` before any data is read.

    Raises:
        UserError: a key is invalid.
    """
    check_optimizer(settings, compute)
    build_schedule(settings, total_steps=1, steps_per_epoch=1)


def use_pretrained_size(settings: Settings, weights: Weights | None) -> Settings:
    """Set the stem and the image size to those of the pretrained weights where the settings leave them open."""
    if weights is None:
        return settings
    model, data = dict(settings.model), dict(settings.data)
    if model.get("stem") == "auto" and weights.stem and str(model["_target_"]).startswith("cnntrain.models."):
        model["stem"] = weights.stem
    size = weights.preprocessing.size if weights.preprocessing else None
    if size and "size" in data and data["size"] is None:
        data["size"] = size[0] if size[0] == size[1] else list(size)
        log.info(
            "model.pretrained=%s: using the image size of these weights, data.size=%s",
            weights.name,
            data["size"],
        )
    return dataclasses.replace(settings, model=model, data=data)


def use_pretrained_statistics(settings: Settings, weights: Weights | None, channels: int) -> Settings:
    """Set mean and std to those of the pretrained weights unless the settings give them."""
    if weights is None or (settings.data.get("mean"), settings.data.get("std")) != (None, None):
        return settings
    if weights.preprocessing is None:
        log.info(
            "model.pretrained=%s: these weights have no known mean and std; measuring data.mean and data.std",
            weights.name,
        )
        return settings
    mean, std = (list(values) for values in weights.preprocessing.statistics(channels))
    shown = ("[" + ",".join(f"{value:.4g}" for value in values) + "]" for values in (mean, std))
    log.info(
        "model.pretrained=%s: using the statistics of these weights, data.mean=%s data.std=%s",
        weights.name,
        *shown,
    )
    return dataclasses.replace(settings, data={**settings.data, "mean": mean, "std": std})


def log_frozen_layers(settings: Settings, model: nn.Module, resumes: bool) -> None:
    """Log the number of trainable parameters if layers are frozen; warn if frozen layers have random weights."""
    freeze = settings.model.get("freeze")
    if freeze is None:
        return
    trained, total = count_trainable(model)
    if resumes or is_pretrained(model):
        log.info("model.freeze=%s: %s of %s parameters are trainable", freeze, f"{trained:,}", f"{total:,}")
        return
    log.warning(
        "model.freeze=%s without model.pretrained: %s of %s parameters are trainable, the others keep random weights; "
        "set model.pretrained (DEFAULT, a file, or a run folder), or set model.freeze=null",
        freeze, f"{trained:,}", f"{total:,}",
    )  # fmt: skip


def build_training_parts(components: Components, data: Data) -> tuple[TrainingPlan, Optimizer, Schedule]:
    """Build the plan, the optimizer and the schedule for a dataset.

    Resolves `batch_size=auto` and `optimizer.lr=auto`, in `components.settings` too.

    Raises:
        UserError: there are fewer images than ranks, or no learning rate can be found.
    """
    settings, world = components.settings, components.compute.world
    has_auto_lr = settings.optimizer.get("lr") == "auto"
    if has_auto_lr:  # any number, until the range test has found one
        settings = components.settings = with_learning_rate(settings, 1.0)
    batch_size = settings.fixed_batch_size or search_batch_size(components, data)
    settings = components.settings = dataclasses.replace(settings, batch_size=batch_size)
    plan = make_plan(settings, components, len(data.train), batch_size)
    schedule = build_schedule(settings, plan.total_steps, plan.steps_per_epoch)
    if has_auto_lr:
        # On rank 0 alone, so that the result does not depend on the number of ranks.
        with stop_flag() as stop:
            rate = None
            if world.is_main:
                rate = choose_learning_rate(run_range_test(components, data, plan, stop))
        settings = components.settings = with_learning_rate(settings, world.broadcast(rate))
    return plan, make_optimizer(settings, components.model, components.compute), schedule


def make_plan(settings: Settings, components: Components, count: int, batch_size: int) -> TrainingPlan:
    """Compute the number of batches and steps for `count` training images; log what differs from the settings."""
    compute, world = components.compute, components.compute.world
    has_norm = has_batch_norm(components.model)
    rest, needed = count % batch_size, smallest_batch(has_norm, compute)
    if count < world.size:
        raise UserError(f"launch.devices: {count} training images are too few for {world.size} processes")
    if drop_last := count > batch_size and 0 < rest < needed:
        log.info(
            "the last batch of each epoch is left out: it has %d images, and %s at least %d", rest,
            "BatchNorm needs" if has_norm else f"{world.size} processes need", needed,
        )  # fmt: skip
    if has_norm and world.size > 1 and compute.device.type != "cuda":
        log.info(
            "BatchNorm is not synchronized on CPUs: it normalizes each process's part of a batch (%d images) by itself",
            batch_size // world.size,
        )
    batches = count // batch_size if drop_last else -(-count // batch_size)
    if settings.limit_batches is not None:
        batches = min(batches, settings.limit_batches)
        log.info(
            "limit_batches=%d: each epoch, validation and test uses at most %d images; the metrics are not those of "
            "the whole data set",
            settings.limit_batches, settings.limit_batches * batch_size,
        )  # fmt: skip
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


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def smallest_batch(has_norm: bool, compute: Compute) -> int:
    """Return the number of images that a batch needs so that each rank gets one, and each BatchNorm two."""
    size = compute.world.size
    shares = 1 if compute.device.type == "cuda" else size  # SyncBatchNorm uses the images of all ranks
    return max(size, 2 * shares if has_norm else 1)


def search_batch_size(components: Components, data: Data) -> int:
    """Find the batch size for `batch_size=auto`; see `choose_batch_size`."""
    loader = components.loader(data.train, augmented=True)
    compute = dataclasses.replace(components.compute, compile="off")  # each batch size would be compiled

    def step_timer(size: int) -> StepTimer:
        seed = components.settings.seed
        plan = TrainingPlan(seed, size, batches_per_epoch=1, steps_per_epoch=1, total_steps=1)
        return make_step_timer(components, plan, loader, compute)

    min_size = 2 if has_batch_norm(components.model) else 1
    size = choose_batch_size(step_timer, compute.device, len(data.train), min_size)
    loader.close()
    return size


def run_range_test(
    components: Components, data: Data, plan: TrainingPlan, stop: StopFlag, ends_at: float = math.inf
) -> RangeTest:
    """Run the learning rate range test with the `lr_find` settings on a copy of the network.

    `lr-find`, `optimizer.lr=auto` and `check` all call this function, so their results agree.

    Args:
        ends_at: deadline in `time.monotonic()` seconds.
    """
    settings, loader = components.settings, components.loader(data.train, augmented=True)
    compute = dataclasses.replace(components.compute, world=SINGLE)
    plan = dataclasses.replace(plan, processes=1)
    trainer = Trainer(components.task, components.pipeline, compute, plan, loader)

    def optimizer(model: nn.Module) -> Optimizer:
        return make_optimizer(settings, model, compute)

    try:
        return range_test(trainer, components.model, optimizer, settings.lr_find, stop, ends_at)
    finally:
        loader.close()


def with_learning_rate(settings: Settings, rate: float) -> Settings:
    return dataclasses.replace(settings, optimizer={**settings.optimizer, "lr": rate})


def prepare_training(components: Components, data: Data) -> tuple[TrainingPlan, TrainState]:
    """Build the plan and the initial state of a training run; move the model to its device."""
    settings, compute = components.settings, components.compute
    plan, optimizer, schedule = build_training_parts(components, data)
    if compute.world.size > 1 and compute.device.type == "cuda":
        components.model = synchronize_norms(components.model)
    compute.place(components.model)
    state = TrainState(
        components.model,
        optimizer,
        schedule,
        torch.amp.GradScaler(compute.device.type) if compute.precision == "fp16" else None,
        ModelEMA(components.model, settings.ema_decay) if settings.ema_decay else None,
    )
    return plan, state
