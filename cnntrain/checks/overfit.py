"""Learning one example by heart: the first check of a training, and what its failure says.

A low loss alone proves nothing: a blank image reaches it, and so does an absurd learning rate after one jump. So the
verdict also asks that it was reached step by step, that every parameter took part, and that the answer depends on the
image.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cnntrain.checks.watch import dead_rectifiers
from cnntrain.tasks.task import Task
from cnntrain.train.device import Compute
from cnntrain.train.signals import StopFlag
from cnntrain.types import Batch, Finding

NEGLIGIBLE = 1e-8  # gradient norm, beside the largest of the same step
LARGEST_JUMP = 10.0  # factor by which one step may change a tensor's norm
LARGEST_OUTPUT = 1e3
SMALLEST_DIFFERENCE = 1e-5  # between the outputs for two images, beside their size
QUICK = 50  # steps for one example, and the root of their number more for several; 28 (one) and 81 (eight) at most
# were measured for classification with the optimizers' default rates
FASTER = 5  # times: what a rate ten times as high must gain for the configured one to count as too low
SLOWEST = 300  # steps for one example: 168 at most were measured, for heat maps of a narrow U-Net
FP16_SCALE = 1024.0  # of the loss
BLANK = 1e-3  # standard deviation over the pixels of a normalized image


@dataclass
class Trial:
    """What was seen while the example was learned; `judge` makes findings of it."""

    floor: float
    uninformed: float
    target: float  # the loss that counts as learned
    losses: list[float] = field(default_factory=list)  # before each step, and after the last
    reached_at: int | None = None  # the step after which the loss was near its floor
    gradient_share: dict[str, float] = field(
        default_factory=dict
    )  # largest over the steps, beside the step's largest
    frozen: list[str] = field(default_factory=list)
    jump: tuple[int, str, float] | None = None  # step, parameter, factor
    largest_output: float = 0.0
    output_difference: float = math.inf
    pixel_deviation: float = math.inf
    label_matters: bool = True
    dead: list[str] = field(default_factory=list)
    probabilities: bool = False
    learning_rate: float = 0.0
    late: bool = False  # time was over before it was learned


def calibrate_norms(model: nn.Module, images: Tensor) -> int:
    """Give BatchNorms the statistics of `images` (N, C, H, W) in one pass, then freeze them (eval mode).

    Returns:
        How many norms there were.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # the running statistics become those of this pass
    if norms and len(images) > 1:
        with torch.no_grad():
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
    return len(norms)


def backward(loss: Tensor, model: nn.Module, compute: Compute) -> None:
    """Backpropagate `loss`, a scalar; in fp16 scaled, as in a training, so that small gradients do not become zero."""
    if compute.precision != "fp16":
        loss.backward()
        return
    (loss * FP16_SCALE).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if gradients:
        torch._foreach_div_(gradients, FP16_SCALE)  # pyright: ignore[reportPrivateImportUsage]


def learn_by_heart(
    model: nn.Module,
    task: Task,
    optimizer: Optimizer,
    batch: Batch,
    other: Batch,
    compute: Compute,
    steps: int,
    allowed_frozen: Sequence[str] = (),
    stop: StopFlag | None = None,
    ends_at: float = math.inf,
) -> Trial:
    """Train `model` (in eval mode, norms calibrated) on `batch` until its loss is near the floor.

    Args:
        batch: the examples, normalized, on the device.
        other: examples with other targets, to see whether the answer depends on the image.
        steps: optimizer steps at most.
        allowed_frozen: parameters that are frozen on purpose.
        ends_at: time.monotonic() at which to give up.
    """
    uninformed = task.uninformed_loss(batch.targets, model(batch.images).detach())
    trial = Trial(task.min_loss(plain=True), uninformed, task.learned_loss(uninformed))
    trial.learning_rate = max(float(group["lr"]) for group in optimizer.param_groups)
    trial.pixel_deviation = float(batch.images.float().std(dim=(1, 2, 3)).min())
    trial.frozen = [n for n, p in model.named_parameters() if not p.requires_grad and n not in allowed_frozen]
    trial.dead = dead_rectifiers(model, torch.cat((batch.images, other.images)))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for step in range(steps + 1):
        if stop is not None:
            stop.check()
        optimizer.zero_grad(set_to_none=True)
        with compute.autocast():
            outputs = model(batch.images)
        loss_sum, count = task.loss(outputs.float(), batch.targets, plain=True)
        loss = loss_sum / count
        trial.losses.append(loss.item())
        if not math.isfinite(trial.losses[-1]):
            return trial
        if trial.losses[-1] <= trial.target and trial.reached_at is None:
            trial.reached_at, trial.largest_output = step, float(outputs.detach().abs().max())
        trial.late = trial.reached_at is None and time.monotonic() > ends_at
        if (
            step == steps
            or trial.jump
            or trial.late
            or trial.losses[-1] < trial.floor - abs(trial.target) - 1
        ):
            break
        if trial.reached_at is not None and step >= trial.reached_at + 2 and step >= 5:
            break  # a few more steps than needed: whatever has a gradient at all has shown it
        if loss.requires_grad:
            backward(loss, model, compute)
        parameters = [parameter.detach() for _, parameter in named]
        measured = [*_norms([p.grad for _, p in named if p.grad is not None]), *_norms(parameters)]
        optimizer.step()
        measured += _norms(parameters)
        _note_norms(trial, step, named, torch.stack(measured).tolist() if measured else [])
    _look_at_answers(trial, model, task, batch, other, compute)
    return trial


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """The L2 norm of each tensor, a float32 scalar on the device."""
    if not tensors:
        return []
    norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage]
    return [norm.float() for norm in norms]


