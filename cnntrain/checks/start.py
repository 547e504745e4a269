"""Are the weights a good start? The loss of knowing nothing, answers that differ, signals that pass every layer."""

import math

import torch
from torch import Tensor, nn

from cnntrain.checks.context import CheckContext, failed, join_names, passed, skipped, warned
from cnntrain.checks.short_training import (
    calibrated_copy,
    image_count,
    relative_spread,
    seeded_generator,
    trained_copy,
)
from cnntrain.checks.watch import Weighted, alive_units, signal, signals
from cnntrain.types import Finding

IMAGES = 32
SOUND_SIZE, ABSURD_SIZE = 3.0, 10.0  # deviation of outputs at random: what costs more is WARN, or FAIL
SAME = 1e-5  # difference between answers, beside their size, that is none
WEAK = 1e-3
GROWTH, ABSURD_GROWTH = 30.0, 300.0  # of the signal that arrives, beside the images': above WARN, above FAIL
DECAY, ABSURD_DECAY = 1e-3, 2e-4
DEAD, ABSURDLY_DEAD = 0.75, 0.95  # share of a layer's units
FEW_UNITS = 32  # of which most may be dead by chance, but not all
STEPS = 3  # what starts at zero (head, last norm of a block, what lies before it) has left it by then
SEEN_IN_ALL, SEEN_IN_ONE = (0.25, 0.5), (0.05, 0.1)  # shares of the pixels: below FAIL, below WARN
PROJECTIONS = 2
INFLUENCE = 1e-8  # smallest gradient of a pixel, beside the largest
DIRECTION = 1e-4  # smallest singular value that counts, beside the largest

TRAINED = "the weights come from a checkpoint"
INIT = "model.init"
ALL_ZERO = "all weights start at zero: no unit differs from another"


def initial_loss(context: CheckContext) -> Finding:
    """The first loss is near that of an answer that knows nothing.

    The band: a network at random need not answer nothing, but outputs drawn at random with a standard deviation of 3
    already cost more than any usual initialization does.
    """
    if context.trained:
        return skipped(TRAINED)
    batch = context.eval_batch(count=image_count(context, 2 * IMAGES))
    with torch.no_grad():
        model = calibrated_copy(context, batch.images)
        outputs = context.outputs(model, batch.images)
        loss = _mean(context, outputs, batch.truth)
        uninformed = context.task.uninformed_loss(batch.truth, outputs)
        noise = torch.randn(outputs.shape, generator=seeded_generator(0)).to(outputs.device)
        high, absurd = (_mean(context, size * noise, batch.truth) for size in (SOUND_SIZE, ABSURD_SIZE))
    evidence = f"loss {loss:.4g}; knowing nothing costs {uninformed:.4g}, outputs at random up to {high:.4g}"
    if not math.isfinite(loss):
        cause = f"the loss is {loss} before any step: a division by zero, or weights far too large"
        return failed(evidence, cause, "look at the initialization and the inputs", INIT, "model")
    if high <= uninformed or loss <= high:  # a loss with its sign flipped: `loss sign` says so
        return passed(evidence)
    deviation = float(outputs.std())
    cause = f"the initial weights are {'far ' if loss > absurd else ''}too large: outputs deviate by {deviation:.3g}"
    remedy = "initialize smaller (model.init=he), above all the last layer; look at the inputs' scale"
    return (failed if loss > absurd else warned)(evidence, cause, remedy, INIT, "model")


def _mean(context: CheckContext, outputs: Tensor, truth: dict[str, Tensor]) -> float:
    total, count = context.task.loss(outputs, truth)
    return float(total / count.clamp(min=1e-12))


