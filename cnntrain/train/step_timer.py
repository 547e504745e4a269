"""A training that is only timed: its loop as it is, beside the bare step on a batch that lies ready."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.augment.pipeline import Pipeline
from cnntrain.data.loader import Loader
from cnntrain.errors import DivergedError
from cnntrain.tasks.task import Task
from cnntrain.train.device import Compute
from cnntrain.train.loop import Logger, NullLogger, Trainer, train_epoch, train_step
from cnntrain.train.nonfinite import NonFiniteGuard
from cnntrain.train.schedule import Constant
from cnntrain.train.signals import StopFlag
from cnntrain.train.state import ModelEMA, Progress, TrainingPlan, TrainState
from cnntrain.types import Batch

ENDLESS = 2**40  # batches an epoch, so that no window meets its end
LEAD_IN_STEPS = 2  # before a window of the loop: they fill queues and caches


@dataclass
class StepTimer:
    """A training that is only timed: learning rate 0, epochs without end.

    Attributes:
        state: a copy of model and optimizer, which the windows may wear out.
        plan: how the training would run; its batch size, accumulation and clipping count.
        loader, pipeline, journal: the real ones.
        window_s: how long a window should be, in seconds; one step at least.
    """

    state: TrainState
    task: Task
    compute: Compute
    plan: TrainingPlan
    loader: Loader
    pipeline: Pipeline
    journal: Logger
    window_s: float = 0.5
    step_s: float = 0.0

    def __post_init__(self) -> None:
        for group in self.state.optimizer.param_groups:
            group["peak_lr"] = group["lr"] = 0.0
        drop_last = len(self.loader) >= self.plan.batch_size
        self.training = RepeatingLoader(self.loader)
        self.plan = replace(
            self.plan, batches_per_epoch=ENDLESS, steps_per_epoch=ENDLESS, drop_last=drop_last,
            save_every_steps=None, limit_batches=None, unfreeze_epoch=None,
        )  # fmt: skip
        order = torch.arange(len(self.loader))
        transform = self.pipeline.sample_transform(self.plan.seed, 0)
        self.stored = next(iter(self.loader.batches(order, self.plan.batch_size, transform=transform)))
        ready = self.pipeline(self.stored, self.plan.seed, 0)
        self.ready = replace(ready, images=ready.images.contiguous(memory_format=self.compute.memory_format))

    def warm_up(self) -> None:
        """Two bare steps; the second one tells how many make a window."""
        self._bare_steps(1)
        self.step_s = self._bare_steps(1)

    @property
    def window(self) -> tuple[int, int]:
        """Optimizer steps between two readings of the loss, and in a window."""
        every = min(self.plan.log_every_steps, max(1, int(self.window_s / self.step_s)))
        return every, every * max(1, round(self.window_s / (every * self.step_s)))

    def bare(self) -> tuple[int, float]:
        """A window of forward, backward and optimizer step on one batch that is on the device already."""
        steps = self.window[1]
        seconds = self._bare_steps(steps)
        return steps * self.plan.accumulate * len(self.ready), seconds

    def loop(self) -> tuple[int, float]:
        """A window of the training as it is."""
        return self._loop(self.training, self.pipeline, self.journal)

    def parts(self) -> dict[str, Callable[[], tuple[int, float]]]:
        """TimingWindows by what each does beyond the one before it; the first is the bare step, the last the training.

        A part's cost is what it adds: what runs beside the device's work, and so costs nothing, counts as nothing.
        """
        untouched = cast("Pipeline", _Untouched())
        held, silent = FixedBatch(self.ready), NullLogger()
        parts = {
            "step": self.bare,
            "metrics": lambda: self._loop(held, untouched, silent),
            "logging": lambda: self._loop(held, untouched, self.journal),
            "augment": lambda: self._loop(FixedBatch(self.stored), self.pipeline, self.journal),
        }
        images = self.loader.examples.images
        on_device = self.compute.device.type == "cpu" or getattr(self.loader, "images", images) is not images
        if not on_device:
            parts["transfer"] = lambda: self._loop(
                FixedBatch(self.stored, self.compute.device), self.pipeline, self.journal
            )
        return {**parts, "data": self.loop}

    def _bare_steps(self, steps: int) -> float:
        state, optimizer, scaler = self.state, self.state.optimizer, self.state.scaler
        trainer = Trainer(self.task, self.pipeline, self.compute, self.plan, self.training)
        vars(optimizer).pop("found_inf", None)  # left there by the loop
        state.model.train()
        started = self._now()
        for _ in range(steps):
            for _ in range(self.plan.accumulate):
                train_step(trainer, state, self.ready)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self._now() - started

    def _loop(self, training: Loader, pipeline: Pipeline, journal: Logger) -> tuple[int, float]:
        every, steps = self.window
        first = (
            2 * every
        )  # the step that the first reading follows; not 0, where a training shows its first batch
        self.state.progress = Progress(step=first - min(LEAD_IN_STEPS, every))
        stamps = _Stamps(journal)
        finite = NonFiniteGuard(self.compute.device, self.state.scaler is not None, _diverged)
        plan = replace(self.plan, log_every_steps=every, total_steps=first + steps)
        trainer = Trainer(self.task, pipeline, self.compute, plan, training)
        train_epoch(trainer, self.state, self.task.meter(), stamps, finite, StopFlag())
        # A reading waits for the device. The first one ends the steps that lead in.
        return steps * plan.accumulate * len(self.ready), stamps.seconds[-1] - stamps.seconds[0]

    def _now(self) -> float:
        if self.compute.device.type == "cuda":
            torch.cuda.synchronize(self.compute.device)
        return time.perf_counter()


def make_step_timer(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module, Compute], Optimizer],
    task: Task,
    compute: Compute,
    plan: TrainingPlan,
    loader: Loader,
    pipeline: Pipeline,
    ema_decay: float | None,
    journal: Logger | None = None,
) -> StepTimer:
    """A rig of copies: nothing that is done to it reaches `model`."""
    model = copy.deepcopy(model)
    compute.place(model)
    state = TrainState(
        model,
        make_optimizer(model, compute),
        Constant(total_steps=1, steps_per_epoch=1),
        torch.amp.GradScaler(compute.device.type) if compute.precision == "fp16" else None,
        ModelEMA(model, ema_decay) if ema_decay else None,
    )
    return StepTimer(state, task, compute, plan, loader, pipeline, journal or NullLogger())


class RepeatingLoader(Loader):
    """The batches of a loader, one pass after another; never at hand, for each is to be augmented in its own window."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, order: Tensor, batch_size: int, *rest: Any, **more: Any) -> Iterator[Batch]:
        while True:
            yield from self.loader.batches(order, batch_size, *rest, **more)

    def _batches(self, order: Any, positions: Any, chunks: Any, transform: Any) -> Iterator[Batch]:
        raise NotImplementedError