def _note_norms(
    trial: Trial, step: int, named: Sequence[tuple[str, nn.Parameter]], measured: list[float]
) -> None:
    """Note the shares of the gradients, and the largest factor by which the step changed a parameter's norm.

    Args:
        measured: norms of the gradients that there are, then of all parameters before the step, then after it.
    """
    with_gradient = [name for name, parameter in named if parameter.grad is not None]
    count = len(with_gradient)
    norms = dict.fromkeys((name for name, _ in named), 0.0) | dict(
        zip(with_gradient, measured[:count], strict=True)
    )
    largest = max(norms.values(), default=0.0)
    for name, norm in norms.items():
        share = norm / largest if largest > 0 and math.isfinite(norm) else 0.0
        trial.gradient_share[name] = max(trial.gradient_share.get(name, 0.0), share)
    before, after = measured[count : count + len(named)], measured[count + len(named) :]
    for (name, parameter), old, new in zip(named, before, after, strict=True):
        # What starts at zero may grow from it: vectors to 0.1 an element, weights to 0.001.
        floor = (0.1 if parameter.ndim <= 1 else 0.001) * math.sqrt(parameter.numel())
        factor = new / max(old, floor)
        if not factor <= LARGEST_JUMP and (trial.jump is None or factor > trial.jump[2]):
            trial.jump = (step, name, factor)


@torch.no_grad()
def _look_at_answers(
    trial: Trial, model: nn.Module, task: Task, batch: Batch, other: Batch, compute: Compute
) -> None:
    with compute.autocast():
        mine, theirs = model(batch.images[:1]).float(), model(other.images[:1]).float()
    if trial.reached_at is None:  # what comes after it was learned is no longer needed
        trial.largest_output = float(mine.abs().max())
    trial.output_difference = float((mine - theirs).norm() / mine.norm().clamp(min=1e-12))
    both = torch.cat((mine, theirs))
    if both.ndim > 1 and both.shape[1] > 1:
        total = both.sum(dim=1)
        trial.probabilities = bool((both >= 0).all() and ((total - 1).abs() < 1e-3).all())
    own, others = {k: v[:1] for k, v in batch.targets.items()}, {k: v[:1] for k, v in other.targets.items()}
    right = [float(part) for part in task.loss(mine, own, plain=True)]
    wrong = [float(part) for part in task.loss(mine, others, plain=True)]
    alike = all(torch.equal(value, others[name]) for name, value in own.items())  # nothing to tell apart
    trial.label_matters = alike or right != wrong
    if trial.reached_at is None and not trial.late:  # learned without, a branch that died was not needed
        trial.dead = [*trial.dead, *dead_rectifiers(model, torch.cat((batch.images, other.images)))]


