"""Are the optimizer's steps of a sensible size: the learning rate, and the weight decay beside it?"""

import dataclasses
import time

import torch

from cnntrain.checks.context import CheckContext, failed, passed, skipped, warned
from cnntrain.checks.overfit_trial import backward
from cnntrain.checks.short_training import step_seconds
from cnntrain.train.lr_finder import LEAST_FALL, RangeTest
from cnntrain.types import Finding

RANGE_SHARE = 0.25  # of the seconds left
SMALLEST_BATCH = 8
TOO_HIGH = 2.0  # times the rate of divergence
TOO_LOW = 50.0  # times below that at which the loss begins to fall
SHORTEST = 100  # steps of a training that is meant to come to something
STRONG_PULL, ABSURD_PULL = 1.0, 3.0  # of weight decay, beside the loss's gradient
STRONG_DECAY, ABSURD_DECAY = 0.5, 1.0  # decoupled
NOTICED = 0.9  # of their size, to which decay alone may shrink weights before its strength matters
NO_GRADIENT = "the loss has no gradient"
LR, DECAY = "optimizer.lr", "optimizer.weight_decay"


def learning_rate(context: CheckContext) -> Finding:
    """The configured rate against what a range test finds."""
    if context.trained:
        return skipped("the weights are trained already")
    rate = configured_rate(context)
    test = range_of(context)
    if test is None or not test.complete:
        return skipped(
            "the budget (check.budget_s) does not suffice for a range test, or the loss has no gradient"
        )
    context.curves["range test: loss over learning rate"] = {
        "mini-batch": (test.rates, test.losses),
        "smoothed": (test.rates, test.smoothed),
    }
    diverged, suggestion = test.diverged_at, test.suggestion
    evidence = (
        f"{LR} is {rate:.3g}; from {test.start:.3g} the loss falls by {max(test.fall, 0):.0%} and diverges at "
        f"{f'{diverged:.2g}' if diverged else f'no rate up to {test.rates[-1]:.2g}'}"
    )
    if (size := context.cache["range batch"]) < _batch_of_run(context):
        evidence += f" (with batches of {size}, as the budget is short: see `cnntrain lr-find`)"
    if diverged and rate >= _limit(context, diverged):
        again = _measure(context, context.plan.seed + 1)  # one noisy curve is not enough to say the worst
        if again and again.diverged_at and rate >= _limit(context, again.diverged_at):
            cause = (
                f"the learning rate is too high: {rate / diverged:.3g} times that at which the loss diverges"
            )
            return failed(evidence, cause, f"try {LR}={diverged / 10:.1g}, or a longer warm-up", LR)
    if suggestion is None or test.first_way is None:
        return skipped(f"{evidence}: less than {LEAST_FALL:.0%} at any rate, which tells nothing")
    way = rate * context.plan.total_steps
    if way < test.first_way and context.plan.total_steps >= SHORTEST:
        cause = (
            f"the learning rate is too low: all {context.plan.total_steps:,} steps together go {way:.2g} far "
            f"(steps times rate), and the loss begins to fall after {test.first_way:.2g}"
        )
        return failed(evidence, cause, f"try {LR}={suggestion:.1g}", LR, "epochs")
    if test.begins_at is not None and rate * TOO_LOW <= test.begins_at:
        cause = (
            f"the learning rate is too low: the loss begins to fall at {test.begins_at:.2g}, "
            f"{test.begins_at / rate:.3g} times as high"
        )
        return failed(evidence, cause, f"try {LR}={suggestion:.1g}", LR)
    return passed(f"{evidence} (a tenth: {suggestion:.2g}; falls most steeply at {test.steepest:.2g})")


def _limit(context: CheckContext, diverged: float) -> float:
    """The highest rate that may pass; a smaller batch than the run's bears less (Goyal et al. 2017)."""
    return TOO_HIGH * diverged * max(_batch_of_run(context) / context.cache["range batch"], 1)


