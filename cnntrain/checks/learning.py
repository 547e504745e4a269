"""Does it learn: one example, a few, and something that holds for images that it has not seen?"""

import time

import torch

from cnntrain.checks.context import CheckContext
from cnntrain.checks.overfit import BLANK, Trial, calibrate_norms, judge, learn_by_heart
from cnntrain.checks.practice import trainable
from cnntrain.checks.short_training import (
    ImageInformation,
    ShortTraining,
    batch_of,
    look,
    step_seconds,
    train_briefly,
    without_decay,
)
from cnntrain.checks.steps import usable_rate
from cnntrain.checks.verdicts import failed, passed, skipped
from cnntrain.types import Finding

BUDGET = "the budget (check.budget_s) is used up"
TRAINED = "the weights are trained already"
BY_HEART_SHARE, SHORT_SHARE = 0.2, 0.45  # of the seconds left
FEWEST_STEPS = 20  # below which a training tells nothing
CANDIDATES = 32  # examples among which those to be learned by heart are sought
NEEDS_TIME = (
    "learned",
    "gradients",
    "logits",
    "image matters",
)  # findings of overfit that more steps may turn
NEARLY = 0.25  # of the loss at the start that may be left: nothing is broken, it only takes longer
CAREFUL_RATES = (1e-3, 1e-4)  # of Adam
TOO_FAST = ("finite", "steady", "moderate", "rectifiers")  # findings of overfit that a lower rate may turn
SURE = 4.0  # standard errors by which answers must fit their own images better than others
DOUBT = 3.0
GAINED = 0.75  # of the loss of the answer that ignores the image: learned well enough to stop
LITTLE = 0.2  # share of what is known of training images that carries over to others: less is nothing,
UNSURE = 2.0  # where it is within so many standard errors of nothing, too
MANY_PASSES, MANY_STEPS = 20, 300  # after which something must be known of the images trained on
ALIKE = 1e-3  # deviation from image to image of normalized pixels
FEWEST_JUDGED = 20  # validation images
MORE_JUDGED = 2048  # looked at before the worst is said


def one_example(bench: CheckContext) -> Finding:
    """One single example is learned by heart; if not, nothing will be learned."""
    return _by_heart(bench, 1)


def eight_examples(bench: CheckContext) -> Finding:
    """A few examples are learned at once: answers can differ from image to image."""
    return _by_heart(bench, 8)


