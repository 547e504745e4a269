"""Checks that train: can the model learn one example, a few examples, and something that generalizes?"""

import time

import torch

from cnntrain.checks.context import CheckContext, failed, passed, skipped
from cnntrain.checks.overfit_trial import BLANK_STD, OverfitResult, OverfitTrial, calibrate_norms, diagnose
from cnntrain.checks.short_training import (
    ImageInformation,
    ShortTraining,
    evaluate,
    step_seconds,
    train_briefly,
    trainable_parameters,
    without_decay,
)
from cnntrain.checks.steps import usable_rate
from cnntrain.types import Finding

OUT_OF_BUDGET = "the time budget (check.budget_s) is used up"
UNDECIDED = "undecided within the time budget (check.budget_s)"
TRAINED = "the weights are already trained"
OVERFIT_SHARE, TRAINING_SHARE = 0.2, 0.45  # of the remaining time budget
MIN_STEPS = 20  # of a meaningful training
CANDIDATES = 32  # examples from which those to overfit are chosen
NEEDS_TIME = (
    "learned",
    "gradients",
    "logits",
    "image matters",
)  # findings of a trial that more steps may change
ALMOST_LEARNED = 0.25  # remaining share of the initial loss: training works, but takes longer
SAFE_ADAM_RATES = (1e-3, 1e-4)
RATE_TOO_HIGH = (
    "finite",
    "steady",
    "moderate",
    "rectifiers",
)  # findings of a trial that a lower rate may change
SIGNIFICANT_Z, POSSIBLE_Z, NO_Z = 4.0, 3.0, 2.0  # z-scores of the information about images
GOOD_LOSS = 0.75  # loss, relative to the best prediction that ignores the image, at which training may stop
LITTLE = 0.2  # share of the information about training images; less generalizes not at all
MANY_EPOCHS, MANY_STEPS = (
    20,
    300,
)  # after which the model must have learned something about the training images
SAME_STD = 1e-3  # standard deviation over the images, of normalized pixels
MIN_VAL_IMAGES = 20
MAX_VAL_IMAGES = 2048  # evaluated before a FAIL


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
    if context.trained:
        return skipped(TRAINED)
    seconds = OVERFIT_SHARE * context.seconds_left
    if seconds < MIN_STEPS * step_seconds(context) * count / 8:
        return skipped(OUT_OF_BUDGET)
    candidates = context.eval_batch("train", CANDIDATES)
    with torch.no_grad():
        outputs = context.outputs(context.copy_model(), candidates.images)
        target_counts = context.task.losses(outputs, candidates.targets, training=False)[1]
    usable = (candidates.images.float().std(dim=(1, 2, 3)) > BLANK_STD) & (target_counts > 0)
    rows = usable.nonzero().flatten().tolist()
    if len(rows) < max(count, 2):
        return skipped(f"{len(rows)} of {len(candidates)} examples have a target and are not blank")
    first = rows[0]
    other = next((row for row in rows[1:] if not candidates.same_target(first, row)), rows[-1])
    name = context.loaders["train"].examples.names[int(candidates.index[first])]
    intended_frozen = (
        [name for name, p in context.model.named_parameters() if not p.requires_grad]
        if context.config["model"].get("freeze")
        else ()
    )
    trial = OverfitTrial(
        context.task,
        context.compute,
        candidates.take(torch.tensor(rows[:count])),
        candidates.take(torch.tensor([other])),
        context.config["overfit"]["steps"],
        intended_frozen,
        context.stop,
        time.monotonic() + seconds,
    )

    def run(adam_rate: float | None) -> OverfitResult:
        """Run the trial with the configured optimizer, or with Adam."""
        model = context.copy_model()
        calibrate_norms(model, candidates.images)
        if adam_rate is None:
            return trial.run(model, without_decay(context.make_optimizer(model)))
        return trial.run(model, torch.optim.Adam(trainable_parameters(model).values(), lr=adam_rate))

    result, rate = run(None), None
    for safe_rate in SAFE_ADAM_RATES:
        if next((f.name for f in diagnose(result, name) if f.verdict == "FAIL"), "") not in RATE_TOO_HIGH:
            break
        result, rate = run(safe_rate), safe_rate
    findings = diagnose(result, name)
    title = f"{'one example' if count == 1 else f'{count} examples'}: loss over step"
    context.curves[title] = {"loss": (list(range(len(result.losses))), result.losses)}
    ignored = NEEDS_TIME if result.out_of_time else ()
    failures = [finding for finding in findings if finding.verdict == "FAIL" and finding.name not in ignored]
    if failures:
        remaining, initial = result.losses[-1] - result.floor, result.losses[0] - result.floor
        if failures[0].name == "learned" and remaining < ALMOST_LEARNED * initial:
            return skipped(f"almost learned within overfit.steps; {failures[0].evidence}")
        return failed(failures[0].evidence, failures[0].cause, failures[0].remedy, *failures[0].keys)
    evidence = f"{name}{f' and {count - 1} more' if count > 1 else ''}: {findings[-1].evidence}"
    if rate:
        evidence += f" with Adam at {rate:g}, because the configured rate is too high for frozen norms"
    return skipped(f"{UNDECIDED}; {evidence}") if result.out_of_time else passed(evidence)


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
    for training in train_briefly(context, usable_rate(context), seconds):
        finding = _verdict(context, training)
        if finding is not None:
            break
    assert training is not None
    context.cache["short training"] = training
    _add_curves(context, training)
    if finding is not None:
        return finding
    evidence = _evidence(training)
    if training.history["val"][-1].z_score >= SIGNIFICANT_Z:
        return passed(evidence)
    return skipped(f"{UNDECIDED}; {evidence}")


def _verdict(context: CheckContext, training: ShortTraining) -> Finding | None:
    """Return the finding if the last evaluation allows one; otherwise training continues."""
    train, val = (training.history[split][-1] for split in ("train", "val"))
    if val.z_score >= SIGNIFICANT_Z and val.loss <= GOOD_LOSS * training.priors["val"]:
        return passed(_evidence(training))
    images = training.eval_batches["train"].images
    if float(images.float().std(0).max()) < SAME_STD:
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
        larger = _evaluate_more(context, training)
        if _is_little(train, larger):
            return _memorized_only(context, training, train, larger)
    return None


def _is_little(train: ImageInformation, other: ImageInformation) -> bool:
    """Whether the outputs contain significantly less information about other images than about training images."""
    return other.z_score < NO_Z and other.gain + POSSIBLE_Z * other.error < LITTLE * train.gain


def _evaluate_more(context: CheckContext, training: ShortTraining) -> ImageInformation:
    """Evaluate on up to 2048 validation images."""
    val = training.eval_batches["val"]
    if len(context.loaders["val"]) > len(val):
        val = context.eval_batch("val", MAX_VAL_IMAGES)
    return evaluate(context, training.model, {"train": training.eval_batches["train"], "val": val})["val"]


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
        count = min(len(rows), len(training.eval_batches["val"]))
        rows = rows[torch.linspace(0, len(rows) - 1, count).round().long()]
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


def _add_curves(context: CheckContext, training: ShortTraining) -> None:
    steps, history = [float(step) for step in training.steps], training.history
    context.curves["short training: loss over step"] = {
        "training images": (steps, [result.loss for result in history["train"]]),
        "validation images": (steps, [result.loss for result in history["val"]]),
        "validation, targets of other images": (
            steps,
            [result.loss + result.gain for result in history["val"]],
        ),
        "best prediction that ignores the image": (steps, [training.priors["val"]] * len(steps)),
    }
