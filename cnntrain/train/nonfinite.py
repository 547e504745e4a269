"""Detect a non-finite loss or gradient on the device without a host sync, and find its layer by replaying the batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from cnntrain.data.loader import Loader
from cnntrain.errors import DivergedError
from cnntrain.randomness import seed_all
from cnntrain.train.evaluate import predict_batch
from cnntrain.train.optim import set_learning_rate
from cnntrain.train.state import TrainState
from cnntrain.types import Batch

if TYPE_CHECKING:
    from cnntrain.train.loop import Trainer

MAX_SKIPPED_STEPS = 20  # in a row, with fp16, until the scale of the loss is small enough
SHOWN_EXAMPLES = 5
NOT_REPRODUCED = {  # by whether the device is a CPU
    True: "not reproduced: some randomness or state is outside of torch's generators and the checkpoint",
    False: "not reproduced: sums on this device vary between calls (deterministic=true)",
}
REMEDY = "try a lower optimizer.lr, clip_grad_norm=1, or a longer warm-up; `cnntrain overfit` finds wiring faults"


class NonFiniteGuard:
    """Records whether losses and gradients are finite, in tensors on the device: recording never waits for the device.

    After a non-finite loss or gradient, every later update is skipped. The weights stay as they were before that batch
    until the host reads the flag and replays the step.

    Args:
        scaled: gradients are scaled (fp16). A step whose gradients overflow is skipped, and only
            `MAX_SKIPPED_STEPS` of them in a row are an error.
        explain: returns the error for a step, given the index of its last batch in the epoch.

    Attributes:
        nonfinite: scalar; 0 while all values were finite, then NaN. (Zero times infinity is NaN, so adding zero times a
            value records it.)
    """

    def __init__(self, device: torch.device, scaled: bool, explain: Callable[[int], DivergedError]) -> None:
        self.scaled, self.explain = scaled, explain
        self.nonfinite = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._bad_steps = torch.zeros((), device=device)  # number of consecutive bad steps
        self._last_batches: list[int] = []  # of the steps since the last `raise_if_bad`

    def record(self, value: Tensor) -> None:
        """Record whether `value`, a scalar on the device, is finite."""
        self.nonfinite.add_(value, alpha=0)

    def should_skip(self, norm: Tensor, batch: int) -> Tensor:
        """Return 1.0 if the update of a step with this gradient `norm` must be skipped, else 0.0.

        Args:
            batch: index of the step's last batch in its epoch.
        """
        overflows = ~norm.isfinite() if self.scaled else None
        if overflows is not None:
            self.skipped = torch.where(overflows, self.skipped + 1, 0)
            self.record(torch.where(self.skipped < MAX_SKIPPED_STEPS, 0.0, torch.inf))
        else:
            self.record(norm)
        bad = torch.ne(self.nonfinite, self.nonfinite, out=torch.empty_like(self.nonfinite))
        self._bad_steps += bad
        self._last_batches.append(batch)
        return bad if overflows is None else torch.maximum(bad, overflows.float())

    def raise_if_bad(self) -> None:
        """Wait for the device, and raise if a step since the last call was not finite."""
        if bad_steps := int(self._bad_steps):
            raise self.explain(self._last_batches[-bad_steps])
        self._last_batches.clear()


@torch.no_grad()
def step_unless(skip: Tensor, optimizer: Optimizer) -> None:
    """Call `optimizer.step()`, but change no weight if the device's `skip` is 1."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's fused kernels read `found_inf`
        first = not optimizer.state
        optimizer.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        if first:  # if the first step is skipped, SGD's momentum is uninitialized memory
            for state in optimizer.state.values():
                if isinstance(momentum := state.get("momentum_buffer"), Tensor):
                    momentum.copy_(torch.where(skip > 0, 0.0, momentum))
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.copy_(torch.where(skip > 0, 0.0, parameter.grad))
    optimizer.step()
    for parameter, old in zip(parameters, before, strict=True):
        parameter.copy_(torch.where(skip > 0, old, parameter))