def _by_heart(bench: CheckContext, count: int) -> Finding:
    """As `cnntrain overfit`: plain images, no weight decay, norms frozen, the configured learning rate.

    Or, where that is too high, careful steps of Adam: frozen norms bear less than those of a training, and whether a
    training bears the rate is asked by itself.
    """
    if bench.trained:
        return skipped(TRAINED)
    seconds = BY_HEART_SHARE * bench.seconds_left
    if seconds < FEWEST_STEPS * step_seconds(bench) * count / 8:
        return skipped(BUDGET)
    candidates = bench.plain("train", CANDIDATES)
    with torch.no_grad():
        counts = bench.task.losses(
            bench.outputs(bench.model(), candidates.images), candidates.targets, plain=True
        )[1]
    shows = (candidates.images.float().std(dim=(1, 2, 3)) > BLANK) & (counts > 0)
    rows = shows.nonzero().flatten().tolist()
    if len(rows) < max(count, 2):
        return skipped(f"{len(rows)} of {len(candidates)} examples have a target and are not blank")
    first = rows[0]
    other = next((row for row in rows[1:] if not candidates.same_target(first, row)), rows[-1])
    frozen = [name for name, p in bench.network.named_parameters() if not p.requires_grad]
    name = bench.loaders["train"].examples.names[int(candidates.index[first])]
    own, other_one = candidates.take(torch.tensor(rows[:count])), candidates.take(torch.tensor([other]))
    ends_at = time.monotonic() + seconds

    def attempt(rate: float | None) -> Trial:
        """With the configured optimizer, or with Adam at this rate."""
        model = bench.model()
        calibrate_norms(model, candidates.images)
        optimizer = (
            without_decay(bench.make_optimizer(model))
            if rate is None
            else torch.optim.Adam(trainable(model).values(), lr=rate)
        )
        return learn_by_heart(
            model, bench.task, optimizer, own, other_one, bench.compute, bench.config["overfit"]["steps"],
            frozen if bench.config["model"].get("freeze") else (), bench.stop, ends_at,
        )  # fmt: skip

    trial, rate = attempt(None), None
    for careful in CAREFUL_RATES:
        if next((f.name for f in judge(trial, name) if f.verdict == "FAIL"), "") not in TOO_FAST:
            break
        trial, rate = attempt(careful), careful
    findings = judge(trial, name)
    wrong = [finding for finding in findings if finding.verdict == "FAIL"]
    bench.curves[f"{'one example' if count == 1 else f'{count} examples'}: loss over step"] = {
        "loss": (list(range(len(trial.losses))), trial.losses)
    }
    if trial.late:
        wrong = [finding for finding in wrong if finding.name not in NEEDS_TIME]
    if (
        wrong
        and wrong[0].name == "learned"
        and trial.losses[-1] - trial.floor < NEARLY * (trial.losses[0] - trial.floor)
    ):
        return skipped(f"nearly learned within overfit.steps; {wrong[0].evidence}")
    if wrong:
        return failed(wrong[0].evidence, wrong[0].cause, wrong[0].remedy, *wrong[0].keys)
    evidence = f"{name}{f' and {count - 1} more' if count > 1 else ''}: {findings[-1].evidence}"
    evidence += f" by Adam at {rate:g}, as frozen norms do not bear the configured rate" if rate else ""
    return (
        skipped(f"not told within the budget (check.budget_s); {evidence}")
        if trial.late
        else passed(evidence)
    )


def generalizes(bench: CheckContext) -> Finding:
    """What a short training learns holds for validation images too, better than without looking at the image."""
    if len(bench.loaders.get("val", ())) < FEWEST_JUDGED:
        return skipped(f"fewer than {FEWEST_JUDGED} validation images")
    if bench.trained:
        shown = {split: bench.plain(split) for split in ("train", "val")}
        return _trained(bench, look(bench, bench.model(), shown))
    seconds = SHORT_SHARE * bench.seconds_left
    if seconds < FEWEST_STEPS * step_seconds(bench):
        return skipped(BUDGET)
    training, finding = None, None
    for training in train_briefly(bench, usable_rate(bench), seconds):
        finding = _told(bench, training)
        if finding is not None:
            break
    assert training is not None
    bench.found["short training"] = training
    _draw(bench, training)
    return finding or _at_the_end(training)


def _told(bench: CheckContext, training: ShortTraining) -> Finding | None:
    """The verdict, as soon as there is one."""
    train, val = (training.looks[split][-1] for split in ("train", "val"))
    if val.surely >= SURE and val.loss <= GAINED * training.priors["val"]:
        return passed(_evidence(training))
    images = training.judged["train"].images
    if float(images.float().std(0).max()) < ALIKE:
        return failed(_evidence(training), "all images are the same", "look at the drawn images", "data")
    long = training.passes >= MANY_PASSES and training.steps[-1] >= MANY_STEPS
    if long and train.surely < DOUBT and val.surely < DOUBT:
        cause = (
            f"in {training.passes:.0f} passes nothing was learned about the very images that were trained on: they "
            "show nothing of what is asked, the targets are of other images, or the network does not let it through"
        )
        return failed(
            _evidence(training), cause, "look at the drawn images with their targets", "data", "model"
        )
    by_heart = train.loss <= GAINED * training.priors["train"] and train.surely >= SURE
    if by_heart and _little(train, val) and _little(train, more := _look_at_more(bench, training)):
        return _does_not_carry_over(bench, training, train, more)
    return None


