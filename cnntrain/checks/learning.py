"""Checks that train: step sizes, and whether the model can learn a few examples and something that generalizes."""

import dataclasses
import time

import torch
from torch import nn

from cnntrain.checks.context import (
    OUT_OF_BUDGET,
    CheckContext,
    backward,
    calibrate_norms,
    evenly_spaced,
    failed,
    passed,
    skipped,
    trainable_parameters,
    warned,
)
from cnntrain.checks.overfit_trial import BLANK_STD, OverfitTrial, diagnose
from cnntrain.checks.short_training import (
    ImageInformation,
    ShortTraining,
    evaluate,
    step_seconds,
    train_briefly,
    without_decay,
)
from cnntrain.train.lr_finder import MIN_DECREASE, RangeTest
from cnntrain.types import Finding

UNDECIDED = "undecided within the time budget (check.budget_s)"
LR, DECAY = "optimizer.lr", "optimizer.weight_decay"

# weight decay
WARN_PULL, FAIL_PULL = 1.0, 3.0  # gradient of weight decay, relative to that of the loss
WARN_DECOUPLED, FAIL_DECOUPLED = 0.5, 1.0  # decoupled weight decay
MAX_REMAINING = 0.9  # of the weights, if nothing but weight decay acted; above, its value does not matter

# one example, eight examples
OVERFIT_SHARE = 0.2  # of the remaining time budget
MIN_STEPS = 20  # of a meaningful training
CANDIDATES = 32  # examples from which those to overfit are chosen
NEEDS_TIME = ("learned", "gradients", "logits", "image matters")  # findings of a trial that more steps may change
RATE_TOO_HIGH = ("finite", "steady", "moderate", "rectifiers")  # findings of a trial that a lower rate may change
ALMOST_LEARNED = 0.25  # remaining share of the initial loss: training works, but takes longer
SAFE_ADAM_RATES = (1e-3, 1e-4)

# learning rate
RANGE_SHARE = 0.25  # of the remaining time budget
MIN_BATCH = 8
TOO_HIGH = 2.0  # relative to the rate at which the loss diverges
TOO_LOW = 50.0  # ratio of the rate at which the loss begins to fall to the configured one
MIN_TOTAL_STEPS = 100  # of a training that is expected to learn something
DEFAULT_LR = 1e-3

# generalizes
TRAINING_SHARE = 0.45  # of the remaining time budget
SIGNIFICANT_Z, POSSIBLE_Z, NO_Z = 4.0, 3.0, 2.0  # z-scores of the information about images
GOOD_LOSS = 0.75  # loss, relative to the best prediction that ignores the image, at which training may stop
LITTLE = 0.2  # share of the information about training images; less generalizes not at all
MANY_EPOCHS, MANY_STEPS = 20, 300  # after which the model must have learned something about the training images
SAME_STD = 1e-3  # standard deviation over the images, of normalized pixels
MIN_VAL_IMAGES = 20
MAX_VAL_IMAGES = 2048  # evaluated before a FAIL


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
    gradient = nn.utils.get_total_norm([p.grad for p in decayed])
    weights = nn.utils.get_total_norm([p.detach() for p in decayed])
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
    alone = f"alone, with {LR}={rate:.3g}, it reduces each weight to {remaining:.2g} of its value in {steps:,} steps"
    evidence = f"{DECAY} is {decay:.3g}: {alone}"
    if decay < WARN_DECOUPLED or remaining > MAX_REMAINING:
        return passed(evidence)
    cause = f"weight decay is far above the usual 0.01 to 0.1: it keeps every weight below {1 / decay:.2g}"
    return (failed if decay >= FAIL_DECOUPLED else warned)(evidence, cause, f"set {DECAY}=0.05", DECAY, LR)


def one_example(context: CheckContext) -> Finding:
    """Check that a single example can be overfitted; otherwise nothing can be learned."""
    return _overfit(context, 1)


def eight_examples(context: CheckContext) -> Finding:
    """Check that a few examples can be overfitted together, which requires outputs that differ between images."""
    return _overfit(context, 8)


