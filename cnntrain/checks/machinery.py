"""Does the machine do the same twice: reloaded, repeated, with workers, in another precision and memory layout?"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from cnntrain.checks.context import CheckContext, failed, join_names, passed, skipped
from cnntrain.checks.overfit_trial import FP16_SCALE
from cnntrain.checks.short_training import calibrated_copy, relative_distance, train_steps
from cnntrain.data.loader import StreamingLoader
from cnntrain.train import checkpoint
from cnntrain.types import Finding

BUDGET = "the budget (check.budget_s) is used up"
RANDOM = "two evaluations of the same images differ; see modes"
IMAGES = 8
MANY_IMAGES = 32  # norms that are calibrated on fewer divide by next to nothing
STEPS = 3
BATCHES, BATCH = 3, 8  # read by workers
START_S, FRESH_S = 5, 120  # seconds that a fresh process takes to begin, and may take at most
# How far two answers may be apart, beside their size.
PRECISION = {"bf16": 0.2, "fp16": 0.05}
SAME_ON_CPU, SAME_ON_GPU = 1e-3, 2e-2  # TensorFloat-32 has ten bits of mantissa


def reload(context: CheckContext) -> Finding:
    """Saved, and loaded by a fresh process, the network gives the same answers."""
    if context.seconds_left < START_S:
        return skipped(BUDGET)
    model = context.copy_model()
    if not context.trained:  # what is a function of the seed alone would come back even if it were not saved
        train_steps(context, model, context.make_optimizer(model), 2)
    images = context.eval_batch(count=IMAGES).images
    with torch.no_grad():
        mine = context.outputs(model, images)
        if not torch.equal(mine, context.outputs(model, images)):
            return skipped(RANDOM)
    with tempfile.TemporaryDirectory() as folder:
        saved, shown, answered = (Path(folder) / name for name in ("model.pt", "images.pt", "answers.pt"))
        config = {**context.config, "threads": torch.get_num_threads(), "device": str(context.compute.device)}
        config["precision"] = context.compute.precision
        spec = dataclasses.asdict(context.spec)
        checkpoint.save({"state": {"model": model.state_dict()}, "config": config, "spec": spec}, saved)
        torch.save(images.cpu(), shown)
        command = [
            sys.executable,
            "-m",
            "cnntrain.checks.reload_worker",
            str(saved),
            str(shown),
            str(answered),
        ]
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                timeout=FRESH_S,
                env={**os.environ, **paths},
            )
        except subprocess.TimeoutExpired:
            return skipped(f"a fresh process gave no answer in {FRESH_S} s")
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            cause = "a fresh process can't load what was saved"
            remedy = "let state_dict() hold all that training changes, and nothing else"
            return failed(f"it says: {said}", cause, remedy, "model")
        theirs = torch.load(answered, weights_only=True).to(mine.device)
    cause = (
        "training changes something that is not saved: a tensor or number that is no parameter and no buffer"
    )
    remedy = "register it: nn.Parameter, or self.register_buffer(name, tensor)"
    return _same(context, mine, theirs, "answers of a fresh process", cause, remedy)


def repeat(context: CheckContext) -> Finding:
    """Two short trainings from the same seed end with the same weights."""
    if context.seconds_left <= 0:
        return skipped(BUDGET)
    ends = []
    for _ in range(2):
        model = context.copy_model()
        train_steps(context, model, context.make_optimizer(model), STEPS)
        ends.append(torch.cat([value.detach().flatten().double() for value in model.state_dict().values()]))
    cause = "something is drawn from a generator that is not set before each step: numpy's, Python's or one of its own"
    remedy = "draw with torch's global generator, or from a seed of your own"
    return _same(
        context, ends[0], ends[1], f"weights after {STEPS} steps, twice from one seed", cause, remedy
    )


def _same(context: CheckContext, one: Tensor, other: Tensor, what: str, cause: str, remedy: str) -> Finding:
    """Bit for bit, where the device repeats its sums."""
    if one.shape == other.shape and torch.equal(one, other):
        return passed(f"{what}: the same bits")
    apart = relative_distance(one, other) if one.shape == other.shape else float("inf")
    exact = context.compute.device.type == "cpu" or bool(context.config["deterministic"])
    if not exact and apart <= SAME_ON_GPU:
        return passed(
            f"{what}: {apart:.1g} apart, as sums in another order are (deterministic=true gives the same bits)"
        )
    return failed(f"{what}: {apart:.2g} apart", cause, remedy, "model")


def workers(context: CheckContext) -> Finding:
    """The same batches are read by the main process and by two workers."""
    loader, pipeline = context.loaders["train"], context.pipeline
    if not isinstance(loader, StreamingLoader) and not pipeline.per_sample:
        return skipped("images are in memory: workers have nothing to do")
    if context.seconds_left <= 0:
        return skipped(BUDGET)
    transform = pipeline.sample_transform(context.plan.seed, 0)
    rows = torch.linspace(0, len(loader) - 1, min(BATCHES * BATCH, len(loader))).round().long()
    read = []
    for count in (0, 2):
        stream = StreamingLoader(
            loader.examples, context.compute.device, count, context.config["data"]["timeout_s"]
        )
        try:
            read.append(list(stream.batches(rows, BATCH, transform=transform)))
        finally:
            stream.close()
    apart = set()
    for one, other in zip(*read, strict=True):
        pairs = {"images": (one.images, other.images)}
        pairs |= {name: (target, other.targets[name]) for name, target in one.targets.items()}
        apart |= {name for name, (mine, theirs) in pairs.items() if not torch.equal(mine, theirs)}
    if not apart:
        return passed(f"{len(rows)} examples read with data.workers=0 and 2: the same bits")
    cause = "what is read depends on who reads it: something draws at random from a generator of the process"
    remedy = "draw from (seed, epoch, position), as cnntrain's augmentations do"
    return failed(
        f"{join_names(sorted(apart))} differ between data.workers=0 and 2",
        cause,
        remedy,
        "data.workers",
        "augment",
    )


def precision(context: CheckContext) -> Finding:
    """Answers and gradients in the chosen precision are near those in fp32."""
    chosen = context.compute.precision
    if chosen == "fp32":
        return skipped("fp32 is the precision")
    if context.seconds_left <= 0:
        return skipped(BUDGET)
    batch = context.eval_batch(count=MANY_IMAGES)
    exact = dataclasses.replace(context, compute=dataclasses.replace(context.compute, precision="fp32"))
    found = []
    for each in (exact, context):
        model = calibrated_copy(exact, batch.images)
        outputs = each.outputs(model, batch.images)
        loss = each.loss(model, batch) * FP16_SCALE
        if not loss.requires_grad:
            return skipped("the loss has no gradient")
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((outputs.detach(), torch.cat(gradients)))
    apart = relative_distance(found[0][0], found[1][0])
    turned = 1 - float(nn.functional.cosine_similarity(found[0][1].double(), found[1][1].double(), dim=0))
    evidence = f"answers in {chosen} are {apart:.2g} from those in fp32, gradients {turned:.1g} (1 - cosine)"
    if apart <= PRECISION[chosen] and turned <= PRECISION[chosen]:
        return passed(f"{evidence} ({PRECISION[chosen]:g} is allowed)")
    cause = f"{chosen} does not suffice: values too large for it, or small differences of large numbers"
    return failed(
        evidence, cause, "set precision=fp32, or bring the activations to a usual size", "precision"
    )


def memory_layout(context: CheckContext) -> Finding:
    """channels_last changes where numbers lie, and no answer."""
    if context.seconds_left <= 0:
        return skipped(BUDGET)
    images = context.eval_batch(count=IMAGES).images
    model = calibrated_copy(context, images)
    with torch.no_grad():
        if relative_distance(model(images), model(images)) > SAME_ON_CPU:
            return skipped(RANDOM)
    answers = []
    for layout in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            answers.append(model.to(memory_format=layout)(images.contiguous(memory_format=layout)).float())
    apart = relative_distance(*answers)
    limit = SAME_ON_GPU if context.compute.device.type == "cuda" else SAME_ON_CPU
    evidence = f"answers with and without channels_last are {apart:.1g} apart"
    if apart <= limit:
        return passed(f"{evidence} ({limit:g} is allowed)")
    cause = (
        "the network reads numbers in the order in which they lie in memory: as_strided, storage, data_ptr"
    )
    return failed(evidence, cause, "use reshape and flatten; or set channels_last=false", "channels_last")
