"""Divergence: noted on the device without waiting for it, and traced to a layer by replaying the batch."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.augment.pipeline import Pipeline
from cnntrain.data.loader import Loader
from cnntrain.errors import DivergedError
from cnntrain.randomness import epoch_order
from cnntrain.tasks.task import Task
from cnntrain.train.device import Compute, seed_step
from cnntrain.train.hooks import attached, uncompiled
from cnntrain.train.optim import set_learning_rate
from cnntrain.train.state import TrainingPlan, TrainState
from cnntrain.types import Batch

MOST_SKIPPED = 20  # fp16 steps in a row that may be skipped while the scale is looked for
SHOWN_EXAMPLES = 5
NOT_AGAIN = {  # by whether it is the CPU
    True: "not found again: something is drawn or counted outside of torch's generators and the checkpoint",
    False: "not found again, for sums on this device vary (deterministic=true)",
}
REMEDY = (
    "try a lower optimizer.lr, clip_grad_norm=1, or a longer warm-up; `cnntrain overfit` finds wiring faults"
)


class NonFiniteGuard:
    """Whether a training is still finite, as tensors on its device: noting something never waits.

    After a non-finite loss or gradient, every later update is skipped. The weights stay as they were before that batch
    until the host reads the flag and replays the step.

    Args:
        scaled: gradients are scaled (fp16): a step whose gradients overflow is skipped, and counts only after 20 in
            a row.
        explain: finds out what happened at a batch.

    Attributes:
        poison: scalar; 0 while all values were finite, then NaN. (Zero times infinity is NaN, so adding zero times a
            value records it.)
    """

    def __init__(self, device: torch.device, scaled: bool, explain: Callable[[int], DivergedError]) -> None:
        self.scaled, self.explain = scaled, explain
        self.poison = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._bad_steps = torch.zeros((), device=device)  # number of consecutive bad steps
        self._last_batches: list[int] = []  # of the steps since the last check

    def note(self, value: Tensor) -> None:
        """Record whether `value`, a scalar on the device, is finite."""
        self.poison.add_(value, alpha=0)

    def skip(self, norm: Tensor, batch: int) -> Tensor:
        """Return 1.0 if the update of a step with this gradient `norm` must be skipped, else 0.0.

        Args:
            batch: index of the step's last batch in its epoch.
        """
        overflows = ~norm.isfinite() if self.scaled else None
        if overflows is not None:
            self.skipped = torch.where(overflows, self.skipped + 1, 0)
            self.note(torch.where(self.skipped < MOST_SKIPPED, 0.0, torch.inf))
        else:
            self.note(norm)
        bad = torch.ne(self.poison, self.poison, out=torch.empty_like(self.poison))
        self._bad_steps += bad
        self._last_batches.append(batch)
        return bad if overflows is None else torch.maximum(bad, overflows.float())

    def check(self) -> None:
        """Waits for the device.

        Raises:
            DivergedError: a step since the last check had a non-finite loss or gradient.
        """
        if bad_steps := int(self._bad_steps):
            raise self.explain(self._last_batches[-bad_steps])
        self._last_batches.clear()


@torch.no_grad()
def step_unless(skip: Tensor, optimizer: Optimizer) -> None:
    """`optimizer.step()`, which changes no weight where the device's `skip` is 1."""
    if getattr(
        optimizer, "_step_supports_amp_scaling", False
    ):  # torch's fused kernels ask the flag themselves
        first = not optimizer.state
        optimizer.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        if first:  # SGD's momentum is whatever the memory held, when its first step is skipped
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