def _overfit(context: CheckContext, count: int) -> Finding:
    """Overfit examples like `cnntrain overfit`: no augmentation, no weight decay, frozen norms, the configured rate.

    If that rate is too high, repeat with low rates of Adam: frozen norms tolerate lower rates than training does, and
    the rate has a check of its own.
    """
    seconds = OVERFIT_SHARE * context.seconds_left
    if seconds < MIN_STEPS * step_seconds(context) * count / 8:
        return skipped(OUT_OF_BUDGET)
    candidates = context.eval_batch("train", CANDIDATES)
    with torch.no_grad():
        outputs = context.outputs(context.copy_model(), candidates.images)
        target_counts = context.task.losses(outputs, candidates.truth, training=False)[1]
    usable = (candidates.images.float().std(dim=(1, 2, 3)) > BLANK_STD) & (target_counts > 0)
    rows = usable.nonzero().flatten().tolist()
    if len(rows) < max(count, 2):
        return skipped(f"{len(rows)} of {len(candidates)} examples have a target and are not blank")
    first = rows[0]
    other = next((row for row in rows[1:] if not candidates.same_target(first, row)), rows[-1])
    name = context.loaders["train"].examples.names[int(candidates.index[first])]
    trial = OverfitTrial(
        context.task,
        context.compute,
        candidates.take(torch.tensor(rows[:count])),
        candidates.take(torch.tensor([other])),
        context.config["overfit"]["steps"],
        freeze=bool(context.config["model"].get("freeze")),
        stop=context.stop,
        deadline=time.monotonic() + seconds,
    )
    adam_rates = [None, *SAFE_ADAM_RATES]
    while True:
        adam_rate = adam_rates.pop(0)
        model = context.copy_model()
        calibrate_norms(model, candidates.images)
        if adam_rate is None:
            optimizer = without_decay(context.make_optimizer(model))
        else:
            optimizer = torch.optim.Adam(trainable_parameters(model).values(), lr=adam_rate)
        result = trial.run(model, optimizer)
        findings = diagnose(result, name)
        failures = [finding for finding in findings if finding.verdict == "FAIL"]
        if not failures or failures[0].name not in RATE_TOO_HIGH or not adam_rates:
            break
    title = f"{'one example' if count == 1 else f'{count} examples'}: loss over step"
    context.curves[title] = {"loss": (list(range(len(result.losses))), result.losses)}
    if result.out_of_time:
        failures = [finding for finding in failures if finding.name not in NEEDS_TIME]
    if failures:
        remaining, initial = result.losses[-1] - result.floor, result.losses[0] - result.floor
        if failures[0].name == "learned" and remaining < ALMOST_LEARNED * initial:
            return skipped(f"almost learned within overfit.steps; {failures[0].evidence}")
        return failures[0]
    evidence = f"{name}{f' and {count - 1} more' if count > 1 else ''}: {findings[-1].evidence}"
    if adam_rate:
        evidence += f" with Adam at {adam_rate:g}, because the configured rate is too high for frozen norms"
    return skipped(f"{UNDECIDED}; {evidence}") if result.out_of_time else passed(evidence)


def learning_rate(context: CheckContext) -> Finding:
    """Compare the configured learning rate with the result of a range test."""
    rate, test = _configured_rate(context), _range_test(context)
    if test is None or not test.complete:
        return skipped("the time budget (check.budget_s) is too small for a range test, or the loss has no gradient")
    curves = {"mini-batch": (test.rates, test.losses), "smoothed": (test.rates, test.smoothed)}
    context.curves["range test: loss over learning rate"] = curves
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
    steps, needed = context.plan.total_steps, test.rate_sum_to_decrease
    if rate * steps < needed and steps >= MIN_TOTAL_STEPS:
        sums = f"the rates of all {steps:,} steps sum up to {rate * steps:.2g}, the loss begins to fall at {needed:.2g}"
        cause = f"the learning rate is too low: {sums}"
        return failed(evidence, cause, f"try {LR}={suggestion:.1g}", LR, "epochs")
    if test.decreases_from is not None and rate * TOO_LOW <= test.decreases_from:
        cause = f"the learning rate is too low: the loss begins to fall at {test.decreases_from:.2g}"
        return failed(evidence, cause, f"try {LR}={suggestion:.1g}", LR)
    return passed(f"{evidence} (suggested {suggestion:.2g}; steepest at {test.steepest:.2g})")


