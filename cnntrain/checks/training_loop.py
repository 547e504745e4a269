"""Compare the training loop with a simple reference implementation."""

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
FIRST_STEP_SIZE = 1e-3  # relative change of the weights in the first step
TOLERANCE = 0.02  # distance of the final weights, relative to the change during training
ROUNDING_FACTOR = 10.0  # tolerated distance, relative to the effect of rounding


class _HarmonicSchedule(Schedule):
    """Factors 1, 1/2, 1/3, ...: every step has another learning rate."""

    def factor(self, step: int) -> float:
        return 1 / (step + 1)


def loop_agrees(context: CheckContext) -> Finding:
    """Check that the training loop gives the same weights and validation loss as the reference implementation.

    Runs with one batch per step, and with two if the run accumulates gradients.
    """
    distances: list[str] = []
    model, remedy = context.copy_model(), "report this as a bug if `repeat` and `modes` pass"
    for accumulate in (1, 2) if context.plan.accumulate > 1 else (1,):
        if len(context.loaders["train"]) < accumulate * STEPS * _batch_size(context):
            return skipped("not enough training images")
        batches = _batches(context, STEPS * accumulate)
        rate = _learning_rate(context, batches[0])
        if rate is None:
            return skipped("the loss has no gradient; see gradients and loss sign")
        reference, model = context.copy_model(), context.copy_model()
        _train_reference(context, reference, batches, accumulate, rate)
        try:
            _train_with_loop(context, model, accumulate, rate)
        except DivergedError as error:
            return skipped(f"{str(error).splitlines()[0]}; see initial loss")
        distance = _relative_difference(context, reference, model)
        distances.append(f"{distance:.1g} with accumulate={accumulate}")
        if not distance <= TOLERANCE:
            evidence = _describe(distances)
            rescaled = context.copy_model()
            _train_reference(context, rescaled, batches, accumulate, rate, loss_scale=3.0)
            rounding = _relative_difference(context, reference, rescaled)
            if distance <= ROUNDING_FACTOR * rounding:  # norms over few pixels amplify rounding errors
                return skipped(f"undecided: {evidence}, but rounding alone causes {rounding:.1g}")
            cause = "the loop does not do zero_grad, forward in training mode, backward, clip and step "
            cause += (
                "with the learning rate of the schedule" if accumulate == 1 else "with the mean over several batches"
            )
            return failed(evidence, cause, remedy)
    before = {name: value.clone() for name, value in model.named_buffers()}
    expected, loss = _validation_losses(context, model)
    changed = [name for name, value in model.named_buffers() if not torch.equal(value, before[name])]
    evidence = f"{_describe(distances)}; difference of the validation loss: {abs(loss - expected):.1g}"
    if changed or not abs(loss - expected) <= TOLERANCE * max(abs(expected), 1e-6):
        cause = "validation runs in training mode" + (f": it changes {join_names(changed)}" if changed else "")
        return failed(evidence, cause, remedy)
    return passed(evidence)


def _describe(distances: list[str]) -> str:
    return f"relative difference of the weights after {STEPS} steps: {', '.join(distances)}"


def _relative_difference(context: CheckContext, reference: nn.Module, other: nn.Module) -> float:
    """Return the distance between two trained models, relative to the change of the first during training."""
    initial = _weights(context.model).to(_weights(reference))
    return relative_distance(_weights(reference) - initial, _weights(other) - initial)


def _batch_size(context: CheckContext) -> int:
    return image_count(context, 4, 2)


def _batches(context: CheckContext, count: int) -> list[Batch]:
    """Return the first augmented batches of the first epoch."""
    loader, seed, size = context.loaders["train"], context.plan.seed, _batch_size(context)
    order = epoch_order(seed, 0, len(loader))[: count * size]
    transform = context.pipeline.sample_transform(seed, 0)
    return [context.pipeline(batch, seed, 0) for batch in loader.batches(order, size, transform=transform)]


def _loss(context: CheckContext, model: nn.Module, batch: Batch, training: bool = True) -> tuple[Tensor, Tensor]:
    """Return the loss sum and the number of its terms, in float32."""
    images = batch.images.contiguous(memory_format=context.compute.memory_format)
    return context.task.loss(model(images).float(), batch.truth, training)


def _learning_rate(context: CheckContext, batch: Batch) -> float | None:
    """Return the learning rate whose first step changes the weights by FIRST_STEP_SIZE; None without gradients."""
    model = context.copy_model().train()
    total, count = _loss(context, model, batch)
    if not total.requires_grad:
        return None
    parameters = list(trainable_parameters(model).values())
    gradients = torch.autograd.grad(total / count, parameters, allow_unused=True)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
    return FIRST_STEP_SIZE * float(_weights(model).norm()) / max(norm, 1e-12)


def _train_reference(
    context: CheckContext,
    model: nn.Module,
    batches: list[Batch],
    accumulate: int,
    rate: float,
    loss_scale: float = 1.0,
) -> None:
    """Train with a textbook implementation of SGD.

    Args:
        loss_scale: multiplies the loss and divides the gradients, which changes nothing except rounding errors.
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
        (loss_scale * torch.stack(sums).sum() / torch.stack(counts).sum()).backward()
        for parameter in trainable_parameters(model).values():
            if parameter.grad is not None and loss_scale != 1:
                parameter.grad /= loss_scale
        if context.plan.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(trainable_parameters(model).values(), context.plan.clip_grad_norm)
        optimizer.step()


def _train_with_loop(context: CheckContext, model: nn.Module, accumulate: int, rate: float) -> None:
    """Train with the training loop."""
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=rate, momentum=0.9)
    optimizer.param_groups[0]["peak_lr"] = rate
    plan = TrainingPlan(
        seed=context.plan.seed,
        batch_size=_batch_size(context),
        batches_per_epoch=STEPS * accumulate,
        steps_per_epoch=STEPS,
        total_steps=STEPS,
        accumulate=accumulate,
        clip_grad_norm=context.plan.clip_grad_norm,
    )
    state = TrainState(model, optimizer, _HarmonicSchedule(total_steps=STEPS, steps_per_epoch=STEPS))
    compute = dataclasses.replace(context.compute, precision="fp32")
    trainer = loop.Trainer(context.task, context.pipeline, compute, plan, context.loaders["train"])
    loop.fit(trainer, state, loop.NullLogger(), lambda *names: None, context.stop)


def _validation_losses(context: CheckContext, model: nn.Module) -> tuple[float, float]:
    """Return the loss on a few validation images, by the reference implementation and by `loop.evaluate`."""
    loader, reference = context.loaders["val"], copy.deepcopy(model).eval()
    compute, rows = dataclasses.replace(context.compute, precision="fp32"), list[Tensor]()
    trainer = loop.Trainer(context.task, context.pipeline, compute, context.plan, context.loaders["train"], loader)
    meter = loop.evaluate(
        trainer,
        model.train(),
        loader,
        _batch_size(context),
        1,
        context.stop,
        lambda batch, _: rows.append(batch.index),
    )
    order = torch.cat(rows)
    with torch.no_grad():
        batch = context.pipeline.eval_transform(next(loader.batches(order, len(order))))
        total, count = _loss(context, reference, batch, training=False)
    return float(total / count), meter.compute()["loss"]


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])
