"""Compare autograd with finite differences, and the training loop with a simple reference implementation."""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cnntrain.checks.context import (
    CheckContext,
    calibrate_norms,
    failed,
    join_names,
    passed,
    relative_distance,
    skipped,
    trainable_parameters,
)
from cnntrain.errors import DivergedError
from cnntrain.randomness import epoch_order, seed_all
from cnntrain.train import loop
from cnntrain.train.schedule import Schedule
from cnntrain.train.state import TrainingPlan, TrainState
from cnntrain.types import Batch, Finding

LOSS_CHANGES = (1e-6, 1e-8, 1e-4, 1e-3)  # relative changes of the loss that determine the step size
MAX_ERROR = 1e-3  # relative error of the derivative
JITTER = 1e-2  # moves parameters away from points where a ReLU or a maximum is not differentiable
STEPS = 3
FIRST_STEP_SIZE = 1e-3  # relative change of the weights in the first step
TOLERANCE = 0.02  # distance of the final weights, relative to the change during training
ROUNDING_FACTOR = 10.0  # tolerated distance, relative to the effect of rounding


def derivative(context: CheckContext) -> Finding:
    """Check that the derivative of the loss along its gradient equals the finite difference."""
    try:
        test = _GradientTest(context)
        if not test.gradients:
            return skipped("no parameter has a gradient; see gradients")
        names = list(test.gradients)
        error = test.error(names)
        evidence = f"relative difference between autograd and finite differences in float64: {error:.1g}"
        if error <= MAX_ERROR:
            return passed(evidence)
        wrong = [name for name in names if context.seconds_left > 0 and test.error([name]) > MAX_ERROR]
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as problem:
        message = str(problem).splitlines()[0][:80]
        return skipped(f"the network does not run in float64 on the CPU: {message}")
    correct_after = names[names.index(wrong[-1]) + 1 :] if wrong else []
    where = f" of {join_names(wrong)}" if wrong else ""
    where += f" (correct from {correct_after[0]} on)" if correct_after else ""
    cause = f"the gradient{where} is wrong: an autograd.Function with a wrong backward(), or .data"
    remedy = "test the function with torch.autograd.gradcheck (a straight-through estimator differs on purpose)"
    return failed(evidence, cause, remedy, "model", "task")


class _GradientTest:
    """A copy of the model in float64, and the non-zero gradients of its loss by parameter name."""

    def __init__(self, context: CheckContext) -> None:
        batch, model = context.eval_batch(count=context.image_count(4, 2)), context.copy_model()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                size = float(parameter.square().mean().sqrt()) or 1.0
                parameter += JITTER * size * torch.randn(parameter.shape, generator=generator).to(parameter)
        if not context.trained:
            calibrate_norms(model, context.eval_batch(count=context.image_count(16)).images)
        self.model, self.task = model.cpu().double(), context.task
        self.images, self.truth = batch.images.cpu().double(), {k: v.cpu() for k, v in batch.truth.items()}
        self.parameters, self.gradients = trainable_parameters(model), dict[str, Tensor]()
        loss = self.loss()
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
            pairs = zip(self.parameters, gradients, strict=True)
            self.gradients = {name: g for name, g in pairs if g is not None and g.any()}

    def loss(self) -> Tensor:
        torch.manual_seed(0)
        with _KeepDouble():
            total, count = self.task.loss(self.model(self.images), self.truth, training=False)
            return total / count.clamp(min=1e-12)

    def error(self, names: Sequence[str]) -> float:
        """Return the smallest relative error over several step sizes.

        All parameters in `names` move along their gradients, in proportion to their norms.
        """
        moves = {
            name: gradient * (self.parameters[name].detach().norm() / gradient.norm())
            for name, gradient in self.gradients.items()
            if name in names
        }
        expected = sum(float((self.gradients[name] * move).sum()) for name, move in moves.items())
        smallest = math.inf
        size = max(abs(float(self.loss().detach())), 1e-9)
        for change in LOSS_CHANGES:
            error = abs(self._finite_difference(moves, change * size / expected) / expected - 1)
            smallest = min(smallest, error) if math.isfinite(error) else smallest
            if smallest <= MAX_ERROR:
                break
        return smallest

    @torch.no_grad()
    def _finite_difference(self, moves: dict[str, Tensor], step: float) -> float:
        """Return (loss(w + step * move) - loss(w - step * move)) / (2 * step); the weights are restored."""
        original, losses = {name: self.parameters[name].clone() for name in moves}, []
        for sign in (1, -1, 0):
            for name, move in moves.items():
                self.parameters[name].copy_(original[name] + sign * step * move)
            if sign:
                losses.append(float(self.loss()))
        return (losses[0] - losses[1]) / (2 * step)


