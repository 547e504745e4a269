"""Does the loop train as the textbook says? The real one against a slow one written out here."""

import copy
import dataclasses
import math

import torch
from torch import Tensor, nn

from cnntrain.checks.context import CheckContext, failed, join_names, passed, skipped
from cnntrain.checks.short_training import image_count, relative_distance, trainable_parameters
from cnntrain.errors import DivergedError
from cnntrain.randomness import epoch_order
from cnntrain.train import loop
from cnntrain.train.device import seed_step
from cnntrain.train.schedule import Schedule
from cnntrain.train.state import TrainingPlan, TrainState
from cnntrain.types import Batch, Finding

STEPS = 3
NOTICED = 1e-3  # relative size of the loop's first step
AGREES = 0.02  # of the way
ROUNDING = 10.0  # times as far as rounding alone takes the weights


class _Falling(Schedule):
    """1, 1/2, 1/3, ...: no step has the learning rate of another."""

    def factor(self, step: int) -> float:
        return 1 / (step + 1)


def loop_agrees(context: CheckContext) -> Finding:
    """The loop that trains ends with the weights of a slow one written out here, and evaluates as it does.

    With one batch a step, and with two where the run accumulates several.
    """
    found: list[str] = []
    model, remedy = context.copy_model(), "where `repeat` and `modes` pass, report this as a bug of cnntrain"
    for accumulate in (1, 2) if context.plan.accumulate > 1 else (1,):
        if len(context.loaders["train"]) < accumulate * STEPS * _images(context):
            return skipped("fewer training images than the trial needs")
        batches = _batches(context, STEPS * accumulate)
        rate = _rate(context, batches[0])
        if rate is None:
            return skipped("the loss has no gradient; see gradients and loss sign")
        by_hand, model = context.copy_model(), context.copy_model()
        _by_hand(context, by_hand, batches, accumulate, rate)
        try:
            _by_loop(context, model, accumulate, rate)
        except DivergedError as error:
            return skipped(f"{str(error).splitlines()[0]}; see initial loss")
        apart = _apart(context, by_hand, model)
        found.append(f"by {apart:.1g} of the way with accumulate={accumulate}")
        if not apart <= AGREES:
            evidence, again = (
                f"after {STEPS} steps the weights differ {' and '.join(found)}",
                context.copy_model(),
            )
            _by_hand(context, again, batches, accumulate, rate, scale=3.0)
            rounding = _apart(context, by_hand, again)
            if apart <= ROUNDING * rounding:  # norms of a few pixels make much of the last digits
                return skipped(f"{evidence}, but rounding alone makes it {rounding:.1g}")
            cause = "the loop does not do zero_grad, forward in training mode, backward, clip, step "
            cause += (
                "at the schedule's learning rate" if accumulate == 1 else "with the mean of several batches"
            )
            return failed(evidence, cause, remedy)
    before = {name: value.clone() for name, value in model.named_buffers()}
    expected, loss = _validate(context, model)
    changed = [name for name, value in model.named_buffers() if not torch.equal(value, before[name])]
    evidence = f"after {STEPS} steps the weights differ {' and '.join(found)}; "
    evidence += f"then the validation loss by {abs(loss - expected):.1g}"
    if changed or not abs(loss - expected) <= AGREES * max(abs(expected), 1e-6):
        cause = "validation runs in training mode" + (
            f": it changes {join_names(changed)}" if changed else ""
        )
        return failed(evidence, cause, remedy)
    return passed(evidence)


def _apart(context: CheckContext, one: nn.Module, other: nn.Module) -> float:
    """How far two trainings end from one another, beside the way that the first has gone."""
    start = _weights(context.model).to(_weights(one))
    return relative_distance(_weights(one) - start, _weights(other) - start)


def _images(context: CheckContext) -> int:
    """Of a batch."""
    return image_count(context, 4, 2)


