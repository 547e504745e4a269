"""Are backward passes those of the forward passes? The gradient against differences of the loss, in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cnntrain.checks.context import CheckContext, failed, join_names, passed, skipped
from cnntrain.checks.overfit_trial import calibrate_norms
from cnntrain.checks.short_training import image_count, seeded_generator, trainable_parameters
from cnntrain.tasks.task import Task
from cnntrain.types import Finding

CHANGES = (1e-6, 1e-8, 1e-4, 1e-3)  # of the loss, by which strides are chosen
AGREES = 1e-3  # relative error
JITTER = 1e-2  # off the places where a ReLU or a maximum has no derivative


def derivative(context: CheckContext) -> Finding:
    """The slope of the loss along the gradient, by differences, is the one that the gradient says."""
    batch = context.eval_batch(count=image_count(context, 4, 2))
    try:
        slopes = _prepare(context, batch.images, batch.truth)
        if not slopes.names:
            return skipped("no parameter has a gradient; see gradients")
        error = slopes.error(slopes.names)
        evidence = f"slope along the gradient by differences and by autograd differ by {error:.1g} in float64"
        if error <= AGREES:
            return passed(evidence)
        wrong = [n for n in slopes.names if context.seconds_left > 0 and slopes.error([n]) > AGREES]
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as problem:
        return skipped(f"the network does not run in float64 on the CPU: {str(problem).splitlines()[0][:80]}")
    behind = slopes.names[slopes.names.index(wrong[-1]) + 1 :] if wrong else []
    where = f": wrong for {join_names(wrong)}" if wrong else ""
    where += f", right from {behind[0]} on" if behind else ""
    cause = f"the gradient is not the loss's{where}; an autograd.Function with a wrong backward, or .data"
    remedy = "test it by torch.autograd.gradcheck (a straight-through estimator differs on purpose)"
    return failed(evidence, cause, remedy, "model", "task")


@dataclass
class _Slopes:
    """A network in float64, with the gradient of its loss by name, as far as it is not zero."""

    model: nn.Module
    task: Task
    images: Tensor
    truth: dict[str, Tensor]
    parameters: dict[str, nn.Parameter]
    gradients: dict[str, Tensor]

    @property
    def names(self) -> list[str]:
        return list(self.gradients)

    def loss(self) -> Tensor:
        torch.manual_seed(0)
        with _KeepDouble():
            total, count = self.task.loss(self.model(self.images), self.truth, plain=True)
            return total / count.clamp(min=1e-12)

    def error(self, names: Sequence[str]) -> float:
        """Relative error of the slope when these parameters move, each by one share of its size; the least of all."""
        moves = {
            n: g * (self.parameters[n].detach().norm() / g.norm())
            for n, g in self.gradients.items()
            if n in names
        }
        expected = sum(float((self.gradients[name] * move).sum()) for name, move in moves.items())
        smallest = math.inf
        size = max(abs(float(self.loss().detach())), 1e-9)
        for change in CHANGES:
            found = abs(self._slope(moves, change * size / expected) / expected - 1)
            smallest = min(smallest, found) if math.isfinite(found) else smallest
            if smallest <= AGREES:
                break
        return smallest

    @torch.no_grad()
    def _slope(self, moves: dict[str, Tensor], stride: float) -> float:
        """(loss(w + stride * move) - loss(w - stride * move)) / (2 * stride); the weights are put back."""
        kept, losses = {name: self.parameters[name].clone() for name in moves}, []
        for sign in (1, -1, 0):
            for name, move in moves.items():
                self.parameters[name].copy_(kept[name] + sign * stride * move)
            if sign:
                losses.append(float(self.loss()))
        return (losses[0] - losses[1]) / (2 * stride)


def _prepare(context: CheckContext, images: Tensor, truth: dict[str, Tensor]) -> _Slopes:
    model, draws = context.copy_model(), seeded_generator(3)
    with torch.no_grad():  # biases of exactly zero put ReLUs where they have no derivative
        for parameter in trainable_parameters(model).values():
            size = float(parameter.square().mean().sqrt()) or 1.0
            parameter += JITTER * size * torch.randn(parameter.shape, generator=draws).to(parameter)
    if not context.trained:
        calibrate_norms(model, context.eval_batch(count=image_count(context, 16)).images)
    model = model.cpu().double()
    parameters = trainable_parameters(model)
    truth = {name: target.cpu() for name, target in truth.items()}
    slopes = _Slopes(model, context.task, images.cpu().double(), truth, parameters, {})
    loss = slopes.loss()
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters, found, strict=True)
        slopes.gradients = {
            name: gradient for name, gradient in pairs if gradient is not None and gradient.any()
        }
    return slopes


class _KeepDouble(TorchFunctionMode):
    """`.float()` leaves float64 as it is: losses and networks cast, and would round the differences away."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))
