"""Time the training loop and the bare training step on copies, for `cnntrain bench` and `batch_size=auto`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from cnntrain.augment.pipeline import Pipeline
from cnntrain.data.loader import Loader
from cnntrain.errors import DivergedError
from cnntrain.train.device import Compute
from cnntrain.train.loop import Logger, Trainer, train_epoch, train_step
from cnntrain.train.nonfinite import NonFiniteGuard
from cnntrain.train.optim import make_optimizer
from cnntrain.train.schedule import Constant
from cnntrain.train.signals import StopFlag
from cnntrain.train.state import ModelEMA, Progress, TrainingPlan, TrainState
from cnntrain.types import Batch

if TYPE_CHECKING:
    from cnntrain.train.setup import Components

ENDLESS = 2**40  # batches per epoch, so that no window reaches the end of an epoch
LEAD_IN_STEPS = 2  # steps of the loop before a window, which fill queues and caches


class StepTimer:
    """Time windows of training steps with learning rate 0, on copies of model and optimizer.

    Args:
        plan: its batch size, accumulation and clipping are used.
        loader: loader of the training images.
        compute: default: that of the components.
        logger: logger of the training loop; default: none.

    Attributes:
        window_s: target length of a window in seconds; a window has at least one step.
        step_s: duration of a bare step in seconds, measured by `warm_up`.
    """

    def __init__(
        self,
        components: Components,
        plan: TrainingPlan,
        loader: Loader,
        compute: Compute | None = None,
        logger: Logger | None = None,
    ) -> None:
        self.loader, self.pipeline, self.logger = loader, components.pipeline, logger or Logger()
        self.compute, self.window_s, self.step_s = compute or components.compute, 0.5, 0.0
        model, schedule = copy.deepcopy(components.model), Constant(total_steps=1, steps_per_epoch=1)
        self.compute.place(model)
        optimizer = make_optimizer(components.settings, model, self.compute)
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"] = 0.0
        decay = components.settings.ema_decay
        ema = ModelEMA(model, decay) if decay else None
        self.state = TrainState(model, optimizer, schedule, self.compute.loss_scaler(), ema)
        self.plan = replace(
            plan,
            batches_per_epoch=ENDLESS,
            steps_per_epoch=ENDLESS,
            drop_last=len(loader) >= plan.batch_size,
            save_every_steps=None,
            limit_batches=None,
            unfreeze_epoch=None,
        )
        self.trainer = Trainer(components.task, self.pipeline, self.compute, self.plan, RepeatingLoader(loader))
        transform = self.pipeline.sample_transform(plan.seed, 0)
        self.stored = next(iter(loader.batches(torch.arange(len(loader)), plan.batch_size, transform=transform)))
        augmented = self.pipeline(self.stored, plan.seed, 0)
        images = augmented.images.contiguous(memory_format=self.compute.memory_format)
        self.augmented = replace(augmented, images=images)

    def warm_up(self) -> None:
        """Run two bare steps; the second one determines the number of steps per window."""
        self._bare_steps(1)
        self.step_s = self._bare_steps(1)

    @property
    def window(self) -> tuple[int, int]:
        """Number of steps between two log entries, and number of steps per window."""
        every = min(self.plan.log_every_steps, max(1, int(self.window_s / self.step_s)))
        return every, every * max(1, round(self.window_s / (every * self.step_s)))

    def bare(self) -> tuple[int, float]:
        """Time a window of bare steps (forward, backward, optimizer step) on one batch; return images and seconds."""
        steps = self.window[1]
        seconds = self._bare_steps(steps)
        return steps * self.plan.accumulate * len(self.augmented), seconds

    def loop(self) -> tuple[int, float]:
        """Time a window of the training loop; return images and seconds."""
        return self._loop(self.trainer.train_loader, self.pipeline, self.logger)

    def parts(self) -> dict[str, Callable[[], tuple[int, float]]]:
        """Return timing functions, each with one more part of the training than the one before it.

        The first is the bare step, the last the whole training loop. The cost of a part is the difference to the one
        before it, so work that overlaps with the device's work costs nothing.
        """
        identity = cast("Pipeline", _IdentityPipeline())
        augmented, stored = RepeatingLoader(self.loader, self.augmented), RepeatingLoader(self.loader, self.stored)
        parts = {
            "step": self.bare,
            "metrics": lambda: self._loop(augmented, identity, Logger()),
            "logging": lambda: self._loop(augmented, identity, self.logger),
            "augment": lambda: self._loop(stored, self.pipeline, self.logger),
        }
        images = self.loader.examples.images
        cached_on_gpu = getattr(self.loader, "images", images) is not images
        if self.compute.device.type != "cpu" and not cached_on_gpu:
            on_host = self.stored.images.cpu()
            pinned = on_host.pin_memory() if self.compute.device.type == "cuda" else on_host
            copied = RepeatingLoader(self.loader, replace(self.stored, images=pinned), self.compute.device)
            parts["transfer"] = lambda: self._loop(copied, self.pipeline, self.logger)
        return {**parts, "data": self.loop}

    def _bare_steps(self, steps: int) -> float:
        state, optimizer, scaler = self.state, self.state.optimizer, self.state.scaler
        vars(optimizer).pop("found_inf", None)  # set by the training loop
        state.model.train()
        started = self._now()
        for _ in range(steps):
            for _ in range(self.plan.accumulate):
                train_step(self.trainer, state, self.augmented)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self._now() - started

    def _loop(self, loader: Loader, pipeline: Pipeline, logger: Logger) -> tuple[int, float]:
        every, steps = self.window
        first = 2 * every  # step of the first log entry; not 0, where the training logs its first batch
        self.state.progress = Progress(step=first - min(LEAD_IN_STEPS, every))
        timestamps = _TimestampLogger(logger)
        message = "the loss or a gradient was not finite during timing (batch {})"
        guard = NonFiniteGuard(
            self.compute.device, self.state.scaler is not None, lambda batch: DivergedError(message.format(batch))
        )
        plan = replace(self.plan, log_every_steps=every, total_steps=first + steps)
        trainer = replace(self.trainer, pipeline=pipeline, plan=plan, train_loader=loader)
        train_epoch(trainer, self.state, trainer.task.meter(), timestamps, guard, StopFlag())
        # Each log entry is a host sync. The first one ends the lead-in.
        seconds = timestamps.seconds[-1] - timestamps.seconds[0]
        return steps * plan.accumulate * len(self.augmented), seconds

    def _now(self) -> float:
        if self.compute.device.type == "cuda":
            torch.cuda.synchronize(self.compute.device)
        return time.perf_counter()


class RepeatingLoader(Loader):
    """Repeat the batches of a loader forever; never cached, so that each batch is augmented in its own window.

    Args:
        fixed: repeat this batch instead.
        device: copy its images from the host to this device each time.
    """

    def __init__(self, loader: Loader, fixed: Batch | None = None, device: torch.device | None = None) -> None:
        self.loader, self.fixed, self.device = loader, fixed, device

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, *arguments: Any, **more: Any) -> Iterator[Batch]:
        while True:
            if self.fixed is None:
                yield from self.loader.batches(*arguments, **more)
                continue
            images = self.fixed.images
            if self.device is not None:
                images = images.to(self.device, non_blocking=True)
            yield replace(self.fixed, images=images)

    def _batches(self, order: Any, positions: Any, chunks: Any, transform: Any) -> Iterator[Batch]:
        raise NotImplementedError


class _IdentityPipeline:
    """Stands in for the pipeline when batches are already augmented."""

    def augment_batches(self, batches: Iterable[Batch], *rest: object) -> Iterable[Batch]:
        return batches

    def sample_transform(self, seed: int, epoch: int) -> None:
        return None


class _TimestampLogger(Logger):
    """Record when each log entry was complete."""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self.seconds: list[float] = []

    def log_step(self, step: int, epoch: int, values: dict[str, float]) -> None:
        self.logger.log_step(step, epoch, values)
        self.seconds.append(time.perf_counter())
