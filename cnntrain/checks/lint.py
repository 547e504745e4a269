"""Find settings that contradict each other, and settings that have no effect."""

import dataclasses
import shlex
from collections.abc import Collection, Iterator

from torch import nn

from cnntrain.checks.context import CheckContext, passed, warned
from cnntrain.data.examples import LazyImages
from cnntrain.data.load import DataSplits
from cnntrain.models.pretrained import Preprocessing
from cnntrain.train.setup import Components
from cnntrain.train.state import TrainingPlan
from cnntrain.types import DataSpec, Finding

STATISTICS_TOLERANCE = 0.05  # difference of mean or standard deviation from the pretrained weights', on the 0-1 scale
SIZE_RATIO = 4  # ratio of the image size of the pretrained weights to the image size of the data
SGD_LR_PER_256 = (1e-3, 1.0)  # usual learning rates per 256 images per step (Goyal et al. 2017: 0.1)
ADAM_LR_AT_256 = (1e-6, 2e-2)  # for Adam and AdamW, where they grow with the square root of the batch size
HEAD_ONLY_FACTOR = 10  # training only the last layer tolerates higher rates (He et al. 2020, MoCo: SGD, 30)


def typed_keys(command_line: str) -> set[str]:
    """Return the keys of the overrides in a command line."""
    words = shlex.split(command_line) if command_line else []
    return {word.split("=")[0].lstrip("+~") for word in words if "=" in word and not word.startswith("-")}


def lint(components: Components, data: DataSplits, plan: TrainingPlan, command_line: str) -> list[Finding]:
    """Return a WARN for each contradiction, and for each setting on the command line that has no effect."""
    typed = typed_keys(command_line)
    findings = [*_without_effect(components, data, plan, typed), *_contradictions(components, data, plan)]
    return [dataclasses.replace(finding, name="config") for finding in findings]


def config_agrees(context: CheckContext) -> Finding:
    """Check that no settings contradict each other, and that every setting on the command line has an effect."""
    warnings = context.config_warnings
    if not warnings:
        return passed("no contradictions, and every setting on the command line has an effect")
    evidence = "; ".join(warning.evidence for warning in warnings)
    keys = dict.fromkeys(key for warning in warnings for key in warning.keys)
    return warned(evidence, warnings[0].cause, warnings[0].remedy, *keys)