def _batch_of_run(context: CheckContext) -> int:
    """Images of one optimizer step."""
    return min(context.plan.batch_size * context.plan.accumulate, len(context.loaders["train"]))


def configured_rate(context: CheckContext) -> float:
    """The peak of the schedule."""
    return max(group["peak_lr"] for group in context.make_optimizer(context.copy_model()).param_groups)


def usable_rate(context: CheckContext) -> float:
    """The configured rate where a range test finds it good, else the suggested one: each fault has its own check."""
    rate, test = configured_rate(context), range_of(context)
    if test is None or test.suggestion is None:
        return rate or 1e-3
    fits = test.suggestion / 30 <= rate <= test.suggestion * 5
    return rate if fits else test.suggestion


def range_of(context: CheckContext) -> RangeTest | None:
    """The range test of this context, done once; None where there is no time for it."""
    if "range test" not in context.cache:
        context.cache["range test"] = _measure(context, context.plan.seed)
    return context.cache["range test"]


def _measure(context: CheckContext, seed: int) -> RangeTest | None:
    """The range test of `cnntrain lr-find`; with a smaller batch where the time does not suffice for the run's."""
    if not context.loss(context.copy_model(), context.eval_batch("train", 2)).requires_grad:
        return None
    seconds, count = RANGE_SHARE * context.seconds_left, len(context.loaders["train"])
    steps = context.config["lr_find"]["steps"]
    affordable = int(8 * seconds / (steps * step_seconds(context)))  # images a step
    plan = dataclasses.replace(context.plan, seed=seed)
    size = min(_batch_of_run(context), affordable)
    if size < _batch_of_run(context):
        size = min(size, plan.batch_size)
        if size < min(SMALLEST_BATCH, plan.batch_size):
            return None
        plan = dataclasses.replace(
            plan,
            batch_size=size,
            accumulate=1,
            drop_last=True,
            limit_batches=None,
            batches_per_epoch=count // size,
            steps_per_epoch=count // size,
        )
    context.cache["range batch"] = size
    return context.run_range_test(plan, time.monotonic() + 2 * seconds)


def weight_decay(context: CheckContext) -> Finding:
    """The pull of the decay towards zero against that of the loss, or how fast it shrinks the weights by itself."""
    model = context.copy_model().train()
    optimizer = context.make_optimizer(model)
    groups = [group for group in optimizer.param_groups if group.get("weight_decay")]
    if not groups:
        return passed("no weight decay")
    if context.trained:
        return skipped("the weights are trained already")
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
        return skipped(NO_GRADIENT)
    gradient = torch.stack([p.grad.norm() for p in decayed if p.grad is not None]).norm()
    pull = decay * float(torch.stack([p.detach().norm() for p in decayed]).norm() / gradient.clamp(min=1e-12))
    evidence = (
        f"{DECAY} is {decay:.3g}: it pulls at the weights {pull:.2g} times as strongly as the loss does"
    )
    if not pull >= STRONG_PULL:
        return passed(evidence)
    cause = "weight decay is stronger than what there is to learn: the weights go to zero"
    remedy = f"1e-5 to 1e-3 are usual for a decay that is added to the gradient; set {DECAY}=5e-4"
    return (failed if pull >= ABSURD_PULL else warned)(evidence, cause, remedy, DECAY)


def _decoupled(decay: float, rate: float, steps: int) -> Finding:
    """Decay that shrinks weights by itself, lr * weight_decay a step (Loshchilov and Hutter 2019)."""
    left = max(1 - rate * decay, 0.0) ** steps
    evidence = (
        f"{DECAY} is {decay:.3g}: by itself it leaves {left:.2g} of each weight after {steps:,} steps at "
        f"{LR}={rate:.3g}"
    )
    if decay < STRONG_DECAY or left > NOTICED:
        return passed(evidence)
    cause = f"the weight decay is far above what is usual (0.01 to 0.1): it holds every weight below {1 / decay:.2g}"
    return (failed if decay >= ABSURD_DECAY else warned)(evidence, cause, f"set {DECAY}=0.05", DECAY, LR)
