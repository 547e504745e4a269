"""Checks of the optimizer's step size: learning rate and weight decay."""

import dataclasses
import time

import torch

from cnntrain.checks.context import CheckContext, failed, passed, skipped, warned
from cnntrain.checks.overfit_trial import backward
from cnntrain.checks.short_training import step_seconds
from cnntrain.train.lr_finder import MIN_DECREASE, RangeTest
from cnntrain.types import Finding

RANGE_SHARE = 0.25  # of the remaining time budget
MIN_BATCH = 8
TOO_HIGH = 2.0  # relative to the rate at which the loss diverges
TOO_LOW = 50.0  # ratio of the rate at which the loss begins to fall to the configured one
MIN_TOTAL_STEPS = 100  # of a training that is expected to learn something
WARN_PULL, FAIL_PULL = 1.0, 3.0  # gradient of weight decay, relative to that of the loss
WARN_DECOUPLED, FAIL_DECOUPLED = 0.5, 1.0  # decoupled weight decay
MAX_REMAINING = 0.9  # of the weights, if nothing but weight decay acted; above, its value does not matter
DEFAULT_LR = 1e-3
LR, DECAY = "optimizer.lr", "optimizer.weight_decay"


def learning_rate(context: CheckContext) -> Finding:
    """Compare the configured learning rate with the result of a range test."""
    if context.trained:
        return skipped("the weights are already trained")
    rate = configured_rate(context)
    test = range_test(context)
    if test is None or not test.complete:
        return skipped("the time budget (check.budget_s) is too small for a range test, or the loss has no gradient")
    context.curves["range test: loss over learning rate"] = {
        "mini-batch": (test.rates, test.losses),
        "smoothed": (test.rates, test.smoothed),
    }
    diverged, suggestion = test.diverged_at, test.suggestion
    limit = f"diverges at {diverged:.2g}" if diverged else f"does not diverge up to {test.rates[-1]:.2g}"
    fall = f"from {test.initial_loss:.3g} the loss falls by {max(test.decrease, 0):.0%}"
    evidence = f"{LR} is {rate:.3g}; {fall} and {limit}"
    if (size := context.cache["range batch"]) < _run_batch(context):
        evidence += f" (measured with batches of {size} because of the time budget; see `cnntrain lr-find`)"
    if diverged and rate >= _highest_rate(context, diverged):
        # Curves are noisy: repeat the test with another seed before reporting a FAIL.
        again = _run_range_test(context, context.plan.seed + 1)
        if again and again.diverged_at and rate >= _highest_rate(context, again.diverged_at):
            cause = f"the learning rate is too high: {rate / diverged:.3g} times the rate at which the loss diverges"
            return failed(evidence, cause, f"try {LR}={diverged / 10:.1g}, or a longer warm-up", LR)
    if suggestion is None or test.rate_sum_to_decrease is None:
        return skipped(f"undecided: the loss falls by less than {MIN_DECREASE:.0%} at any rate; {evidence}")
    distance = rate * context.plan.total_steps
    if distance < test.rate_sum_to_decrease and context.plan.total_steps >= MIN_TOTAL_STEPS:
        cause = (
            f"the learning rate is too low: the sum of the learning rates of all {context.plan.total_steps:,} steps is "
            f"{distance:.2g}, but the loss begins to fall at a sum of {test.rate_sum_to_decrease:.2g}"
        )
        return failed(evidence, cause, f"try {LR}={suggestion:.1g}", LR, "epochs")
    if test.decreases_from is not None and rate * TOO_LOW <= test.decreases_from:
        cause = (
            f"the learning rate is too low: the loss begins to fall at {test.decreases_from:.2g}, which is "
            f"{test.decreases_from / rate:.3g} times as high"
        )
        return failed(evidence, cause, f"try {LR}={suggestion:.1g}", LR)
    return passed(f"{evidence} (suggested {suggestion:.2g}; steepest at {test.steepest:.2g})")


def _highest_rate(context: CheckContext, diverged: float) -> float:
    """Return the highest acceptable rate; larger batches tolerate higher rates (Goyal et al. 2017)."""
    return TOO_HIGH * diverged * max(_run_batch(context) / context.cache["range batch"], 1)


def _run_batch(context: CheckContext) -> int:
    """Return the number of images per optimizer step of the run."""
    return min(context.plan.batch_size * context.plan.accumulate, len(context.loaders["train"]))


def configured_rate(context: CheckContext) -> float:
    """Return the peak learning rate of the schedule."""
    return max(group["peak_lr"] for group in context.make_optimizer(context.copy_model()).param_groups)