def _without_effect(
    components: Components, data: DataSplits, plan: TrainingPlan, typed: Collection[str]
) -> Iterator[Finding]:
    settings = components.settings
    head, loss = settings.task.get("head"), settings.task.get("loss")
    no_wing = head != "regression" or loss not in ("auto", "wing")
    cached = not isinstance(data.train.images, LazyImages) and not components.pipeline.per_sample
    own_split = "a dataset that has its own val split"
    no_val_fraction = own_split if data.has_own_val else f"data.folds={settings.data.get('folds')}"
    epochs, patience = -(-plan.total_steps // plan.steps_per_epoch), settings.early_stopping
    cycled = str(settings.schedule.get("_target_", "")).endswith(".OneCycle") and settings.optimizer.get("momentum")
    one_cycle = "schedule=one_cycle, which cycles the momentum between 0.95 and 0.85"
    on_cpu, decay = components.compute.device.type == "cpu", "optimizer.weight_decay"
    # Key: whether it has no effect, the setting that is the reason, and the key to change.
    unused: dict[str, tuple[object, str, str]] = {
        "task.smooth_l1_beta": (loss != "smooth_l1", f"task.loss={loss}", "task.loss"),
        "task.wing_width": (no_wing, f"task.loss={loss}", "task.loss"),
        "task.wing_curvature": (no_wing, f"task.loss={loss}", "task.loss"),
        "task.heatmap_sigma": (head != "heatmap", f"task.head={head}", "task.head"),
        "data.val_fraction": (
            data.has_own_val or settings.data.get("folds") is not None,
            no_val_fraction,
            "data.folds",
        ),
        "data.split_seed": (data.has_own_val and not settings.data.get("limit"), own_split, "data"),
        "data.workers": (cached, "images that are cached in memory", "data.cache"),
        "data.timeout_s": (cached, "images that are cached in memory", "data.cache"),
        "epochs": (settings.steps is not None, f"steps={settings.steps}", "steps"),
        "augment.border": (not set(settings.augment) - {"border"}, "augment=none", "augment"),
        "deterministic": (on_cpu, "device=cpu, which is always deterministic", "device"),
        "optimizer.decay_norms_and_biases": (not settings.optimizer.get("weight_decay"), f"{decay}=0", decay),
        "optimizer.momentum": (cycled, one_cycle, "schedule"),
        "early_stopping": (patience is not None and patience >= epochs, f"{epochs} epochs", "epochs"),
    }
    for key, (no_effect, reason, other) in unused.items():
        if key in typed and no_effect:
            evidence, remedy = f"{key} has no effect with {reason}", f"change {other}, or remove {key}"
            yield warned(evidence, f"{other} takes precedence", remedy, key, other)


def _contradictions(components: Components, data: DataSplits, plan: TrainingPlan) -> Iterator[Finding]:
    settings, images = components.settings, len(data.train)
    norms = [m for m in components.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    has_batch_norm = any(norm.weight is None or norm.weight.requires_grad for norm in norms)
    if has_batch_norm and plan.batch_size == 1:
        cause = "batch statistics of a single image are not meaningful"
        remedy = "set batch_size=8 or more (accumulate does not help), or model.norm=group"
        yield warned("batch_size=1 with BatchNorm", cause, remedy, "batch_size", "model.norm")
    if plan.batch_size > images:
        evidence = f"batch_size={plan.batch_size} is larger than the {images} training images"
        yield warned(evidence, "each epoch has a single step", "set a smaller batch_size", "batch_size", "data")
    if plan.accumulate > plan.batches_per_epoch:
        evidence = f"accumulate={plan.accumulate} is larger than the {plan.batches_per_epoch} batches of an epoch"
        cause = "each epoch has a single step, over fewer batches than configured"
        yield warned(evidence, cause, "set a smaller accumulate or batch_size", "accumulate", "batch_size")
    decay, steps = settings.ema_decay, plan.total_steps
    if decay and steps < 1 / (1 - decay):
        evidence = f"ema_decay={decay} averages over {1 / (1 - decay):,.0f} steps; the training has {steps:,}"
        cause = "the moving average is still warming up when the training ends"
        remedy = f"set ema_decay={1 - 10 / max(steps, 20):.3g} or similar, or more epochs"
        yield warned(evidence, cause, remedy, "ema_decay", "epochs")
    yield from _learning_rate(components, plan.batch_size * plan.accumulate)
    if components.pretraining is not None:
        name = f"model.pretrained={settings.model.get('pretrained')}"
        yield from _preprocessing(name, components.pretraining, components.spec)


def _preprocessing(weights: str, pretraining: Preprocessing, spec: DataSpec) -> Iterator[Finding]:
    """Compare the images with those that the weights were pretrained on."""
    mean, std = pretraining.statistics(spec.channels)
    pairs = zip((*mean, *std), (*(spec.mean or mean), *(spec.std or std)), strict=True)
    if any(abs(a - b) > STATISTICS_TOLERANCE for a, b in pairs):
        lists = (spec.mean or (), mean, std)
        shown, wanted_mean, wanted_std = (",".join(f"{value:.3f}" for value in values) for values in lists)
        evidence = f"{weights} was trained with another mean or standard deviation; here the mean is {shown}"
        cause = "the first layer gets inputs on another scale than in pretraining"
        remedy = f"set data.mean=[{wanted_mean}] data.std=[{wanted_std}]"
        yield warned(evidence, cause, remedy, "model.pretrained", "data.mean")
    side, pretraining_side = max(spec.image_size), max(pretraining.size or (0,))
    if side * SIZE_RATIO < pretraining_side:
        evidence = f"{weights} was trained on images of {pretraining_side} px; these have {side} px"
        cause = "in most layers the feature maps shrink to one or two pixels"
        remedy = f"set data.size={pretraining_side} if the images are that large; for a ResNet also model.stem=small, "
        remedy += "which reinitializes the first convolution"
        yield warned(evidence, cause, remedy, "model.pretrained", "data.size", "model.stem")


def _learning_rate(components: Components, batch_size: int) -> Iterator[Finding]:
    """Compare the learning rate with those in published recipes."""
    node, model = components.settings.optimizer, components.settings.model
    name, lr = str(node.get("_target_", "")).rsplit(".", 1)[-1], node.get("lr")
    if not isinstance(lr, int | float) or lr == 0:
        return
    if name == "SGD":
        low, high = (bound * batch_size / 256 for bound in SGD_LR_PER_256)
    elif name in ("Adam", "AdamW"):
        low, high = (bound * (batch_size / 256) ** 0.5 for bound in ADAM_LR_AT_256)
    else:
        return
    if model.get("freeze") == "backbone" and not model.get("unfreeze"):
        high *= HEAD_ONLY_FACTOR
    if not low <= lr <= high:
        evidence = f"optimizer.lr={lr:g} with {batch_size} images per step"
        size = "high" if lr > high else "low"
        cause = f"the learning rate is too {size}: recipes with {name} use {low:.2g} to {high:.2g} for this batch size"
        yield warned(evidence, cause, "run `cnntrain lr-find`", "optimizer.lr", "batch_size")
