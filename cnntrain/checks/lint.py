"""What the groups of a config have to say to one another: keys that quarrel, and keys that do nothing."""

import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cnntrain.checks.context import CheckContext
from cnntrain.checks.verdicts import passed, warned
from cnntrain.models.pretrained import Preprocessing
from cnntrain.train.state import TrainingPlan
from cnntrain.types import DataSpec, Finding

FAR = 0.05  # from the mean or standard deviation that weights learned from, on the 0-1 scale
SMALL = 4  # times smaller than the images that weights learned from
SGD_PER_256 = (
    1e-3,
    1.0,
)  # learning rates per 256 images a step that recipes use with SGD (Goyal et al. 2017: 0.1)
HEAD_ALONE = (
    10  # times larger rates are usual where the last layer alone is trained (He et al. 2020, MoCo: SGD, 30)
)
ADAM_AT_256 = (1e-6, 2e-2)  # and with Adam and AdamW, where they grow with the root of the batch


@dataclass(frozen=True)
class Facts:
    """What lint judges by.

    Attributes:
        config: the whole config as plain values.
        typed: keys that were typed on the command line.
        images: training images.
        has_batch_norm: of the network, in training mode.
        own_val: the data set has a val split of its own.
        streams: images are decoded as they are needed.
        learned: how images for the pretrained weights were prepared, where that is known.
    """

    config: Mapping[str, Any]
    typed: Collection[str]
    plan: TrainingPlan
    spec: DataSpec
    images: int
    has_batch_norm: bool
    own_val: bool
    streams: bool
    device: str
    learned: Preprocessing | None = None


def typed_keys(command_line: str) -> set[str]:
    """Keys of the overrides in a command as it was typed."""
    words = shlex.split(command_line) if command_line else []
    return {word.split("=")[0].lstrip("+~") for word in words if "=" in word and not word.startswith("-")}


def lint(facts: Facts) -> list[Finding]:
    """A WARN for everything that is noticed."""
    return [*_without_effect(facts), *_quarrels(facts)]


def config_agrees(bench: CheckContext) -> Finding:
    """No two keys of the config quarrel, and none that was typed is without effect."""
    if not bench.notes:
        return passed("no keys quarrel, and none that was typed is without effect")
    evidence = "; ".join(note.evidence for note in bench.notes)
    keys = dict.fromkeys(key for note in bench.notes for key in note.keys)
    first = bench.notes[0]
    return warned(evidence, first.cause, first.remedy, *keys)


def _without_effect(facts: Facts) -> Iterator[Finding]:
    config, task, data = facts.config, facts.config["task"], facts.config["data"]
    head, loss = task.get("head"), task.get("loss")
    geometry = [key for key in config["augment"] if key != "border"]
    no_wing = head != "regression" or loss not in ("auto", "wing")
    held, memory = not facts.streams, "images that are held in memory"
    folds, own = data.get("folds"), "the data set's own val split"
    epochs, patience = _epochs(facts.plan), config["early_stopping"]
    cycles = config["schedule"].get("_target_", "").endswith(".OneCycle")
    # Key: whether it is idle, beside what, and the key that decides.
    idle: dict[str, tuple[bool, str, str]] = {
        "task.smooth_l1_beta": (loss != "smooth_l1", f"task.loss={loss}", "task.loss"),
        "task.wing_width": (no_wing, f"task.loss={loss}", "task.loss"),
        "task.wing_curvature": (no_wing, f"task.loss={loss}", "task.loss"),
        "task.heatmap_sigma": (head != "heatmap", f"task.head={head}", "task.head"),
        "data.val_fraction": (
            folds is not None or facts.own_val, own if facts.own_val else f"data.folds={folds}", "data.folds",
        ),
        "data.split_seed": (facts.own_val and not data.get("limit"), own, "data"),
        "data.workers": (held, memory, "data.cache"),
        "data.timeout_s": (held, memory, "data.cache"),
        "epochs": (config["steps"] is not None, f"steps={config['steps']}", "steps"),
        "augment.border": (not geometry, "augment=none", "augment"),
        "deterministic": (facts.device == "cpu", "device=cpu, which always is", "device"),
        "optimizer.decay_norms_and_biases": (
            not config["optimizer"].get("weight_decay"), "optimizer.weight_decay=0", "optimizer.weight_decay",
        ),
        "optimizer.momentum": (
            cycles and bool(config["optimizer"].get("momentum")),
            "schedule=one_cycle, which moves it between 0.95 and 0.85", "schedule",
        ),
        "early_stopping": (patience is not None and patience >= epochs, f"{epochs} epochs", "epochs"),
    }  # fmt: skip
    for key, (applies, beside, other) in idle.items():
        if key in facts.typed and applies:
            remedy = f"change {other}, or leave {key} out"
            yield _warn(f"{key} has no effect with {beside}", f"{other} decides", remedy, key, other)


