"""Compare gradients computed by autograd with finite differences of the loss, in float64."""

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

LOSS_CHANGES = (1e-6, 1e-8, 1e-4, 1e-3)  # relative changes of the loss that determine the step size
TOLERANCE = 1e-3  # relative error
JITTER = 1e-2  # moves parameters away from points where a ReLU or a maximum is not differentiable


def derivative(context: CheckContext) -> Finding:
    """Check that the derivative of the loss along its gradient equals the finite difference."""
    batch = context.eval_batch(count=image_count(context, 4, 2))
    try:
        test = _prepare(context, batch.images, batch.truth)
        if not test.names:
            return skipped("no parameter has a gradient; see gradients")
        error = test.error(test.names)
        evidence = f"relative difference between autograd and finite differences in float64: {error:.1g}"
        if error <= TOLERANCE:
            return passed(evidence)
        wrong = [n for n in test.names if context.seconds_left > 0 and test.error([n]) > TOLERANCE]
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as problem:
        message = str(problem).splitlines()[0][:80]
        return skipped(f"the network does not run in float64 on the CPU: {message}")
    correct_after = test.names[test.names.index(wrong[-1]) + 1 :] if wrong else []
    where = f" of {join_names(wrong)}" if wrong else ""
    where += f" (correct from {correct_after[0]} on)" if correct_after else ""
    cause = f"the gradient{where} is wrong: an autograd.Function with a wrong backward(), or .data"
    remedy = "test the function with torch.autograd.gradcheck (a straight-through estimator differs on purpose)"
    return failed(evidence, cause, remedy, "model", "task")


@dataclass
class _GradientTest:
    """A model in float64, and the non-zero gradients of its loss by parameter name."""

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
            if smallest <= TOLERANCE:
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


def _prepare(context: CheckContext, images: Tensor, truth: dict[str, Tensor]) -> _GradientTest:
    model, generator = context.copy_model(), seeded_generator(3)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            size = float(parameter.square().mean().sqrt()) or 1.0
            parameter += JITTER * size * torch.randn(parameter.shape, generator=generator).to(parameter)
    if not context.trained:
        calibrate_norms(model, context.eval_batch(count=image_count(context, 16)).images)
    model = model.cpu().double()
    parameters = trainable_parameters(model)
    truth = {name: target.cpu() for name, target in truth.items()}
    test = _GradientTest(model, context.task, images.cpu().double(), truth, parameters, {})
    loss = test.loss()
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters, gradients, strict=True)
        test.gradients = {name: g for name, g in pairs if g is not None and g.any()}
    return test


class _KeepDouble(TorchFunctionMode):
    """Makes `.float()` a no-op on float64, because rounding in losses or models would hide the differences."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))
