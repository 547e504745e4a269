"""From settings to the parts of a run: device, data, task, augmentation, model. Shared by the commands."""

import dataclasses
import logging
import math
from dataclasses import dataclass
from functools import partial

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
from cnntrain.train.distributed import SINGLE, World
from cnntrain.train.lr_finder import RangeTest, range_test, settle
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
from cnntrain.train.state import TrainingPlan
from cnntrain.train.step_timer import StepTimer, make_step_timer
from cnntrain.types import DataSpec

log = logging.getLogger("cnntrain")


@dataclass
class Components:
    """The parts of a run before any data has been read."""

    settings: Settings
    compute: Compute
    source: Source
    data_settings: DataSettings
    spec: DataSpec
    task: Task
    model: nn.Module
    pipeline: Pipeline
    learned: Preprocessing | None = None  # preprocessing of the pretrained weights

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
        """Batches of a split; with `augmented`, by workers where a transform of torchvision wants single images."""
        chosen, per_sample = self.data_settings, augmented and bool(self.pipeline.per_sample)
        if per_sample:
            log.info(
                "augment: %s change single images, so workers read them", ", ".join(self.pipeline.per_sample)
            )
            names = [item.name for item in self.pipeline.per_sample.values()]
            if "RandomResizedCrop" in names:
                log.warning(
                    "augment: torchvision's RandomResizedCrop crops images that are already resized to data.size and "
                    "upsamples the crop; augment=random_resized_crop crops from images at a higher resolution"
                )
        return make_loader(
            examples, self.compute.device, chosen.workers, chosen.timeout_s, chosen.cache, per_sample
        )


def assemble(
    settings: Settings, known: DataSpec | None = None, world: World = SINGLE, resumes: bool = False
) -> Components:
    """Build everything that needs no data, and run the network on shapes alone.

    Args:
        known: facts that hold whatever the data say now (a checkpoint's: classes, mean and std).
        world: the ranks that train together.
        resumes: the weights will come from a checkpoint, so pretrained weights are not loaded.

    Raises:
        UserError: a part can't be built, or the network does not fit its input; nothing has been read yet.
    """
    prepare_torch(settings.threads, settings.deterministic, world)
    compute = choose_compute(
        settings.device, settings.precision, settings.channels_last, world, settings.compile
    )
    weights = None if known or resumes else find_pretrained_weights(settings)
    settings = follow_weights(settings, weights)
    source, _ = build_source(settings)
    facts = known or source.spec()
    settings = follow_statistics(settings, weights, facts.channels)
    _, data_settings = split_data(settings)
    spec = known or with_configured_statistics(facts, data_settings)
    pipeline = build_pipeline(settings, spec)
    task = build_task(settings, spec, pipeline)
    if pipeline.can_flip and not spec.hflip_ok:
        log.warning(
            "augment: a mirrored image of these data means something else (digits, text); take the flip out"
        )
    model = build_model(settings, spec, task, pipeline.output_size, weights, show_warnings=known is None)
    if not known:
        check_optimization(settings, compute)
        log_frozen_layers(settings, model, resumes)
    learned = weights.preprocessing if weights else None
    return Components(
        settings, compute, source, data_settings, spec, task, model.to(compute.device), pipeline, learned
    )


def check_optimization(settings: Settings, compute: Compute) -> None:
    """Check all keys of `optimizer` and `schedule` before any data is read.

    Raises:
        UserError: a key is invalid.
    """
    check_optimizer(settings, compute)
    build_schedule(settings, total_steps=1, steps_per_epoch=1)


def follow_weights(settings: Settings, weights: Weights | None) -> Settings:
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


def follow_statistics(settings: Settings, weights: Weights | None, channels: int) -> Settings:
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