class _KeepDouble(TorchFunctionMode):
    """Makes `.float()` a no-op on float64, because rounding in losses or models would hide the differences."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def loop_agrees(context: CheckContext) -> Finding:
    """Check that the training loop gives the same weights and validation loss as the reference implementation.

    Runs in fp32, with one batch per step, and with two if the run accumulates gradients.
    """
    context = dataclasses.replace(context, compute=dataclasses.replace(context.compute, precision="fp32"))
    model, remedy = context.copy_model(), "report this as a bug if `repeat` and `modes` pass"
    evidence = f"relative difference of the weights after {STEPS} steps"
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
        evidence += f", {distance:.1g} with accumulate={accumulate}"
        if not distance <= TOLERANCE:
            rescaled = context.copy_model()
            _train_reference(context, rescaled, batches, accumulate, rate, loss_scale=3.0)
            rounding = _relative_difference(context, reference, rescaled)
            if distance <= ROUNDING_FACTOR * rounding:  # norms over few pixels amplify rounding errors
                return skipped(f"undecided: {evidence}, but rounding alone causes {rounding:.1g}")
            cause = "the loop does not do zero_grad, forward in training mode, backward, clip and step with the "
            cause += "learning rate of the schedule" if accumulate == 1 else "mean over several batches"
            return failed(evidence, cause, remedy)
    before = {name: value.clone() for name, value in model.named_buffers()}
    expected, loss = _validation_losses(context, model)
    changed = [name for name, value in model.named_buffers() if not torch.equal(value, before[name])]
    evidence += f"; difference of the validation loss: {abs(loss - expected):.1g}"
    if changed or not abs(loss - expected) <= TOLERANCE * max(abs(expected), 1e-6):
        cause = "validation runs in training mode" + (f": it changes {join_names(changed)}" if changed else "")
        return failed(evidence, cause, remedy)
    return passed(evidence)


def _relative_difference(context: CheckContext, reference: nn.Module, other: nn.Module) -> float:
    """Return the distance between two trained models, relative to the change of the first during training."""
    initial = _weights(context.model).to(_weights(reference))
    return relative_distance(_weights(reference) - initial, _weights(other) - initial)


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def _batch_size(context: CheckContext) -> int:
    return context.image_count(4, 2)


def _batches(context: CheckContext, count: int) -> list[Batch]:
    """Return the first augmented batches of the first epoch."""
    loader, seed, size = context.loaders["train"], context.plan.seed, _batch_size(context)
    order = epoch_order(seed, 0, len(loader))[: count * size]
    transform = context.pipeline.sample_transform(seed, 0)
    return [context.pipeline(batch, seed, 0) for batch in loader.batches(order, size, transform=transform)]


def _learning_rate(context: CheckContext, batch: Batch) -> float | None:
    """Return the learning rate whose first step changes the weights by FIRST_STEP_SIZE; None without gradients."""
    model = context.copy_model().train()
    loss = context.loss(model, batch)
    if not loss.requires_grad:
        return None
    gradients = torch.autograd.grad(loss, list(trainable_parameters(model).values()), allow_unused=True)
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
    parameters = list(trainable_parameters(model).values())
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    model.train()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate / (step + 1)
        sums, counts = [], []
        for number in range(step * accumulate, (step + 1) * accumulate):
            seed_all(context.plan.seed, "step", 0, number)
            batch = batches[number]
            total, count = context.task.loss(context.outputs(model, batch.images), batch.truth)
            sums.append(total)
            counts.append(count)
        model.zero_grad(set_to_none=True)
        (loss_scale * torch.stack(sums).sum() / torch.stack(counts).sum()).backward()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= loss_scale
        if context.plan.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, context.plan.clip_grad_norm)
        optimizer.step()


class _HarmonicSchedule(Schedule):
    """Factors 1, 1/2, 1/3, ...: every step has another learning rate."""

    def multiplier(self, step: int) -> float:
        return 1 / (step + 1)


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
    trainer = loop.Trainer(context.task, context.pipeline, context.compute, plan, context.loaders["train"])
    loop.fit(trainer, state, loop.Logger(), lambda *names: None, context.stop)


def _validation_losses(context: CheckContext, model: nn.Module) -> tuple[float, float]:
    """Return the loss on a few validation images, by the reference implementation and by `loop.evaluate`."""
    loader, reference, rows = context.loaders["val"], copy.deepcopy(model).eval(), list[Tensor]()
    trainer = loop.Trainer(context.task, context.pipeline, context.compute, context.plan, loader)

    def record_rows(batch: Batch, outputs: Tensor) -> None:
        rows.append(batch.index)

    meter = loop.evaluate(trainer, model.train(), loader, _batch_size(context), 1, context.stop, record_rows)
    order = torch.cat(rows)
    with torch.no_grad():
        batch = context.pipeline.eval_transform(next(loader.batches(order, len(order))))
        loss = context.mean_loss(context.outputs(reference, batch.images), batch.truth, training=False)
    return float(loss), meter.compute()["loss"]