def usable_rate(context: CheckContext) -> float:
    """Return the configured learning rate if the range test agrees with it, else the suggested one.

    A bad learning rate has a check of its own and must not affect others.
    """
    rate, test = configured_rate(context), range_test(context)
    if test is None or test.suggestion is None:
        return rate or DEFAULT_LR
    return rate if test.suggestion / 30 <= rate <= test.suggestion * 5 else test.suggestion


def range_test(context: CheckContext) -> RangeTest | None:
    """Return the range test, which runs once per context; None if there is not enough time."""
    if "range test" not in context.cache:
        context.cache["range test"] = _run_range_test(context, context.plan.seed)
    return context.cache["range test"]


def _run_range_test(context: CheckContext, seed: int) -> RangeTest | None:
    """Run the range test of `cnntrain lr-find`, with smaller batches if the time budget requires it."""
    if not context.loss(context.copy_model(), context.eval_batch("train", 2)).requires_grad:
        return None
    seconds, count = RANGE_SHARE * context.seconds_left, len(context.loaders["train"])
    steps = context.config["lr_find"]["steps"]
    affordable = int(8 * seconds / (steps * step_seconds(context)))  # images per step
    plan = dataclasses.replace(context.plan, seed=seed)
    size = min(_run_batch(context), affordable)
    if size < _run_batch(context):
        size = min(size, plan.batch_size)
        if size < min(MIN_BATCH, plan.batch_size):
            return None
        batches = count // size
        plan = dataclasses.replace(plan, batch_size=size, accumulate=1, drop_last=True, limit_batches=None)
        plan = dataclasses.replace(plan, batches_per_epoch=batches, steps_per_epoch=batches)
    context.cache["range batch"] = size
    return context.run_range_test(plan, time.monotonic() + 2 * seconds)


def weight_decay(context: CheckContext) -> Finding:
    """Compare the gradient of weight decay with that of the loss; for decoupled decay, check its value."""
    model = context.copy_model().train()
    optimizer = context.make_optimizer(model)
    groups = [group for group in optimizer.param_groups if group.get("weight_decay")]
    if not groups:
        return passed("no weight decay")
    if context.trained:
        return skipped("the weights are already trained")
    strongest = max(groups, key=lambda group: group["weight_decay"])
    decay, rate = float(strongest["weight_decay"]), float(strongest["peak_lr"])
    if isinstance(optimizer, torch.optim.AdamW) or strongest.get("decoupled_weight_decay"):
        return _decoupled(decay, rate, context.plan.total_steps)
    batch = context.eval_batch("train", 32)
    context.reseed("weight decay")
    loss = context.loss(model, batch)
    if loss.requires_grad:
        backward(loss, model, context.compute)
    decayed = [p for group in groups for p in group["params"] if p.grad is not None]
    if not decayed:
        return skipped("the loss has no gradient")
    gradient = torch.stack([p.grad.norm() for p in decayed if p.grad is not None]).norm()
    weights = torch.stack([p.detach().norm() for p in decayed]).norm()
    pull = decay * float(weights / gradient.clamp(min=1e-12))
    evidence = f"{DECAY} is {decay:.3g}: its gradient is {pull:.2g} times as large as that of the loss"
    if not pull >= WARN_PULL:
        return passed(evidence)
    cause = "weight decay dominates the gradient of the loss, so the weights shrink towards zero"
    remedy = f"set {DECAY}=5e-4; 1e-5 to 1e-3 are usual for weight decay that is added to the gradient"
    return (failed if pull >= FAIL_PULL else warned)(evidence, cause, remedy, DECAY)


def _decoupled(decay: float, rate: float, steps: int) -> Finding:
    """Check decoupled decay, which multiplies weights by 1 - lr * weight_decay (Loshchilov and Hutter 2019)."""
    remaining = max(1 - rate * decay, 0.0) ** steps
    evidence = (
        f"{DECAY} is {decay:.3g}: alone it would reduce each weight to {remaining:.2g} of its value in {steps:,} steps "
        f"at {LR}={rate:.3g}"
    )
    if decay < WARN_DECOUPLED or remaining > MAX_REMAINING:
        return passed(evidence)
    cause = f"weight decay is far above the usual 0.01 to 0.1: it keeps every weight below {1 / decay:.2g}"
    return (failed if decay >= FAIL_DECOUPLED else warned)(evidence, cause, f"set {DECAY}=0.05", DECAY, LR)
