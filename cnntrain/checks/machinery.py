"""Check that results are reproducible: reloading, repetition, workers, precision and memory format.

The check `reload` runs this module as a program in a new process:

    python -m cnntrain.checks.machinery CHECKPOINT IMAGES OUTPUTS

IMAGES contains normalized images (N, C, H, W); OUTPUTS is written.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from cnntrain.checks.context import (
    FP16_SCALE,
    OUT_OF_BUDGET,
    CheckContext,
    evenly_spaced,
    failed,
    join_names,
    passed,
    relative_distance,
    skipped,
)
from cnntrain.config.schema import Settings, parse
from cnntrain.data.loader import StreamingLoader
from cnntrain.train import checkpoint
from cnntrain.train.evaluate import predict_batch
from cnntrain.train.setup import build_components
from cnntrain.types import DataSpec, Finding

RANDOM = "two evaluations of the same images differ; see modes"
IMAGES = 8
CALIBRATION_IMAGES = 32  # with fewer, the variance in some norms may be close to zero
STEPS = 3
WORKER_BATCHES, WORKER_BATCH_SIZE = 3, 8
MIN_RELOAD_S, RELOAD_TIMEOUT_S = 5, 120
PRECISION_TOLERANCE = {"bf16": 0.2, "fp16": 0.05}  # relative difference of outputs
CPU_TOLERANCE, GPU_TOLERANCE = 1e-3, 2e-2  # TensorFloat-32 has 10 bits of mantissa


def repeat(context: CheckContext) -> Finding:
    """Check that two short trainings with the same seed give the same weights."""
    states = []
    for _ in range(2):
        model = context.copy_model()
        context.train_steps(model, context.make_optimizer(model), STEPS)
        states.append(torch.cat([value.detach().flatten().double() for value in model.state_dict().values()]))
    cause = "random numbers come from a generator (NumPy's, Python's, ...) that is not seeded before each step"
    remedy = "use torch's global generator, or your own seeded generator"
    what = f"weights after {STEPS} steps, twice with the same seed"
    return _check_equal(context, states[0], states[1], what, cause, remedy)


def reload(context: CheckContext) -> Finding:
    """Check that a new process gets the same outputs after loading the saved weights."""
    if context.seconds_left < MIN_RELOAD_S:
        return skipped(OUT_OF_BUDGET)
    model = context.copy_model()
    if not context.trained:  # initial weights could also be restored from the seed
        context.train_steps(model, context.make_optimizer(model), 2)
    images = context.eval_batch(count=IMAGES).images
    with torch.no_grad():
        expected = context.outputs(model, images)
        if not torch.equal(expected, context.outputs(model, images)):
            return skipped(RANDOM)
    compute, spec = context.compute, dataclasses.asdict(context.spec)
    config = {**context.config, "threads": torch.get_num_threads()}
    config |= {"device": str(compute.device), "precision": compute.precision}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("model.pt", "images.pt", "outputs.pt")]
        checkpoint.save({"state": {"model": model.state_dict()}, "config": config, "spec": spec}, paths[0])
        torch.save(images.cpu(), paths[1])
        command = [sys.executable, "-m", "cnntrain.checks.machinery", *paths]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=RELOAD_TIMEOUT_S, env=environment
            )
        except subprocess.TimeoutExpired:
            return skipped(f"a new process did not finish in {RELOAD_TIMEOUT_S} s")
        if done.returncode:
            message = (done.stderr.strip().splitlines() or ["(no message)"])[-1]
            cause = "a new process cannot load the saved weights"
            remedy = "let state_dict() contain everything that training changes, and nothing else"
            return failed(f"error of the new process: {message}", cause, remedy, "model")
        outputs = torch.load(paths[2], weights_only=True).to(expected.device)
    cause = "training changes something that is not saved: a tensor or number that is neither parameter nor buffer"
    remedy = "register it: nn.Parameter, or self.register_buffer(name, tensor)"
    return _check_equal(context, expected, outputs, "outputs of a new process", cause, remedy)


def _write_outputs(checkpoint_path: Path, images_path: Path, outputs_path: Path) -> None:
    """Compute outputs with saved weights, in a new process."""
    content = checkpoint.load(checkpoint_path)
    config = content["config"]
    if "pretrained" in config["model"]:
        config["model"] = {**config["model"], "pretrained": False}
    components = build_components(parse(Settings, config), DataSpec(**content["spec"]))
    compute, model = components.compute, components.model
    checkpoint.load_weights(model, content["state"]["model"])
    model.eval().to(memory_format=compute.memory_format)
    images = torch.load(images_path, weights_only=True).to(compute.device)
    with torch.no_grad():
        torch.save(predict_batch(model, images, compute).cpu(), outputs_path)


def _check_equal(
    context: CheckContext, expected: Tensor, actual: Tensor, what: str, cause: str, remedy: str
) -> Finding:
    """Check that tensors are bit-identical; allow rounding errors on devices with nondeterministic sums."""
    if expected.shape == actual.shape and torch.equal(expected, actual):
        return passed(f"{what}: bit-identical")
    distance = relative_distance(expected, actual) if expected.shape == actual.shape else float("inf")
    deterministic = context.compute.device.type == "cpu" or bool(context.config["deterministic"])
    evidence = f"{what}: relative difference"
    if not deterministic and distance <= GPU_TOLERANCE:
        note = "sums in another order; deterministic=true gives identical bits"
        return passed(f"{evidence} {distance:.1g} ({note})")
    return failed(f"{evidence} {distance:.2g}", cause, remedy, "model")


def workers(context: CheckContext) -> Finding:
    """Check that the main process and two workers read the same batches."""
    loader, pipeline = context.loaders["train"], context.pipeline
    if not isinstance(loader, StreamingLoader) and not pipeline.per_sample:
        return skipped("the images are cached in memory, so there are no workers")
    transform = pipeline.sample_transform(context.plan.seed, 0)
    rows = evenly_spaced(len(loader), WORKER_BATCHES * WORKER_BATCH_SIZE)
    timeout_s = context.config["data"]["timeout_s"]
    batches = []
    for worker_count in (0, 2):
        stream = StreamingLoader(loader.examples, context.compute.device, worker_count, timeout_s)
        try:
            batches.append(list(stream.batches(rows, WORKER_BATCH_SIZE, transform=transform)))
        finally:
            stream.close()
    different = set()
    for one, other in zip(*batches, strict=True):
        actual = {"images": other.images, **other.targets}
        expected = {"images": one.images, **one.targets}
        different |= {name for name, value in expected.items() if not torch.equal(value, actual[name])}
    if not different:
        return passed(f"{len(rows)} examples read with data.workers=0 and 2: identical")
    evidence = f"{join_names(sorted(different))} differ between data.workers=0 and 2"
    cause = "the data depend on the process that reads them: a transform uses the random generator of its process"
    remedy = "derive random numbers from (seed, epoch, position), as cnntrain's augmentations do"
    return failed(evidence, cause, remedy, "data.workers", "augment")


def precision(context: CheckContext) -> Finding:
    """Check that outputs and gradients in the chosen precision are close to those in fp32."""
    chosen = context.compute.precision
    if chosen == "fp32":
        return skipped("precision=fp32")
    batch = context.eval_batch(count=CALIBRATION_IMAGES)
    fp32 = dataclasses.replace(context, compute=dataclasses.replace(context.compute, precision="fp32"))
    results = []
    for each in (fp32, context):
        model = fp32.calibrated_copy(batch.images)
        outputs = each.outputs(model, batch.images)
        loss = each.loss(model, batch) * FP16_SCALE
        if not loss.requires_grad:
            return skipped("the loss has no gradient")
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((outputs.detach(), torch.cat(gradients)))
    (outputs_fp32, gradients_fp32), (outputs, gradients) = results
    distance = relative_distance(outputs_fp32, outputs)
    angle = 1 - float(nn.functional.cosine_similarity(gradients_fp32.double(), gradients.double(), dim=0))
    limit = PRECISION_TOLERANCE[chosen]
    differences = f"relative difference of the outputs {distance:.2g}, of the gradients {angle:.1g} (1 - cosine)"
    evidence = f"{chosen} compared with fp32: {differences}"
    if distance <= limit and angle <= limit:
        return passed(f"{evidence}; tolerance {limit:g}")
    cause = f"{chosen} is not precise enough: values that are too large, or small differences of large numbers"
    remedy = "set precision=fp32, or reduce the size of the activations"
    return failed(evidence, cause, remedy, "precision")


def memory_layout(context: CheckContext) -> Finding:
    """Check that channels_last does not change the outputs."""
    images = context.eval_batch(count=IMAGES).images
    model = context.calibrated_copy(images)
    with torch.no_grad():
        if relative_distance(model(images), model(images)) > CPU_TOLERANCE:
            return skipped(RANDOM)
    outputs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            model = model.to(memory_format=memory_format)
            outputs.append(model(images.contiguous(memory_format=memory_format)).float())
    distance = relative_distance(*outputs)
    limit = GPU_TOLERANCE if context.compute.device.type == "cuda" else CPU_TOLERANCE
    evidence = f"relative difference of the outputs with and without channels_last: {distance:.1g}"
    if distance <= limit:
        return passed(f"{evidence}; tolerance {limit:g}")
    cause = "the network depends on the memory format: as_strided, storage or data_ptr"
    return failed(evidence, cause, "use reshape and flatten, or set channels_last=false", "channels_last")


if __name__ == "__main__":
    _write_outputs(*(Path(word) for word in sys.argv[1:4]))