def diverged(
    state: TrainState,
    training: Loader,
    pipeline: Pipeline,
    task: Task,
    compute: Compute,
    plan: TrainingPlan,
    first_bad: int,
) -> DivergedError:
    """Replay the step that ends with batch `first_bad` and describe what was not finite.

    The weights must be those before the step.

    Each process replays its own share, and the one that finds the cause says it.
    """
    epoch, start = state.progress.epoch, first_bad - first_bad % plan.accumulate
    seen, ended = state.progress.batch, state.progress.batch >= plan.batches_per_epoch
    begun = state.progress.step - (-(-seen // plan.accumulate) if ended else seen // plan.accumulate)
    step = begun + first_bad // plan.accumulate
    learning_rate = set_learning_rate(state.optimizer, state.schedule, step)
    order = epoch_order(plan.seed, epoch, len(training))
    transform = pipeline.sample_transform(plan.seed, epoch)
    share = compute.ranks.share(pipeline)
    batches = training.batches(
        order, plan.batch_size, start, plan.drop_last, transform=transform, share=share
    )
    state.optimizer.zero_grad(set_to_none=True)
    loss, where, rows = float("nan"), None, torch.zeros(0, dtype=torch.int64)
    for number, batch in zip(range(start, first_bad + 1), batches, strict=False):
        if not len(batch):
            continue
        seen = share.trim(pipeline(batch, plan.seed, epoch))
        seed_step(plan.seed, "step", epoch, number, *compute.ranks.seed)
        loss, where = _replay(state, seen, task, compute)
        rows = seen.index
        if where is not None:
            break
    compute.ranks.accuse(where is not None)
    what = "the gradient is not finite" if torch.tensor(loss).isfinite() else f"the loss is {loss}"
    return DivergedError(
        f"{what} at step {step + 1} (epoch {epoch + 1}, learning rate {learning_rate:.3g})\n{REMEDY}\n"
        f"first not finite: {where or NOT_AGAIN[compute.device.type == 'cpu']}\n"
        f"examples of that batch: {_few_names(training, rows)}"
    )


def _few_names(loader: Loader, rows: Tensor) -> str:
    """List the names of a batch's first examples and the number of others."""
    names = [loader.examples.names[row] for row in rows[:SHOWN_EXAMPLES].tolist()]
    more = f" and {len(rows) - SHOWN_EXAMPLES} more" if len(rows) > SHOWN_EXAMPLES else ""
    return ", ".join(names) + more


def _replay(state: TrainState, batch: Batch, task: Task, compute: Compute) -> tuple[float, str | None]:
    """The loss of a batch as the training meets it, and what was the first not to be finite."""
    if not batch.images.isfinite().all():
        return float("nan"), "the images"
    model = state.model.train()
    with watch_layers(model) as found:
        with compute.autocast():
            outputs = model(batch.images.contiguous(memory_format=compute.memory_format))
        loss_sum, count = task.loss(outputs.float(), batch.truth)
        loss = loss_sum / count.clamp(min=1e-12)
        if not found and not loss.isfinite():
            found.append("the loss itself, of finite outputs")
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
    """Fills a list with the layers whose activation, then those whose gradient is not finite, as they turn up."""
    found: list[str] = []

    def gradient(layer: str, value: Tensor) -> None:
        if not value.isfinite().all():
            found.append(f"the gradient at the output of {layer}, counted from the loss")

    def activation(layer: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        for output in outputs if isinstance(outputs, tuple | list) else (outputs,):
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f"the activation of {layer}")
            elif isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(partial(gradient, layer))

    hooks = [
        module.register_forward_hook(
            partial(activation, f"{name or 'the network'} ({type(module).__name__})")
        )
        for name, module in model.named_modules()
    ]
    with attached(hooks), uncompiled(model):
        yield found


@torch.no_grad()
def diverged_in_validation(
    state: TrainState, loader: Loader, pipeline: Pipeline, compute: Compute, plan: TrainingPlan
) -> DivergedError:
    """Which validation batch, and which layer, first gave what is not finite after the epoch under way."""
    model, progress = state.eval_model.eval(), state.progress
    where, names = "the loss itself, of finite outputs", "all"
    found: list[str] = []
    for batch in loader.batches(torch.arange(len(loader)), plan.batch_size, share=compute.ranks.share()):
        if not len(batch):
            continue
        seen = pipeline.eval_transform(batch)
        with watch_layers(model) as layers, compute.autocast():
            model(seen.images.contiguous(memory_format=compute.memory_format))
        if found := layers:
            where = found[0]
            names = _few_names(loader, batch.index)
            break
    compute.ranks.accuse(bool(found))
    return DivergedError(
        f"the validation loss is not finite after step {progress.step} (epoch {progress.epoch + 1}, learning rate "
        f"{state.optimizer.param_groups[0]['lr']:.3g})\n{REMEDY}\n"
        f"first not finite: {where}\nexamples of that batch: {names}"
    )
