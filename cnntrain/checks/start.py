"""Checks of the initial weights: initial loss, outputs that differ between images, signals through all layers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnntrain.checks.context import CheckContext, failed, join_names, passed, skipped, warned
from cnntrain.checks.watch import Weighted, alive_units, signal, signals
from cnntrain.types import Finding

IMAGES = 32
WARN_STD, FAIL_STD = 3.0, 10.0  # of random outputs whose loss the initial loss is compared with
FAIL_SPREAD, WARN_SPREAD = 1e-5, 1e-3  # of the outputs over images, relative to their size
WARN_GROWTH, FAIL_GROWTH = 30.0, 300.0  # of the signal at the output, relative to the images
WARN_DECAY, FAIL_DECAY = 1e-3, 2e-4
WARN_DEAD, FAIL_DEAD = 0.75, 0.95  # share of dead units of a layer
FEW_UNITS = 32  # layers with fewer units count only if all are dead
STEPS = 3  # after which layers that start at zero (a head, the last norm of a block) no longer block the signal
FAIL_SEEN, WARN_SEEN = (0.25, 0.05), (0.5, 0.1)  # shares of influential pixels: over all images, per image
PROJECTIONS = 2
MIN_INFLUENCE = 1e-8  # gradient of a pixel, relative to the largest
MIN_SINGULAR_VALUE = 1e-4  # relative to the largest

INIT = "model.init"
ALL_ZERO = "all weights are zero, so all units are equal"
INITIALIZE = "initialize the weights at random: model.init=he"


def initial_loss(context: CheckContext) -> Finding:
    """Check that the initial loss is near the loss of a prediction that ignores the image.

    The tolerance is the loss of random outputs with a standard deviation of 3, which is more than any usual
    initialization gives.
    """
    batch = context.eval_batch(count=context.image_count(2 * IMAGES))
    with torch.no_grad():
        outputs = context.outputs(context.calibrated_copy(batch.images), batch.images)
        loss = float(context.mean_loss(outputs, batch.truth))
        uninformed = context.task.uninformed_loss(batch.truth, outputs)
        noise = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs.device)
        high, absurd = (float(context.mean_loss(std * noise, batch.truth)) for std in (WARN_STD, FAIL_STD))
    evidence = f"initial loss {loss:.4g}; ignoring the image costs {uninformed:.4g}, random outputs cost {high:.4g}"
    if not math.isfinite(loss):
        cause = f"the loss is {loss} before the first step: a division by zero, or weights that are far too large"
        return failed(evidence, cause, "check the initialization and the inputs", INIT, "model")
    if high <= uninformed or loss <= high:  # high <= uninformed if the sign of the loss is wrong; see loss sign
        return passed(evidence)
    size = "far too large" if loss > absurd else "too large"
    cause = f"the initial weights are {size}: the outputs have a standard deviation of {float(outputs.std()):.3g}"
    remedy = "initialize with smaller weights (model.init=he), above all in the last layer; check the input scale"
    return (failed if loss > absurd else warned)(evidence, cause, remedy, INIT, "model")


def answers_differ(context: CheckContext) -> Finding:
    """Check that outputs differ between images; if they do not initially (a zero head), after a few steps."""
    images = context.eval_batch(count=context.image_count(IMAGES)).images
    if _relative_spread(images) < 1e-6:
        return skipped("all images are the same")
    spread, after = _relative_spread(context.calibrated_copy(images)(images)), ""
    if spread <= WARN_SPREAD:
        later = _relative_spread(context.calibrated_copy(images, STEPS)(images))
        spread, after = max(spread, later), f" (after {STEPS} steps)"
    evidence = f"relative standard deviation of the outputs over {len(images)} images: {spread:.2g}{after}"
    if spread > WARN_SPREAD:
        return passed(evidence)
    weights = [module.weight for module in context.model.modules() if isinstance(module, Weighted)]
    if weights and not any(weight.any() for weight in weights):
        cause, remedy = ALL_ZERO, INITIALIZE
    elif spread > FAIL_SPREAD:
        cause = "hardly any information about the image reaches the output"
        remedy = "see activations; try model.init=he"
    else:
        cause = "the output does not depend on the image, or the signal vanishes in between"
        remedy = "see activations; look for an operation that overwrites the features or averages them away"
    return (failed if spread <= FAIL_SPREAD else warned)(evidence, cause, remedy, "model", INIT)


def _relative_spread(outputs: Tensor) -> float:
    """Return the standard deviation over the examples of outputs (N, ...), relative to their root mean square."""
    flat = outputs.detach().float().flatten(1)
    size = float(flat.square().mean().sqrt())
    return float(flat.std(dim=0, correction=0).square().mean().sqrt()) / size if size > 0 else 0.0


def activations(context: CheckContext) -> Finding:
    """Check that the variation of layer outputs between images neither vanishes nor explodes with depth."""
    images = context.eval_batch(count=context.image_count(IMAGES)).images
    layers = signals(context.calibrated_copy(images), images)
    if layers and min(layers.values()) == 0:  # layers before or after a layer that starts at zero
        layers = signals(context.calibrated_copy(images, STEPS), images)
    if not layers:
        return failed("no layer has a weight other than zero", ALL_ZERO, INITIALIZE, INIT)
    names, values = list(layers), list(layers.values())
    depths = [float(i + 1) for i in range(len(values))]
    context.curves["signal by depth"] = {"standard deviation between images": (depths, values)}
    input_signal, output_signal = signal(images), max(values[-2:])  # the last layer may be small on purpose
    evidence = (
        f"standard deviation between images: {input_signal:.3g} for the images, {values[0]:.3g} after {names[0]}, "
        f"{values[-1]:.3g} after {names[-1]} (range {min(values):.2g} to {max(values):.2g})"
    )
    if input_signal == 0:
        return skipped("all images are the same")
    growth = output_signal / input_signal
    if not_finite := [name for name, value in layers.items() if not math.isfinite(value)]:
        cause = f"the output of {not_finite[0]} is not finite"
        return failed(evidence, cause, "check the input of this layer", "model", INIT)
    if values[0] == 0:
        cause = f"{names[0]} has the same output for every image: its input does not depend on the image"
        return failed(evidence, cause, "check what forward() passes to it", "model")
    if growth > WARN_GROWTH:
        cause = f"the activations explode, most in {_steepest(names, values, 1)}: the weights are too large"
        remedy = "initialize with smaller weights (model.init=he), or add norms"
        return (failed if growth > FAIL_GROWTH else warned)(evidence, cause, remedy, INIT)
    if growth < WARN_DECAY:
        cause = f"the activations vanish, most in {_steepest(names, values, -1)}: the weights are too small"
        remedy = "initialize with larger weights (model.init=he), or add norms"
        return (failed if growth < FAIL_DECAY else warned)(evidence, cause, remedy, INIT)
    return passed(evidence)


def _steepest(names: list[str], values: list[float], sign: int) -> str:
    """Return the layer in which the signal grows (`sign` 1) or shrinks (-1) most."""
    logs = [math.log(max(value, 1e-300)) for value in (1.0, *values)]
    candidates = range(max(len(values) - 1, 1) if sign < 0 else len(values))
    return names[max(candidates, key=lambda i: sign * (logs[i + 1] - logs[i]))]


def dead_units(context: CheckContext) -> Finding:
    """Check that most units of every ReLU are positive for some image."""
    images = context.eval_batch(count=context.image_count(2 * IMAGES)).images
    alive = alive_units(context.calibrated_copy(images), images)
    if not alive:
        return skipped("no ReLU is called")
    shares = {name: 1 - float(units.float().mean()) for name, units in alive.items()}
    worst = max(shares, key=lambda name: shares[name])
    units = torch.cat([part.cpu() for part in alive.values()])
    evidence = f"{int((~units).sum())} of {len(units)} units are zero for all {len(images)} images; "
    evidence += f"the largest share is {100 * shares[worst]:.0f} % in {worst}"
    dead = [n for n, share in shares.items() if share >= (WARN_DEAD if len(alive[n]) >= FEW_UNITS else 1)]
    if not dead:
        return passed(evidence)
    verdict = failed if max(shares[name] for name in dead) >= FAIL_DEAD else warned
    cause = f"dead ReLUs in {join_names(dead)}: their inputs are negative for every image"
    return verdict(evidence, cause, "check the biases and weights of the layers before them", INIT, "model")


def pixels_seen(context: CheckContext) -> Finding:
    """Check that the output depends on most of the image, and on more than a few numbers computed from it."""
    images = context.eval_batch(count=context.image_count(IMAGES)).images
    influence = _measure_influence(context.calibrated_copy(images), images)
    if influence is None or not influence.is_above(WARN_SEEN):
        later = _measure_influence(context.calibrated_copy(images, STEPS), images)
        if influence is not None and later is not None:
            later.all_images = max(influence.all_images, later.all_images)
            later.per_image = max(influence.per_image, later.per_image)
        influence = later
    remedy = "look for an operation that overwrites, crops or pools away the image"
    if influence is None:
        evidence = "the outputs have no gradient with respect to any pixel"
        return failed(evidence, "forward() ignores the image, or detaches it", remedy, "model")
    evidence = (
        f"{100 * influence.all_images:.0f} % of the pixels influence the outputs ({100 * influence.per_image:.0f} % "
        f"per image); rank of the gradients {influence.rank} (at least {influence.expected_rank} expected)"
    )
    if influence.uniform and images[0].numel() > images.shape[1]:
        cause = "all pixels have the same influence: the network only sees the mean of the image"
        return failed(evidence, cause, remedy, "model")
    if 2 * influence.rank < influence.expected_rank:
        return failed(evidence, f"the image is reduced to {influence.rank} numbers", remedy, "model")
    if not influence.is_above(WARN_SEEN):
        verdict = warned if influence.is_above(FAIL_SEEN) else failed
        return verdict(evidence, "most of the image does not influence the output", remedy, "model")
    return passed(evidence)


@dataclass
class _Influence:
    """Influence of the pixels on the outputs."""

    all_images: float  # share of the pixels with an influence for any image
    per_image: float  # mean share of the pixels with an influence for an image
    rank: int  # of the gradients over images and projections
    expected_rank: int  # largest possible rank
    uniform: bool  # whether the gradients are the same at all pixels

    def is_above(self, shares: tuple[float, float]) -> bool:
        return self.all_images >= shares[0] and self.per_image >= shares[1]


def _measure_influence(model: nn.Module, images: Tensor) -> _Influence | None:
    """Measure the gradients of random projections of the outputs; None if there are no gradients."""
    images = images.detach().clone().requires_grad_()
    outputs = model(images).float()
    if not outputs.requires_grad:
        return None
    generator, per_projection = torch.Generator().manual_seed(0), []
    for number in range(PROJECTIONS):
        weights = torch.randn(outputs.shape, generator=generator).to(outputs.device)
        value, keep = (outputs * weights).sum(), number < PROJECTIONS - 1
        (gradient,) = torch.autograd.grad(value, images, retain_graph=keep, allow_unused=True)
        if gradient is None:
            return None
        per_projection.append(gradient.float())
    gradients = torch.stack(per_projection)  # (PROJECTIONS, N, C, H, W)
    largest = gradients.abs().amax(dim=(0, 2, 3, 4), keepdim=True)
    if not largest.any():
        return None
    matters = (gradients.abs() > MIN_INFLUENCE * largest).any(dim=2).any(dim=0)  # (N, H, W)
    flat = gradients.flatten(2).flatten(0, 1).cpu().double()
    flat = flat[flat.norm(dim=1) > 0]
    flat /= flat.norm(dim=1, keepdim=True)
    eigenvalues = torch.linalg.eigvalsh(flat @ flat.T)
    return _Influence(
        all_images=float(matters.any(0).float().mean()),
        per_image=float(matters.float().mean()),
        rank=int((eigenvalues > MIN_SINGULAR_VALUE**2 * eigenvalues[-1]).sum()),
        expected_rank=min(outputs[0].numel(), images[0].numel(), len(flat)),
        uniform=bool(gradients.std(dim=(3, 4)).amax() <= 1e-5 * gradients.abs().amax()),
    )