def answers_differ(context: CheckContext) -> Finding:
    """Other images get other answers; where all start alike (a head of zeros), after a few steps."""
    if context.trained:
        return skipped(TRAINED)
    images = context.eval_batch(count=image_count(context, IMAGES)).images
    if relative_spread(images) < 1e-6:
        return skipped("all images are the same")
    with torch.no_grad():
        share, after = relative_spread(calibrated_copy(context, images)(images)), ""
    if share <= WEAK:
        model = trained_copy(context, images, STEPS)
        with torch.no_grad():
            share, after = max(share, relative_spread(model(images))), f" (after {STEPS} steps)"
    evidence = f"answers differ by {share:.2g} of their size over {len(images)} images{after}"
    if share > WEAK:
        return passed(evidence)
    weights = [module.weight for module in context.model.modules() if isinstance(module, Weighted)]
    if weights and not any(weight.any() for weight in weights):
        cause, remedy = ALL_ZERO, "draw them at random: model.init=he"
    elif share > SAME:
        cause = "hardly anything of the image reaches the output"
        remedy = "see activations; try model.init=he"
    else:
        cause = "the output ignores the image, or the signal dies on its way"
        remedy = "see activations; look for what overwrites or averages away the features"
    return (failed if share <= SAME else warned)(evidence, cause, remedy, "model", INIT)


def activations(context: CheckContext) -> Finding:
    """How much a layer's output differs from image to image neither fades nor explodes with depth."""
    if context.trained:
        return skipped(TRAINED)
    images = context.eval_batch(count=image_count(context, IMAGES)).images
    found = signals(calibrated_copy(context, images), images)
    if found and min(found.values()) == 0:  # behind a branch that starts at nothing
        found = signals(trained_copy(context, images, STEPS), images)
    if not found:
        evidence = "no layer has a weight other than zero"
        return failed(evidence, ALL_ZERO, "draw them at random: model.init=he", INIT)
    names, values = list(found), list(found.values())
    context.curves["signal by depth"] = {
        "standard deviation between images": ([float(i + 1) for i in range(len(values))], values)
    }
    shown, arrives = signal(images), max(values[-2:])  # a last layer may be small on purpose
    evidence = (
        f"signal {shown:.3g} in the images, {values[0]:.3g} in {names[0]}, {values[-1]:.3g} in {names[-1]} "
        f"({min(values):.2g} to {max(values):.2g})"
    )
    if shown == 0:
        return skipped("all images are the same")
    growth = arrives / shown
    broken = [name for name, value in found.items() if not math.isfinite(value)]
    if broken:
        cause = f"the output of {broken[0]} is not finite"
        return failed(evidence, cause, "look at what reaches it", "model", INIT)
    if values[0] == 0:
        cause = f"{names[0]} gives the same for every image: the network ignores them, or sees them all alike"
        return failed(evidence, cause, "look at what forward() gives it", "model")
    if growth > GROWTH:
        cause = f"activations explode, most in {_steepest(names, values, 1)}: weights too large"
        remedy = "initialize smaller (model.init=he), or put norms between"
        return (failed if growth > ABSURD_GROWTH else warned)(evidence, cause, remedy, INIT)
    if growth < DECAY:
        cause = f"activations die with depth, most in {_steepest(names, values, -1)}: weights too small"
        remedy = "initialize larger (model.init=he), or put norms between"
        return (failed if growth < ABSURD_DECAY else warned)(evidence, cause, remedy, INIT)
    return passed(evidence)


def _steepest(names: list[str], values: list[float], sign: int) -> str:
    """The layer whose signal differs most from that of the layer before; `sign` 1 grows, -1 shrinks."""
    logs = [math.log(max(value, 1e-300)) for value in (1.0, *values)]
    candidates = range(max(len(values) - 1, 1) if sign < 0 else len(values))
    return names[max(candidates, key=lambda i: sign * (logs[i + 1] - logs[i]))]