def _highest_rate(context: CheckContext, diverged: float) -> float:
    """Return the highest acceptable rate; larger batches tolerate higher rates (Goyal et al. 2017)."""
    return TOO_HIGH * diverged * max(_run_batch(context) / context.cache["range batch"], 1)


def _run_batch(context: CheckContext) -> int:
    """Return the number of images per optimizer step of the run."""
    return min(context.plan.batch_size * context.plan.accumulate, len(context.loaders["train"]))


def _configured_rate(context: CheckContext) -> float:
    """Return the peak learning rate of the schedule."""
    return max(group["peak_lr"] for group in context.make_optimizer(context.copy_model()).param_groups)


def _usable_rate(context: CheckContext) -> float:
    """Return the configured learning rate if the range test agrees with it, else the suggested one.

    A bad learning rate has a check of its own and must not affect others.
    """
    rate, test = _configured_rate(context), _range_test(context)
    if test is None or test.suggestion is None:
        return rate or DEFAULT_LR
    return rate if test.suggestion / 30 <= rate <= test.suggestion * 5 else test.suggestion


def _range_test(context: CheckContext) -> RangeTest | None:
    """Return the range test, which runs once per context; None if there is not enough time."""
    if "range test" not in context.cache:
        context.cache["range test"] = _run_range_test(context, context.plan.seed)
    return context.cache["range test"]


def _run_range_test(context: CheckContext, seed: int) -> RangeTest | None:
    """Run the range test of `cnntrain lr-find`, with smaller batches if the time budget requires it."""
    if not context.loss(context.copy_model(), context.eval_batch("train", 2)).requires_grad:
        return None
    seconds, plan = RANGE_SHARE * context.seconds_left, dataclasses.replace(context.plan, seed=seed)
    affordable = int(8 * seconds / (context.config["lr_find"]["steps"] * step_seconds(context)))  # images per step
    size = _run_batch(context)
    if affordable < size:
        size = min(affordable, plan.batch_size)
        if size < min(MIN_BATCH, plan.batch_size):
            return None
        batches = len(context.loaders["train"]) // size
        plan = dataclasses.replace(plan, batch_size=size, accumulate=1, drop_last=True, limit_batches=None)
        plan = dataclasses.replace(plan, batches_per_epoch=batches, steps_per_epoch=batches)
    context.cache["range batch"] = size
    return context.run_range_test(plan, time.monotonic() + 2 * seconds)


def generalizes(context: CheckContext) -> Finding:
    """Check that what a short training learns also holds for validation images."""
    if len(context.loaders.get("val", ())) < MIN_VAL_IMAGES:
        return skipped(f"fewer than {MIN_VAL_IMAGES} validation images")
    if context.trained:
        return _generalizes_trained(context)
    seconds = TRAINING_SHARE * context.seconds_left
    if seconds < MIN_STEPS * step_seconds(context):
        return skipped(OUT_OF_BUDGET)
    training, finding = None, None
    for training in train_briefly(context, _usable_rate(context), seconds):
        finding = _verdict(context, training)
        if finding is not None:
            break
    assert training is not None
    context.cache["short training"] = training
    steps, history = [float(step) for step in training.steps], training.history
    context.curves["short training: loss over step"] = {
        "training images": (steps, [result.loss for result in history["train"]]),
        "validation images": (steps, [result.loss for result in history["val"]]),
        "validation, targets of other images": (steps, [result.loss + result.gain for result in history["val"]]),
        "best prediction that ignores the image": (steps, [training.priors["val"]] * len(steps)),
    }
    is_significant = history["val"][-1].z_score >= SIGNIFICANT_Z
    evidence = _evidence(training)
    return finding or (passed(evidence) if is_significant else skipped(f"{UNDECIDED}; {evidence}"))