def build_training_parts(assembly: Components, data: Data) -> tuple[TrainingPlan, Optimizer, Schedule]:
    """How long to train, and with what: resolved from settings and the number of training images.

    `batch_size=auto` and `optimizer.lr=auto` become numbers here, in `assembly.settings` too.

    Raises:
        UserError: no learning rate can be found.
    """
    settings, count, world = assembly.settings, len(data.train), assembly.compute.world
    if rate_is_sought := settings.optimizer.get("lr") == "auto":
        settings = assembly.settings = with_rate(settings, 1.0)  # stands in until it is found
    batch_size = settings.fixed_batch_size or find_batch_size(assembly, data)
    settings = assembly.settings = dataclasses.replace(settings, batch_size=batch_size)
    has_norm = has_batch_norm(assembly.model)
    rest, needed = count % batch_size, smallest_batch(has_norm, assembly.compute)
    if count < world.size:
        raise UserError(f"launch.devices: {count} training images are too few for {world.size} processes")
    if drop_last := count > batch_size and 0 < rest < needed:
        log.info(
            "the last batch of each epoch is left out: it has %d images, and %s at least %d", rest,
            "BatchNorm needs" if has_norm else f"{world.size} processes need", needed,
        )  # fmt: skip
    if has_norm and world.size > 1 and assembly.compute.device.type != "cuda":
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
    schedule = build_schedule(settings, plan.total_steps, steps_per_epoch)
    if rate_is_sought:
        # The leader alone tries them, as one process would.
        with stop_flag() as stop:
            rate = settle(try_learning_rates(assembly, data, plan, stop)) if world.is_main else None
        settings = assembly.settings = with_rate(settings, world.broadcast(rate))
    return plan, make_optimizer(settings, assembly.model, assembly.compute), schedule


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def smallest_batch(has_norm: bool, compute: Compute) -> int:
    """Return the number of images that a batch needs so that each rank gets one, and each BatchNorm two."""
    size = compute.world.size
    shares = 1 if compute.device.type == "cuda" else size  # SyncBatchNorm uses the images of all ranks
    return max(size, 2 * shares if has_norm else 1)


def find_batch_size(assembly: Components, data: Data) -> int:
    """What `batch_size=auto` comes to, by steps of copies; see `choose_batch_size`."""
    loader = assembly.loader(data.train, augmented=True)
    compute = dataclasses.replace(assembly.compute, compile="off")  # each size would be compiled

    def rig(size: int) -> StepTimer:
        plan = TrainingPlan(
            assembly.settings.seed, size, batches_per_epoch=1, steps_per_epoch=1, total_steps=1
        )
        return make_step_timer(assembly.model, partial(make_optimizer, assembly.settings), assembly.task,
                        compute, plan, loader, assembly.pipeline, assembly.settings.ema_decay)  # fmt: skip

    size = choose_batch_size(
        rig, assembly.compute.device, len(data.train), 1 + has_batch_norm(assembly.model)
    )
    loader.close()
    return size


def try_learning_rates(
    assembly: Components, data: Data, plan: TrainingPlan, stop: StopFlag, ends_at: float = math.inf
) -> RangeTest:
    """Run the learning rate range test with the `lr_find` settings on a copy of the network.

    `lr-find`, `optimizer.lr=auto` and `check` all call this function, so their results agree.

    Args:
        ends_at: deadline in `time.monotonic()` seconds.
    """
    chosen, loader = assembly.settings.lr_find, assembly.loader(data.train, augmented=True)
    compute = dataclasses.replace(assembly.compute, world=SINGLE)
    plan = dataclasses.replace(plan, processes=1)
    try:
        return range_test(
            assembly.model, lambda model: make_optimizer(assembly.settings, model, compute), loader, assembly.pipeline,
            assembly.task, compute, plan, stop, chosen.lowest, chosen.highest, chosen.steps, ends_at,
        )  # fmt: skip
    finally:
        loader.close()


def with_rate(settings: Settings, rate: float) -> Settings:
    """The settings with this learning rate."""
    return dataclasses.replace(settings, optimizer={**settings.optimizer, "lr": rate})