def judge(trial: Trial, example: str) -> list[Finding]:
    """One finding per question, the most telling first; the trial has passed when none is a FAIL."""
    silent = [name for name, share in trial.gradient_share.items() if share < NEGLIGIBLE]
    loss = trial.losses[-1]
    keys_lr = ("optimizer.lr",)
    findings = [
        _finding(
            "image", trial.pixel_deviation >= BLANK, f"pixels deviate by {trial.pixel_deviation:.2g}",
            f"{example} is blank: every pixel has the same value", "look at the picture and at the data", ("data",),
        ),
        _finding(
            "learning rate", trial.learning_rate > 0, f"learning rate {trial.learning_rate:.3g}",
            "the learning rate is 0: no step changes anything", "set optimizer.lr", keys_lr,
        ),
        _finding(
            "frozen", not trial.frozen, f"{len(trial.frozen)} frozen parameters",
            f"frozen, they can't learn: {_names(trial.frozen)}", "give them requires_grad=True, or set model.freeze",
            ("model.freeze",),
        ),
        _finding(
            "finite", math.isfinite(loss), f"loss {loss:.4g} after step {len(trial.losses) - 1}",
            f"the loss is {loss} at step {len(trial.losses) - 1}"
            + (": the learning rate is far too high" if len(trial.losses) > 1 else " before any step was taken"),
            "lower optimizer.lr" if len(trial.losses) > 1 else "look for a division by zero or a log of zero", keys_lr,
        ),
        _finding(
            "label", trial.label_matters, "another label gives another loss" if trial.label_matters else "same loss",
            "the loss does not depend on the label: it never sees it", "pass the targets to the loss", ("task",),
        ),
        _finding(
            "loss sign", not loss < trial.floor - 1e-4 - abs(trial.floor) * 1e-3,
            f"loss {loss:.4g}, floor {trial.floor:.4g}",
            f"the loss fell below the lowest that there is ({trial.floor:.4g}): its sign is flipped",
            "minimize the loss, not its negative", ("task",),
        ),
        _finding(
            "steady", trial.jump is None, "no step changed a tensor more than tenfold" if not trial.jump else
            f"step {trial.jump[0]} changed {trial.jump[1]} {trial.jump[2]:.3g}-fold",
            f"the learning rate ({trial.learning_rate:.3g}) is far too high: the weights jumped", "lower optimizer.lr",
            keys_lr,
        ),
        _finding(
            "moderate", trial.largest_output < LARGEST_OUTPUT, f"largest output {trial.largest_output:.3g}",
            f"outputs as large as {trial.largest_output:.3g}: the learning rate is too high",
            "lower optimizer.lr (norms are frozen here; with batch statistics a training may bear more)", keys_lr,
        ),
        _finding(
            "rectifiers", not trial.dead, f"{len(set(trial.dead))} dead layers",
            f"every ReLU is dead (zero for every image) in {_names(sorted(set(trial.dead)))}",
            "look at the initialization and the biases before it", ("model.init",),
        ),
        _finding(
            "logits", trial.reached_at is not None or not trial.probabilities, "outputs are no probabilities",
            "the outputs are probabilities already: a softmax before the cross-entropy, which takes one itself",
            "take the softmax out of the network", ("model",),
        ),
        _finding(
            "image matters", not trial.output_difference <= SMALLEST_DIFFERENCE,
            f"outputs for another image differ by {trial.output_difference:.2g}",
            "the output ignores the image: another image gets the same output",
            "look for what overwrites or averages away the features", ("model",),
        ),
        _finding(
            "gradients", not silent, f"{len(trial.gradient_share) - len(silent)} of {len(trial.gradient_share)} "
            "parameter tensors got a gradient",
            f"no gradient reaches {_names(silent)}: something detaches them from the loss",
            "look for detach(), .data, no_grad or a layer that forward() never calls", ("model",),
        ),
        _learned(trial),
    ]  # fmt: skip
    return findings


def _learned(trial: Trial) -> Finding:
    first, loss, steps = trial.losses[0], trial.losses[-1], len(trial.losses) - 1
    evidence = f"loss {first:.4g} -> {loss:.4g} in {steps} steps (floor {trial.floor:.4g})"
    if trial.reached_at is not None:
        return Finding("learned", "PASS", f"{evidence}, learned at step {trial.reached_at}")
    if loss > first - 0.1 * abs(first - trial.floor):
        known = f", the loss of an answer that knows nothing ({trial.uninformed:.4g})"
        near = abs(loss - trial.uninformed) < 0.1 * max(trial.uninformed, 1e-9)
        cause = f"the loss is stuck at {loss:.4g}{known if near else ''}"
        remedy = "try another optimizer.lr; look at the initialization and at what forward() returns"
    else:
        cause = f"the loss falls, but slowly: {loss:.4g} after {steps} steps"
        remedy = "raise optimizer.lr (or overfit.steps)"
    return Finding("learned", "FAIL", evidence, cause, remedy, ("optimizer.lr", "overfit.steps"))


def judge_pace(trial: Trial, examples: int, attempt: Callable[[int], Trial], strict: bool = False) -> Finding:
    """Whether the examples were learned in few steps: a sound network at a sound learning rate takes few.

    How many are few differs between tasks. So a trial that took a while is repeated at ten times the learning rate, and
    is slow where that learns soundly in a fifth of the steps.

    Args:
        trial: one that passed.
        examples: how many were learned.
        attempt: learns the same from the same start at ten times the learning rate, in so many steps at most.
        strict: a slow trial is a FAIL, not a WARN.
    """
    steps = trial.reached_at or 0
    evidence = f"learned in {steps} steps"
    if steps <= QUICK * math.sqrt(examples):
        return Finding("pace", "PASS", evidence)
    faster = attempt(steps // FASTER)
    verdict = "FAIL" if strict else "WARN"
    if faster.reached_at is not None and all(f.verdict != "FAIL" for f in judge(faster, "")):
        rate = faster.learning_rate
        evidence += f", and in {faster.reached_at} at ten times the learning rate ({rate:.2g})"
        cause = f"learned, but slowly: {steps} steps, and {faster.reached_at} with optimizer.lr={rate:.2g}"
        return Finding("pace", verdict, evidence, cause, "raise optimizer.lr", ("optimizer.lr",))
    if steps > SLOWEST and examples == 1:
        cause = f"learned, but slowly: {steps} steps, and ten times the learning rate is not much faster"
        remedy = "look at the initialization, the norms and the scale of the images; try another optimizer.lr"
        return Finding("pace", verdict, evidence, cause, remedy, ("model.init", "optimizer.lr"))
    return Finding("pace", "PASS", f"{evidence}; ten times the learning rate is not much faster")


def _finding(
    name: str, passed: bool, evidence: str, cause: str, remedy: str, keys: tuple[str, ...]
) -> Finding:
    return Finding(name, "PASS", evidence) if passed else Finding(name, "FAIL", evidence, cause, remedy, keys)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