def _quarrels(facts: Facts) -> Iterator[Finding]:
    config, plan = facts.config, facts.plan
    batch = plan.batch_size * plan.accumulate
    if facts.has_batch_norm and plan.batch_size == 1:
        yield _warn(
            "batch_size=1 with BatchNorm", "one image has no statistics: the norms see only themselves",
            "take batch_size=8 or more (accumulate= does not help), or model.norm=group", "batch_size", "model.norm",
        )  # fmt: skip
    if plan.batch_size > facts.images:
        yield _warn(
            f"batch_size={plan.batch_size} is more than the {facts.images} training images",
            "an epoch is one step", "take a smaller batch_size", "batch_size", "data",
        )  # fmt: skip
    if plan.accumulate > plan.batches_per_epoch:
        yield _warn(
            f"accumulate={plan.accumulate} is more than the {plan.batches_per_epoch} batches of an epoch",
            "an epoch is one step, over fewer batches than asked for", "take a smaller accumulate or batch_size",
            "accumulate", "batch_size",
        )  # fmt: skip
    decay = config["ema_decay"]
    if decay and plan.total_steps < 1 / (1 - decay):
        yield _warn(
            f"ema_decay={decay} averages over {1 / (1 - decay):,.0f} steps, the training has {plan.total_steps:,}",
            "the average warms up and never gets that slow",
            f"take ema_decay={1 - 10 / max(plan.total_steps, 20):.3g} or so, or more epochs", "ema_decay", "epochs",
        )  # fmt: skip
    yield from _learning_rate(config, batch)
    if facts.learned is not None:
        yield from _preprocessing(
            f"model.pretrained={config['model'].get('pretrained')}", facts.learned, facts.spec
        )


def _preprocessing(weights: str, learned: Preprocessing, spec: DataSpec) -> Iterator[Finding]:
    """Other images than the pretrained weights learned from."""
    then = learned.statistics(spec.channels)
    pairs = zip((*then[0], *then[1]), (*(spec.mean or then[0]), *(spec.std or then[1])), strict=True)
    if any(abs(a - b) > FAR for a, b in pairs):
        shown, *wanted = (",".join(f"{value:.3f}" for value in values) for values in (spec.mean or (), *then))
        yield _warn(
            f"{weights} learned from images of another mean or deviation; here the mean is {shown}",
            "the first layer sees other numbers than it learned from",
            f"set data.mean=[{wanted[0]}] data.std=[{wanted[1]}]", "model.pretrained", "data.mean",
        )  # fmt: skip
    side, learned_side = max(spec.image_size), max(learned.size or (0,))
    if side * SMALL < learned_side:
        yield _warn(
            f"{weights} learned from images of {learned_side} px; these have {side} px",
            "few of its layers see more than a pixel or two of them",
            f"set data.size={learned_side} where the images are that large; for a ResNet also model.stem=small, which "
            "starts its first convolution anew", "model.pretrained", "data.size", "model.stem",
        )  # fmt: skip


def _learning_rate(config: Mapping[str, Any], batch: int) -> Iterator[Finding]:
    node = config["optimizer"]
    name, lr = str(node.get("_target_", "")).rsplit(".", 1)[-1], node.get("lr")
    if not isinstance(lr, int | float) or lr == 0:
        return
    if name == "SGD":
        low, high = (bound * batch / 256 for bound in SGD_PER_256)
    elif name in ("Adam", "AdamW"):
        low, high = (bound * (batch / 256) ** 0.5 for bound in ADAM_AT_256)
    else:
        return
    if config["model"].get("freeze") == "backbone" and not config["model"].get("unfreeze"):
        high *= HEAD_ALONE
    if not low <= lr <= high:
        side = "high" if lr > high else "low"
        yield _warn(
            f"optimizer.lr={lr:g} with {batch} images a step",
            f"recipes with {name} use {low:.2g} to {high:.2g} there: this is {side}", "try `cnntrain lr-find`",
            "optimizer.lr", "batch_size",
        )  # fmt: skip


def _epochs(plan: TrainingPlan) -> int:
    return -(-plan.total_steps // plan.steps_per_epoch)


def _warn(evidence: str, cause: str, remedy: str, *keys: str) -> Finding:
    return Finding("config", "WARN", evidence, cause, remedy, keys)