def _batches(context: CheckContext, count: int) -> list[Batch]:
    """The first batches of the run's first epoch, augmented."""
    loader, seed, size = context.loaders["train"], context.plan.seed, _images(context)
    order = epoch_order(seed, 0, len(loader))[: count * size]
    transform = context.pipeline.sample_transform(seed, 0)
    return [context.pipeline(batch, seed, 0) for batch in loader.batches(order, size, transform=transform)]


def _loss(
    context: CheckContext, model: nn.Module, batch: Batch, plain: bool = False
) -> tuple[Tensor, Tensor]:
    images = batch.images.contiguous(memory_format=context.compute.memory_format)
    return context.task.loss(model(images).float(), batch.truth, plain)


def _rate(context: CheckContext, batch: Batch) -> float | None:
    """The learning rate whose first step changes the weights by NOTICED of their size; None without gradients."""
    model = context.copy_model().train()
    total, count = _loss(context, model, batch)
    if not total.requires_grad:
        return None
    gradients = torch.autograd.grad(
        total / count, list(trainable_parameters(model).values()), allow_unused=True
    )
    size = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
    return NOTICED * float(_weights(model).norm()) / max(size, 1e-12)


def _by_hand(
    context: CheckContext,
    model: nn.Module,
    batches: list[Batch],
    accumulate: int,
    rate: float,
    scale: float = 1.0,
) -> None:
    """A training as the textbook has it.

    Args:
        scale: the loss is multiplied by it and the gradients divided by it: the same but for rounding.
    """
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=rate, momentum=0.9)
    model.train()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate / (step + 1)
        sums, counts = [], []
        for number in range(step * accumulate, (step + 1) * accumulate):
            seed_step(context.plan.seed, "step", 0, number)
            total, count = _loss(context, model, batches[number])
            sums.append(total)
            counts.append(count)
        model.zero_grad(set_to_none=True)
        (scale * torch.stack(sums).sum() / torch.stack(counts).sum()).backward()
        for parameter in trainable_parameters(model).values():
            if parameter.grad is not None and scale != 1:
                parameter.grad /= scale
        if context.plan.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(trainable_parameters(model).values(), context.plan.clip_grad_norm)
        optimizer.step()


def _by_loop(context: CheckContext, model: nn.Module, accumulate: int, rate: float) -> None:
    """The same by what trains for users."""
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=rate, momentum=0.9)
    optimizer.param_groups[0]["peak_lr"] = rate
    plan = TrainingPlan(
        seed=context.plan.seed,
        batch_size=_images(context),
        batches_per_epoch=STEPS * accumulate,
        steps_per_epoch=STEPS,
        total_steps=STEPS,
        accumulate=accumulate,
        clip_grad_norm=context.plan.clip_grad_norm,
    )
    state = TrainState(model, optimizer, _Falling(total_steps=STEPS, steps_per_epoch=STEPS))
    compute = dataclasses.replace(context.compute, precision="fp32")
    trainer = loop.Trainer(context.task, context.pipeline, compute, plan, context.loaders["train"])
    loop.fit(trainer, state, loop.NullLogger(), lambda *names: None, context.stop)


def _validate(context: CheckContext, model: nn.Module) -> tuple[float, float]:
    """The loss of a few validation images, by hand and by what evaluates for users."""
    loader, evaluated = context.loaders["val"], copy.deepcopy(model).eval()
    compute, rows = dataclasses.replace(context.compute, precision="fp32"), list[Tensor]()
    trainer = loop.Trainer(
        context.task, context.pipeline, compute, context.plan, context.loaders["train"], loader
    )
    meter = loop.evaluate(
        trainer,
        model.train(),
        loader,
        _images(context),
        1,
        context.stop,
        lambda batch, _: rows.append(batch.index),
    )
    order = torch.cat(rows)
    with torch.no_grad():
        batch = context.pipeline.eval_transform(next(loader.batches(order, len(order))))
        total, count = _loss(context, evaluated, batch, plain=True)
    return float(total / count), meter.compute()["loss"]


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])
