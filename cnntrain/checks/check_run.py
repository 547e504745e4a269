"""All checks in their order, and what runs them."""

import dataclasses
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from cnntrain.checks import (
    channel_order,
    derivative,
    leakage,
    learning,
    lint,
    losses,
    machinery,
    modes,
    norms,
    outputs,
    start,
    steps,
    targets,
    training_loop,
    wiring,
)
from cnntrain.checks import image_checks as images
from cnntrain.checks.context import CheckContext
from cnntrain.checks.verdicts import failed
from cnntrain.errors import CnntrainError, UserError, suggest
from cnntrain.randomness import fork_generators
from cnntrain.train.device import full_float32
from cnntrain.types import Finding

Check = Callable[[CheckContext], Finding]

# By topic, cheap ones first. A name on the command line may be a check's or a topic's.
CHECKS: dict[str, dict[str, Check]] = {
    "config": {"config": lint.config_agrees},
    "data": {
        "normalized inputs": images.normalized_inputs,
        "layout": images.layout,
        "channel order": channel_order.channel_order,
        "blank images": images.blank_images,
        "validation": images.validation_is_plain,
        "leakage": leakage.leakage,
        "classes": targets.classes,
        "points": targets.points,
        "masks": targets.masks,
        "flip": targets.flip,
        "augmentation": images.augmentation,
    },
    "start": {
        "initial loss": start.initial_loss,
        "answers differ": start.answers_differ,
        "activations": start.activations,
        "dead units": start.dead_units,
        "pixels seen": start.pixels_seen,
    },
    "wiring": {
        "registered": wiring.registered,
        "shared weights": wiring.shared_weights,
        "frozen": wiring.frozen,
        "optimizer": wiring.optimizer,
        "gradients": wiring.gradients,
        "examples apart": outputs.examples_apart,
        "batch order": outputs.batch_order,
        "output layer": outputs.output_layer,
        "modes": modes.modes,
        "loss scale": losses.loss_scale,
        "loss sees labels": losses.loss_sees_labels,
        "loss sign": losses.loss_sign,
        "derivative": derivative.derivative,
        "loop": training_loop.loop_agrees,
    },
    "learning": {
        "weight decay": steps.weight_decay,
        "one example": learning.one_example,
        "eight examples": learning.eight_examples,
        "learning rate": steps.learning_rate,
        "generalizes": learning.generalizes,
        "batch norm gap": norms.batch_norm_gap,
    },
    "machinery": {
        "repeat": machinery.repeat,
        "workers": machinery.workers,
        "precision": machinery.precision,
        "memory layout": machinery.memory_layout,
        "reload": machinery.reload,
    },
}


def names() -> list[str]:
    """Of all checks, as they are typed: with dashes."""
    return [typed(name) for topic in CHECKS.values() for name in topic]


def typed(name: str) -> str:
    return name.replace(" ", "-")


def choose(words: Sequence[str]) -> dict[str, Check]:
    """The checks of these names and topics, all of them for no word; in the order in which they run.

    Raises:
        UserError: a word is neither.
    """
    known = [*CHECKS, *names(), "all"]
    for word in words:
        if word not in known:
            raise UserError(
                f"check: no check {word!r}{suggest(word, known)}; there are {', '.join(names())}, and the topics "
                f"{', '.join(CHECKS)}"
            )
    everything = not words or "all" in words
    return {
        name: check
        for topic, checks in CHECKS.items()
        for name, check in checks.items()
        if everything or topic in words or typed(name) in words
    }


def run_checks(
    bench: CheckContext, chosen: dict[str, Check], tell: Callable[[Finding, float], None]
) -> list[Finding]:
    """The findings of all checks, each told with its seconds as it comes; nothing of the caller's changes."""
    findings: list[Finding] = []
    for name, check in chosen.items():
        bench.stop.check()
        started = time.perf_counter()
        # Trainings compute as the run would; other checks compare numbers, which TensorFloat-32 rounds to ten bits.
        exact = nullcontext() if name in CHECKS["learning"] else full_float32()
        with untouched(bench.compute.device), exact:
            bench.reseed(name)
            finding = dataclasses.replace(_judge(check, bench), name=name)
        findings.append(finding)
        tell(finding, time.perf_counter() - started)
    return findings


def _judge(check: Check, bench: CheckContext) -> Finding:
    """What the check finds; where the network or the loss raise, that is what was found, and the others go on."""
    try:
        return check(bench)
    except CnntrainError:
        raise
    except Exception as error:  # code of the user's own may raise anything
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        said = (str(error).splitlines() or [""])[0]
        cause = "the network, the loss or the data raise an error here"
        remedy = "see the other findings; HYDRA_FULL_ERROR=1 shows where"
        return failed(f"{type(error).__name__}: {said}", cause, remedy, "model", "task")


@contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Generators of torch (on the CPU and `device`), numpy and Python and the mode of gradients stay as they were."""
    python, array = random.getstate(), np.random.get_state()
    with fork_generators(device), torch.enable_grad():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
