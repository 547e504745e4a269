"""Overfit a few examples, measure what happens, and diagnose failures.

A low loss alone does not prove that training works: it is also reached with a blank image, or by a single huge step
with an absurd learning rate. A trial therefore passes only if no step changed the weights abruptly, every parameter
received a gradient, and the output depends on the image.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.checks.context import backward, join_names, sums_to_one
from cnntrain.checks.watch import dead_rectifiers
from cnntrain.tasks.task import Task
from cnntrain.train.device import Compute
from cnntrain.train.evaluate import predict_batch
from cnntrain.train.signals import StopFlag
from cnntrain.types import Batch, Finding

MIN_GRADIENT_SHARE = 1e-8  # gradient norm, relative to the largest of the same step
MAX_STEP_FACTOR = 10.0  # factor by which one step may change the norm of a tensor
MAX_OUTPUT = 1e3
MIN_OUTPUT_DIFFERENCE = 1e-5  # between the outputs for two images, relative to their norm
# Steps to learn one example, times sqrt(n) for n examples. With the default learning rates, classification took at
# most 28 steps for one example and 81 for eight.
FAST_STEPS = 50
SPEEDUP = 5  # minimum speedup by a tenfold learning rate for the configured one to count as too low
MAX_STEPS_FOR_ONE = 300  # 168 is the largest measured number, for heat maps with a narrow U-Net
LR = "optimizer.lr"
BLANK_STD = 1e-3  # standard deviation over the pixels of a normalized image


@dataclass
class OverfitResult:
    """Measurements while examples were overfitted; `diagnose` turns them into findings."""

    floor: float  # lowest possible loss
    uninformed: float  # loss of a prediction that ignores the image
    target: float  # loss that counts as learned
    losses: list[float] = field(default_factory=list)  # before each step, and after the last one
    reached_at: int | None = None  # number of steps after which the loss was at most `target`
    # By parameter, the largest ratio of its gradient norm to the largest gradient norm of the step.
    gradient_share: dict[str, float] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)  # parameters that are frozen unintentionally
    jump: tuple[int, str, float] | None = None  # (step, parameter, factor): the parameter's norm changed too much
    largest_output: float = 0.0
    output_difference: float = math.inf  # relative, between the outputs for two images with different targets
    pixel_deviation: float = math.inf  # smallest standard deviation over the pixels of an image
    label_matters: bool = True  # whether another target gives another loss
    dead: list[str] = field(default_factory=list)  # layers whose ReLUs are zero for all images
    probabilities: bool = False  # whether the outputs are non-negative and sum to 1
    learning_rate: float = 0.0
    out_of_time: bool = False  # whether the time limit ended the trial before the examples were learned


@dataclass(frozen=True)
class OverfitTrial:
    """Settings of a trial."""

    task: Task
    compute: Compute
    batch: Batch  # the examples to learn, normalized, on the device
    other: Batch  # examples with other targets, to test whether the output depends on the image
    max_steps: int  # of the optimizer
    freeze: bool = False  # whether parameters are frozen on purpose
    stop: StopFlag = field(default_factory=StopFlag)
    deadline: float = math.inf  # time.monotonic() at which to give up

    def run(self, model: nn.Module, optimizer: Optimizer) -> OverfitResult:
        """Train `model`, in eval mode with calibrated norms, on the batch until its loss is near the floor."""
        task, batch = self.task, self.batch
        uninformed = task.uninformed_loss(batch.truth, model(batch.images).detach())
        result = OverfitResult(task.min_loss(training=False), uninformed, task.memorized_loss(uninformed))
        result.learning_rate = max(float(group["lr"]) for group in optimizer.param_groups)
        result.pixel_deviation = float(batch.images.float().std(dim=(1, 2, 3)).min())
        result.frozen = [n for n, p in model.named_parameters() if not p.requires_grad and not self.freeze]
        result.dead = dead_rectifiers(model, torch.cat((batch.images, self.other.images)))
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for step in range(self.max_steps + 1):
            self.stop.check()
            optimizer.zero_grad(set_to_none=True)
            outputs = predict_batch(model, batch.images, self.compute)
            loss_sum, count = task.loss(outputs, batch.truth, training=False)
            loss = loss_sum / count
            result.losses.append(loss.item())
            if not math.isfinite(result.losses[-1]):
                return result
            if result.losses[-1] <= result.target and result.reached_at is None:
                result.reached_at, result.largest_output = step, float(outputs.detach().abs().max())
            result.out_of_time = result.reached_at is None and time.monotonic() > self.deadline
            below_floor = result.losses[-1] < result.floor - abs(result.target) - 1
            if step == self.max_steps or result.jump or result.out_of_time or below_floor:
                break
            # A few more steps than needed, so that every parameter has a chance to receive a gradient.
            if result.reached_at is not None and step >= result.reached_at + 2 and step >= 5:
                break
            if loss.requires_grad:
                backward(loss, model, self.compute)
            parameters = [parameter.detach() for _, parameter in named]
            gradients = [p.new_zeros(1) if p.grad is None else p.grad for _, p in named]
            norms = [*_norms(gradients), *_norms(parameters)]
            optimizer.step()
            norms += _norms(parameters)
            if named:
                _record_norms(result, step, named, torch.stack(norms).view(3, -1).tolist())
        self._compare_outputs(result, model)
        return result

    @torch.no_grad()
    def _compare_outputs(self, result: OverfitResult, model: nn.Module) -> None:
        """Compare the outputs, and their losses, for two examples with different targets."""
        task, batch, other = self.task, self.batch, self.other
        own_output = predict_batch(model, batch.images[:1], self.compute)
        other_output = predict_batch(model, other.images[:1], self.compute)
        if result.reached_at is None:  # otherwise it was measured at the step that reached the target
            result.largest_output = float(own_output.abs().max())
        difference = (own_output - other_output).norm() / own_output.norm().clamp(min=1e-12)
        result.output_difference = float(difference)
        result.probabilities = sums_to_one(torch.cat((own_output, other_output)))
        own, others = (each.take(slice(0, 1)).truth for each in (batch, other))
        own_loss = [float(part) for part in task.loss(own_output, own, training=False)]
        other_loss = [float(part) for part in task.loss(own_output, others, training=False)]
        same_target = all(torch.equal(value, others[name]) for name, value in own.items())
        result.label_matters = same_target or own_loss != other_loss
        # A layer that died after the example was learned was not needed.
        if result.reached_at is None and not result.out_of_time:
            images = torch.cat((batch.images, other.images))
            result.dead = [*result.dead, *dead_rectifiers(model, images)]


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """Return the L2 norm of each tensor, a float32 scalar on the device."""
    if not tensors:
        return []
    norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage]
    return [norm.float() for norm in norms]


def _record_norms(
    result: OverfitResult, step: int, named: Sequence[tuple[str, nn.Parameter]], norms: Sequence[list[float]]
) -> None:
    """Record gradient shares, and the largest factor by which the step changed the norm of a parameter.

    Args:
        norms: of the gradients, of the parameters before the step, and of the parameters after it.
    """
    largest = max(norms[0])
    for (name, parameter), gradient, old, new in zip(named, *norms, strict=True):
        share = gradient / largest if largest > 0 and math.isfinite(gradient) else 0.0
        result.gradient_share[name] = max(result.gradient_share.get(name, 0.0), share)
        # Parameters that start at zero may grow: biases and scales to 0.1 per element, weights to 0.001.
        floor = (0.1 if parameter.ndim <= 1 else 0.001) * math.sqrt(parameter.numel())
        factor = new / max(old, floor)
        if not factor <= MAX_STEP_FACTOR and (result.jump is None or factor > result.jump[2]):
            result.jump = (step, name, factor)


def diagnose(result: OverfitResult, example: str) -> list[Finding]:
    """Return one finding per question, the most informative first. The trial passed if none is a FAIL."""
    loss, steps, rate = result.losses[-1], len(result.losses) - 1, result.learning_rate
    dead, shares = sorted(set(result.dead)), result.gradient_share
    no_gradient = [name for name, share in shares.items() if share < MIN_GRADIENT_SHARE]
    jump = f"no step changed the norm of a parameter by more than a factor of {MAX_STEP_FACTOR:g}"
    if result.jump is not None:
        jump = "step {} changed the norm of {} by a factor of {:.3g}".format(*result.jump)
    probabilities = result.probabilities and result.reached_at is None
    finite_cause = f"the loss is {loss} at step {steps}: the learning rate is far too high"
    finite_remedy = "lower optimizer.lr"
    if not steps:
        finite_cause = f"the loss is {loss} before the first step"
        finite_remedy = "look for a division by zero or the logarithm of zero"
    questions = [  # the most informative first: name, whether the answer is good, evidence, cause, remedy, config key
        (
            "image",
            result.pixel_deviation >= BLANK_STD,
            f"standard deviation of the pixels: {result.pixel_deviation:.2g}",
            f"{example} is blank: every pixel has the same value",
            "look at the figure, and check how the image is read",
            "data",
        ),
        (
            "learning rate",
            rate > 0,
            f"learning rate {rate:.3g}",
            "the learning rate is 0, so no step changes a parameter",
            "set optimizer.lr",
            LR,
        ),
        (
            "frozen",
            not result.frozen,
            f"{len(result.frozen)} frozen parameter tensors",
            f"frozen parameters cannot learn: {join_names(result.frozen)}",
            "set requires_grad=True, or set model.freeze if this is intended",
            "model.freeze",
        ),
        ("finite", math.isfinite(loss), f"loss {loss:.4g} after step {steps}", finite_cause, finite_remedy, LR),
        (
            "label",
            result.label_matters,
            f"{'different losses' if result.label_matters else 'the same loss'} for two different targets",
            "the loss does not depend on the target",
            "use the targets in the loss",
            "task",
        ),
        (
            "loss sign",
            not loss < result.floor - 1e-4 - abs(result.floor) * 1e-3,
            f"loss {loss:.4g}, lowest possible loss {result.floor:.4g}",
            f"the loss fell below the lowest possible value ({result.floor:.4g}): its sign is probably wrong",
            "minimize the loss, not its negative",
            "task",
        ),
        (
            "steady",
            result.jump is None,
            jump,
            f"the learning rate ({rate:.3g}) is far too high: one step changed the weights abruptly",
            "lower optimizer.lr",
            LR,
        ),
        (
            "moderate",
            result.largest_output < MAX_OUTPUT,
            f"largest output {result.largest_output:.3g}",
            f"the outputs grew to {result.largest_output:.3g}: the learning rate is too high",
            "lower optimizer.lr (norms are frozen here; batch statistics may tolerate a higher rate)",
            LR,
        ),
        (
            "rectifiers",
            not dead,
            f"{len(dead)} layers with dead ReLUs",
            f"all ReLUs are dead (zero for every image) in {join_names(dead)}",
            "check the initialization and the biases of the layers before them",
            "model.init",
        ),
        (
            "logits",
            not probabilities,
            f"the outputs are {'' if probabilities else 'not '}probabilities",
            "the outputs are probabilities, but cross-entropy expects logits: it applies a softmax itself",
            "remove the softmax at the end of the network",
            "model",
        ),
        (
            "image matters",
            not result.output_difference <= MIN_OUTPUT_DIFFERENCE,
            f"the outputs for two images differ by {result.output_difference:.2g} (relative)",
            "the output does not depend on the image: another image gets the same output",
            "look for an operation that overwrites the features or averages them away",
            "model",
        ),
        (
            "gradients",
            not no_gradient,
            f"{len(shares) - len(no_gradient)} of {len(shares)} parameter tensors received a gradient",
            f"no gradient reaches {join_names(no_gradient)}: these parameters are detached from the loss",
            "look for detach(), .data, no_grad, or a layer that forward() never calls",
            "model",
        ),
    ]
    findings = []
    for name, passed, evidence, cause, remedy, key in questions:
        failure = Finding(name, "FAIL", evidence, cause, remedy, (key,))
        findings.append(Finding(name, "PASS", evidence) if passed else failure)
    return [*findings, _learned(result)]


def _learned(result: OverfitResult) -> Finding:
    first, loss, steps = result.losses[0], result.losses[-1], len(result.losses) - 1
    evidence = f"loss {first:.4g} -> {loss:.4g} in {steps} steps (lowest possible {result.floor:.4g})"
    if result.reached_at is not None:
        return Finding("learned", "PASS", f"{evidence}, learned at step {result.reached_at}")
    if loss > first - 0.1 * abs(first - result.floor):
        uninformed = abs(loss - result.uninformed) < 0.1 * max(result.uninformed, 1e-9)
        note = f", near that of a prediction that ignores the image ({result.uninformed:.4g})"
        cause = f"the loss does not decrease: it stays at {loss:.4g}{note if uninformed else ''}"
        remedy = "try another optimizer.lr; check the initialization and what forward() returns"
    else:
        cause = f"the loss decreases too slowly: {loss:.4g} after {steps} steps"
        remedy = "increase optimizer.lr (or overfit.steps)"
    return Finding("learned", "FAIL", evidence, cause, remedy, (LR, "overfit.steps"))


def diagnose_pace(
    result: OverfitResult, examples: int, run_faster: Callable[[int], OverfitResult], strict: bool = False
) -> Finding:
    """Judge whether the examples were learned in few steps, as they are with a good learning rate.

    The number of steps depends on the task. A trial that took many steps is therefore repeated with ten times the
    learning rate, and counts as slow if that takes at most a fifth of the steps and passes.

    Args:
        result: a trial that passed.
        examples: number of examples learned.
        run_faster: repeats the trial with ten times the learning rate and the given maximum number of steps.
        strict: whether a slow trial is a FAIL instead of a WARN.
    """
    steps = result.reached_at or 0
    evidence = f"learned in {steps} steps"
    if steps <= FAST_STEPS * math.sqrt(examples):
        return Finding("pace", "PASS", evidence)
    faster = run_faster(steps // SPEEDUP)
    verdict = "FAIL" if strict else "WARN"
    if faster.reached_at is not None and all(f.verdict != "FAIL" for f in diagnose(faster, "")):
        rate = faster.learning_rate
        evidence += f", and in {faster.reached_at} steps with ten times the learning rate ({rate:.2g})"
        cause = f"learning takes {steps} steps, but only {faster.reached_at} with optimizer.lr={rate:.2g}"
        return Finding("pace", verdict, evidence, cause, "increase optimizer.lr", (LR,))
    if steps > MAX_STEPS_FOR_ONE and examples == 1:
        cause = f"learning takes {steps} steps, and ten times the learning rate is not much faster"
        remedy = "check the initialization, the norms and the scale of the images; try another optimizer.lr"
        return Finding("pace", verdict, evidence, cause, remedy, ("model.init", LR))
    return Finding("pace", "PASS", f"{evidence}; ten times the learning rate is not much faster")