def _verdict(context: CheckContext, training: ShortTraining) -> Finding | None:
    """Return the finding if the last evaluation allows one; otherwise training continues."""
    train, val = (training.history[split][-1] for split in ("train", "val"))
    if val.z_score >= SIGNIFICANT_Z and val.loss <= GOOD_LOSS * training.priors["val"]:
        return passed(_evidence(training))
    if float(training.eval_batches["train"].images.float().std(0).max()) < SAME_STD:
        cause = "all training images are the same"
        return failed(_evidence(training), cause, "look at the figure of the images", "data")
    long = training.epochs >= MANY_EPOCHS and training.steps[-1] >= MANY_STEPS
    if long and train.z_score < POSSIBLE_Z and val.z_score < POSSIBLE_Z:
        cause = (
            f"in {training.epochs:.0f} epochs the model learned nothing about its training images: the images do not "
            "show what the targets describe, the targets belong to other images, or the network blocks the signal"
        )
        remedy = "look at the figure of the images with their targets"
        return failed(_evidence(training), cause, remedy, "data", "model")
    memorized = train.loss <= GOOD_LOSS * training.priors["train"] and train.z_score >= SIGNIFICANT_Z
    if memorized and _is_little(train, val):
        batches = {"train": training.eval_batches["train"], "val": context.eval_batch("val", MAX_VAL_IMAGES)}
        larger = evaluate(context, training.model, batches)["val"]
        if _is_little(train, larger):
            return _memorized_only(context, training, train, larger)
    return None


def _is_little(train: ImageInformation, other: ImageInformation) -> bool:
    """Whether the outputs contain significantly less information about other images than about training images."""
    return other.z_score < NO_Z and other.gain + POSSIBLE_Z * other.error < LITTLE * train.gain


def _memorized_only(
    context: CheckContext, training: ShortTraining, train: ImageInformation, val: ImageInformation
) -> Finding:
    """Return the finding for memorized training images, with the cause from other training images."""
    evidence = (
        f"{_evidence(training)}; with targets of other images the loss increases by {train.gain:.3g} on training "
        f"images, and by {val.gain:.2g} ± {val.error:.1g} on validation images"
    )
    unseen = torch.ones(len(context.loaders["train"]), dtype=torch.bool)
    unseen[training.rows] = False
    rows = unseen.nonzero().flatten()
    if len(rows) >= MIN_VAL_IMAGES:
        rows = rows[evenly_spaced(len(rows), len(training.eval_batches["val"]))]
        batches = {"train": training.eval_batches["train"], "unseen": context.train_examples(rows)}
        other = evaluate(context, training.model, batches)["unseen"]
        if other.gain - POSSIBLE_Z * other.error > LITTLE * train.gain:
            cause = (
                "the model generalizes to other training images, but not to validation images: their targets belong "
                "to other images, or the images are of another kind or prepared differently"
            )
            return failed(evidence, cause, "look at validation images with their targets", "data")
    cause = (
        "the model memorizes the training images, and (almost) nothing generalizes: the targets belong to other images "
        "(shuffled, shifted by a row, sorted differently), or the images do not show what the targets describe"
    )
    return failed(evidence, cause, "look at the figure of the images with their targets", "data")


def _generalizes_trained(context: CheckContext) -> Finding:
    batches = {split: context.eval_batch(split) for split in ("train", "val")}
    results = evaluate(context, context.copy_model(), batches)
    train, val = results["train"], results["val"]
    evidence = (
        f"loss {train.loss:.3g} on training images ({train.loss + train.gain:.3g} with targets of other images); "
        f"{val.loss:.3g} on validation images ({val.loss + val.gain:.3g})"
    )
    if val.z_score >= SIGNIFICANT_Z:
        return passed(evidence)
    if train.z_score >= SIGNIFICANT_Z and _is_little(train, val):
        cause = "what the model learned does not generalize to validation images"
        return failed(evidence, cause, "look at validation images with their targets", "data")
    return skipped(f"undecided: too few validation images; {evidence}")


def _evidence(training: ShortTraining) -> str:
    train, val = (training.history[split][-1] for split in ("train", "val"))
    return (
        f"after {training.steps[-1]} steps on {len(training.rows)} images: loss {train.loss:.3g} on them, "
        f"{val.loss:.3g} on validation images ({training.priors['val']:.3g} for the best prediction that ignores the "
        f"image, {val.loss + val.gain:.3g} with targets of other images)"
    )