def _little(train: ImageInformation, other: ImageInformation) -> bool:
    """Whether surely less than a share of what is known of training images is known of the others."""
    return other.surely < UNSURE and other.carried + DOUBT * other.error < LITTLE * train.carried


def _look_at_more(bench: CheckContext, training: ShortTraining) -> ImageInformation:
    """As many validation images as there are, up to 2048."""
    val = training.judged["val"]
    if len(bench.loaders["val"]) > len(val):
        val = bench.plain("val", MORE_JUDGED)
    return look(bench, training.model, {"train": training.judged["train"], "val": val})["val"]


def _does_not_carry_over(
    bench: CheckContext, training: ShortTraining, train: ImageInformation, val: ImageInformation
) -> Finding:
    """Learned by heart and no more: of other training images too, or of validation's alone?"""
    evidence = (
        f"{_evidence(training)}; with those the loss grows by {train.carried:.3g} on training images, by "
        f"{val.carried:.2g} ± {val.error:.1g} on validation's"
    )
    unseen = torch.ones(len(bench.loaders["train"]), dtype=torch.bool)
    unseen[training.rows] = False
    rows = unseen.nonzero().flatten()
    if len(rows) >= FEWEST_JUDGED:
        rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), len(training.judged["val"]))).long()]
        shown = {"train": training.judged["train"], "unseen": batch_of(bench, rows)}
        of_train = look(bench, training.model, shown)["unseen"]
        if of_train.carried - DOUBT * of_train.error > LITTLE * train.carried:
            cause = (
                "what is learned holds for other training images, but not for validation's: their targets are "
                "of other images, or the images are of another kind or prepared in another way"
            )
            return failed(evidence, cause, "look at validation images with their targets", "data")
    cause = (
        "what is learned by heart says (almost) nothing about other images: targets are not those of their images "
        "(shuffled, shifted by a row, sorted in another way), or the images do not show what is asked"
    )
    return failed(evidence, cause, "look at the drawn images with their targets", "data")


def _at_the_end(training: ShortTraining) -> Finding:
    """What can be said when time is over."""
    evidence = _evidence(training)
    if training.looks["val"][-1].surely >= SURE:
        return passed(evidence)
    return skipped(f"not told within the budget (check.budget_s); {evidence}")


def _trained(bench: CheckContext, known: dict[str, ImageInformation]) -> Finding:
    train, val = known["train"], known["val"]
    evidence = (
        f"loss {train.loss:.3g} on training images, {train.loss + train.carried:.3g} with targets of other images; "
        f"{val.loss:.3g} and {val.loss + val.carried:.3g} on validation's"
    )
    if val.surely >= SURE:
        return passed(evidence)
    if train.surely >= SURE and _little(train, val):
        cause = "what was learned does not hold for validation images"
        return failed(evidence, cause, "look at validation images with their targets", "data")
    return skipped(f"too few validation images to tell; {evidence}")


def _evidence(training: ShortTraining) -> str:
    train, val = (training.looks[split][-1] for split in ("train", "val"))
    return (
        f"after {training.steps[-1]} steps on {len(training.rows)} images: loss {train.loss:.3g} on them, "
        f"{val.loss:.3g} on validation images ({training.priors['val']:.3g} without looking at the image, "
        f"{val.loss + val.carried:.3g} with targets of other images)"
    )


def _draw(bench: CheckContext, training: ShortTraining) -> None:
    steps, looks = [float(step) for step in training.steps], training.looks
    bench.curves["short training: loss over step"] = {
        "training images": (steps, [known.loss for known in looks["train"]]),
        "validation images": (steps, [known.loss for known in looks["val"]]),
        "the same, targets of other images": (steps, [known.loss + known.carried for known in looks["val"]]),
        "without looking at the image": (steps, [training.priors["val"]] * len(steps)),
    }