def dead_units(context: CheckContext) -> Finding:
    """Most units of every rectifier give more than zero for some image."""
    if context.trained:
        return skipped(TRAINED)
    images = context.eval_batch(count=image_count(context, 2 * IMAGES)).images
    alive = alive_units(calibrated_copy(context, images), images)
    if not alive:
        return skipped("no rectifier is called")
    shares = {name: 1 - float(units.float().mean()) for name, units in alive.items()}
    worst = max(shares, key=lambda name: shares[name])
    units = torch.cat([part.cpu() for part in alive.values()])
    evidence = (
        f"{int((~units).sum())} of {len(units)} units are zero for all {len(images)} images; "
        f"at worst {100 * shares[worst]:.0f} % of {worst}"
    )
    found = [n for n, share in shares.items() if share >= (DEAD if len(alive[n]) >= FEW_UNITS else 1)]
    if not found:
        return passed(evidence)
    verdict = failed if max(shares[name] for name in found) >= ABSURDLY_DEAD else warned
    cause = f"dead ReLUs in {join_names(found)}: what reaches them is below zero for every image"
    return verdict(evidence, cause, "look at the biases and weights of the layers before them", INIT, "model")


def pixels_seen(context: CheckContext) -> Finding:
    """The answer hangs on most of the image, and on more than a few numbers of it."""
    if context.trained:
        return skipped(TRAINED)
    images = context.eval_batch(count=image_count(context, IMAGES)).images
    look = _look(calibrated_copy(context, images), images)
    if look is None or look[0] < SEEN_IN_ALL[1] or look[1] < SEEN_IN_ONE[1]:
        again = _look(trained_copy(context, images, STEPS), images)
        look = again if look is None or again is None else (*map(max, look[:2], again[:2]), *again[2:])
    remedy = "look for what overwrites, crops or pools away the image"
    if look is None:
        evidence = "the answers have no gradient with respect to any pixel"
        return failed(evidence, "forward() ignores the image, or detaches it", remedy, "model")
    in_all, in_one, directions, possible, uniform = look
    evidence = (
        f"{100 * in_all:.0f} % of the pixels matter, {100 * in_one:.0f} % of a single image's; "
        f"gradients in {directions} directions (at least {possible} expected)"
    )
    if uniform and images[0].numel() > images.shape[1]:
        return failed(evidence, "all pixels count alike: only the mean of the image is seen", remedy, "model")
    if 2 * directions < possible:
        return failed(evidence, f"all of the image is squeezed into {directions} numbers", remedy, "model")
    if in_all < SEEN_IN_ALL[1] or in_one < SEEN_IN_ONE[1]:
        verdict = failed if in_all < SEEN_IN_ALL[0] or in_one < SEEN_IN_ONE[0] else warned
        return verdict(evidence, "most of the image never reaches the answer", remedy, "model")
    return passed(evidence)


def _look(model: nn.Module, images: Tensor) -> tuple[float, float, int, int, bool] | None:
    """Share of the pixels with an influence (over all images, mean over each), directions of the gradients found and
    possible, and whether each gradient is the same at all pixels. None where there is no gradient at all."""
    images = images.detach().clone().requires_grad_()
    outputs = model(images).float()
    if not outputs.requires_grad:
        return None
    draws, fields = seeded_generator(0), []
    for number in range(PROJECTIONS):
        weights = torch.randn(outputs.shape, generator=draws).to(outputs.device)
        keep = number < PROJECTIONS - 1
        (gradient,) = torch.autograd.grad(
            (outputs * weights).sum(), images, retain_graph=keep, allow_unused=True
        )
        if gradient is None:
            return None
        fields.append(gradient.float())
    gradients = torch.stack(fields)  # (R,N,C,H,W)
    largest = gradients.abs().amax(dim=(0, 2, 3, 4), keepdim=True)
    if not largest.any():
        return None
    matters = (gradients.abs() > INFLUENCE * largest).any(dim=2).any(dim=0)  # (N,H,W)
    flat = gradients.flatten(2).flatten(0, 1).cpu().double()
    flat = flat[flat.norm(dim=1) > 0]
    flat = flat / flat.norm(dim=1, keepdim=True)
    strengths = torch.linalg.eigvalsh(flat @ flat.T)
    directions = int((strengths > DIRECTION**2 * strengths[-1]).sum())
    possible = min(outputs[0].numel(), images[0].numel(), len(flat))
    uniform = bool(gradients.std(dim=(3, 4)).amax() <= 1e-5 * gradients.abs().amax())
    return float(matters.any(0).float().mean()), float(matters.float().mean()), directions, possible, uniform