class FixedBatch(RepeatingLoader):
    """The same batch again and again; with `device`, its images are brought there from the host each time."""

    def __init__(self, batch: Batch, device: torch.device | None = None) -> None:
        self.batch, self.device = batch, device
        if device is not None:
            images = batch.images.cpu()
            self.batch = replace(batch, images=images.pin_memory() if device.type == "cuda" else images)

    def __len__(self) -> int:
        return len(self.batch)

    def batches(self, order: Tensor, batch_size: int, *rest: Any, **more: Any) -> Iterator[Batch]:
        while True:
            images = self.batch.images
            yield replace(
                self.batch,
                images=images if self.device is None else images.to(self.device, non_blocking=True),
            )


class _Untouched:
    """A pipeline for batches that have been through one."""

    def augment_batches(self, batches: Iterable[Batch], *rest: object) -> Iterable[Batch]:
        return batches

    def sample_transform(self, seed: int, epoch: int) -> None:
        return None


class _Stamps(NullLogger):
    """Notes when each reading was over."""

    def __init__(self, journal: Logger) -> None:
        self.journal = journal
        self.seconds: list[float] = []

    def log_step(self, step: int, epoch: int, batch: int, values: dict[str, float]) -> None:
        self.journal.log_step(step, epoch, batch, values)
        self.seconds.append(time.perf_counter())


def _diverged(batch: int) -> DivergedError:
    return DivergedError(f"the loss or a gradient was not finite while it was being timed (batch {batch})")