def explain_divergence(trainer: Trainer, state: TrainState, last_batch: int) -> DivergedError:
    """Replay the step that ends with batch `last_batch` of the epoch, and describe the first non-finite value.

    The weights must be those before the step. Each rank replays its own part, and the one that finds the value reports
    it.
    """
    plan, world = trainer.plan, trainer.compute.world
    progress, start = state.progress, last_batch - last_batch % plan.accumulate
    epoch, seen = progress.epoch, progress.batch
    steps_of_epoch = -(-seen // plan.accumulate) if seen >= plan.batches_per_epoch else seen // plan.accumulate
    step = progress.step - steps_of_epoch + last_batch // plan.accumulate
    set_learning_rate(state.optimizer, state.schedule, step)
    state.optimizer.zero_grad(set_to_none=True)
    loss, where, rows = float("nan"), None, torch.zeros(0, dtype=torch.int64)
    batches = trainer.train_batches(replace(progress, batch=start))
    for number, (batch, _) in zip(range(start, last_batch + 1), batches, strict=False):
        seed_all(plan.seed, "step", epoch, number, *world.seed)
        loss, where = _replay(trainer, state, batch)
        rows = batch.index
        if where is not None:
            break
    world.defer_to_failed_rank(where is not None)
    what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
    where = where or NOT_REPRODUCED[trainer.compute.device.type == "cpu"]
    return _diverged(f"{what} at step {step + 1}", state, where, _few_names(trainer.train_loader, rows))


def _diverged(what: str, state: TrainState, where: str, examples: str) -> DivergedError:
    rate = state.optimizer.param_groups[0]["lr"]
    return DivergedError(
        f"{what} (epoch {state.progress.epoch + 1}, learning rate {rate:.3g})\n{REMEDY}\n"
        f"first not finite: {where}\nexamples of that batch: {examples}"
    )


def _few_names(loader: Loader, rows: Tensor) -> str:
    """List the names of a batch's first examples and the number of others."""
    names = [loader.examples.names[row] for row in rows[:SHOWN_EXAMPLES].tolist()]
    more = f" and {len(rows) - SHOWN_EXAMPLES} more" if len(rows) > SHOWN_EXAMPLES else ""
    return ", ".join(names) + more


def _replay(trainer: Trainer, state: TrainState, batch: Batch) -> tuple[float, str | None]:
    """Return the loss of a batch and the name of its first non-finite value, if there is one."""
    if not batch.images.isfinite().all():
        return float("nan"), "the images"
    model = state.model.train()
    with watch_layers(model) as found:
        loss_sum, count = trainer.task.loss(predict_batch(model, batch.images, trainer.compute), batch.truth)
        loss = loss_sum / count.clamp(min=1e-12)
        if not found and not loss.isfinite():
            found.append("the loss (the outputs are finite)")
        (state.scaler.scale(loss) if state.scaler else loss).backward()
    for name, parameter in reversed(list(model.named_parameters())):
        if not found and parameter.grad is not None and not parameter.grad.isfinite().all():
            found.append(f"the gradient of {name}")
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not found and gradients and not nn.utils.get_total_norm(gradients).isfinite():
        largest = max(float(gradient.abs().max()) for gradient in gradients)
        found.append(f"the norm of all gradients together, of which the largest is {largest:.2g}")
    return loss.item(), found[0] if found else None


@contextlib.contextmanager
def watch_layers(model: nn.Module) -> Iterator[list[str]]:
    """Fill a list with the layers whose activation or gradient is not finite, in order of computation."""
    found: list[str] = []

    def gradient(layer: str, value: Tensor) -> None:
        if not value.isfinite().all():
            found.append(f"the gradient at the output of {layer} (first in the backward pass)")

    def activation(layer: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        for output in outputs if isinstance(outputs, tuple | list) else (outputs,):
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f"the activation of {layer}")
            elif isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(partial(gradient, layer))

    hooks = [
        module.register_forward_hook(partial(activation, f"{name or 'the network'} ({type(module).__name__})"))
        for name, module in model.named_modules()
    ]
    with attached(hooks), uncompiled(model):
        yield found


@contextlib.contextmanager
def attached(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove `hooks`, which are registered already, at the end of the context."""
    hooks = list(hooks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Call the model without its compiled code inside the context, so that hooks run."""
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


@torch.no_grad()
def explain_validation(trainer: Trainer, state: TrainState) -> DivergedError:
    """Find the first validation batch and layer with a non-finite value after the current epoch."""
    model, loader, compute = state.eval_model.eval(), trainer.val_loader, trainer.compute
    assert loader is not None
    where, names = "", "all"
    order = torch.arange(len(loader))
    for batch in loader.batches(order, trainer.plan.batch_size, shard=compute.world.shard()):
        if not len(batch):
            continue
        with watch_layers(model) as layers:
            predict_batch(model, trainer.pipeline.eval_transform(batch).images, compute)
        if layers:
            where, names = layers[0], _few_names(loader, batch.index)
            break
    compute.world.defer_to_failed_rank(bool(where))
    what = f"the validation loss is not finite after step {state.progress.step}"
    return _diverged(what, state, where or "the loss (the outputs are finite)", names)
