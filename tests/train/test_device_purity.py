"""On a simulated GPU: no operation meets tensors of host and device, and no training step waits for the device.

What happens once per pass over the data (the order is copied) or once per training (class weights, constants) is
allowed. What happens at every step is not: neither a host sync nor a blocking copy.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from cnntrain.augment.geometry import HorizontalFlip, Shift
from cnntrain.augment.pipeline import Pipeline
from cnntrain.config.compose import read_settings
from cnntrain.train.distributed import gather_states, rank_state
from cnntrain.train.evaluate import evaluate
from cnntrain.train.loop import Logger, Trainer, train_epoch
from cnntrain.train.nonfinite import NonFiniteGuard
from cnntrain.train.prepare import prepare_training
from cnntrain.train.setup import build_components
from cnntrain.train.signals import StopFlag
from cnntrain.train.step_timer import StepTimer
from cnntrain.transfer import constant
from cnntrain.types import Batch, DataSpec
from tests.simulated_cuda import DeviceMixError, simulated_cuda

STEPS = 3  # of an epoch, and of a validation
COMMON = {"device": "cuda", "batch_size": "8", "threads": "1", "data.limit": "60", "log.tensorboard": "false"}
FACES = ["data=toy_faces", "data.size=48", "data.train_count=60"]
SHAPES = ["data=toy_shapes", "data.size=32", "model=unet_small", "model.width=4"]
QUICK = {
    "classification, bf16": ["model=lenet5", "augment=[shift,rotation]", "ema_decay=0.9", "clip_grad_norm=1"],
    "keypoints": [*FACES, "augment=[flip,rotation,jitter]"],
    "heat maps": [*FACES, "task.head=heatmap", "model=unet_small", "model.width=4"],
    "segmentation": [*SHAPES, "task.loss=ce_dice", "task.class_weights=balanced", "augment=[flip,crop,jitter]"],
    "streamed images": ["data.cache=none", "data.workers=0"],
    "fp16": ["precision=fp16", "optimizer=sgd", "accumulate=2", "clip_grad_norm=1", "ema_decay=0.9"],
}
MORE = {
    "fp32": ["precision=fp32", "model=lenet5"],
    "BatchNorm and EMA": ["model=batchnorm_cnn", "ema_decay=0.9", "accumulate=2"],
    "mixed labels": ["augment=mixup_cutmix", "task.class_weights=balanced", "task.label_smoothing=0.1"],
    "optimizer without fused kernels": ["optimizer=torch", "optimizer.name=NAdam"],
    "images in host memory": ["data.cache=ram", "augment=[shift,rotation]"],
    "streamed keypoints": [*FACES, "data.cache=none", "data.workers=0"],
    "streamed masks": [*SHAPES, "data.cache=none", "data.workers=0"],
    "keypoints, all effects": [*FACES, "augment=[flip,rotation,jitter,blur,noise,random_erasing,perspective,zoom]"],
    "keypoints by a pair of points": [*FACES, "task.normalize_by=[left_eye,right_eye]", "task.loss=mse"],
    "heat maps, mse": [*FACES, "task.head=heatmap", "task.loss=mse", "model=unet_small", "model.width=4"],
    "masks, all effects": [*SHAPES, "augment=[flip,crop,jitter,hue,blur,noise,rotation,zoom]"],
    "random resized crop": ["augment=[random_resized_crop,trivial_augment]"],
    "masks, Dice": [*SHAPES, "task.loss=dice"],
}


def waits_at_each_step(words: list[str], resumed: bool = False) -> list[str]:
    """Return the host syncs that happened more than once in an epoch of `STEPS` batches, or in a validation.

    Args:
        resumed: whether the epoch goes on with the metrics that a checkpoint, on the CPU, has of its first part.
    """
    chosen = {word.split("=")[0] for word in words}
    more = [f"{key}={value}" for key, value in COMMON.items() if key not in chosen]
    with simulated_cuda() as cuda:
        assembly = build_components(read_settings([*words, *more, f"limit_batches={STEPS}"], None))
        data = assembly.load()
        plan, state = prepare_training(assembly, data)
        plan = replace(plan, log_every_steps=10**9, total_steps=10**9)
        training, validation = assembly.loader(data.train, augmented=True), assembly.loader(data.val)
        finite = NonFiniteGuard(assembly.compute.device, state.scaler is not None, AssertionError)
        trainer = Trainer(assembly.task, assembly.pipeline, assembly.compute, plan, training)
        meter, world = assembly.task.meter(), assembly.compute.world
        train_epoch(trainer, state, meter, Logger(), finite, StopFlag())
        if resumed:
            saved = {name: value.cpu() for name, value in gather_states(meter, world).items()}
            saved = rank_state(saved, world.rank, world.size)
            meter.load_state(saved, assembly.compute.device)
            assert all(cuda.is_on_device(value) for value in meter.state().values())
            state.progress.batch = 0
            cuda.events.clear()
            train_epoch(trainer, state, meter, Logger(), finite, StopFlag())
        evaluate(trainer, state.eval_model, validation, plan.batch_size, STEPS)
        assert state.progress.batch == STEPS
        assert all(cuda.is_on_device(parameter) for parameter in state.model.parameters())
    assert cuda.kernels["train_epoch"] > 50 * STEPS
    assert cuda.kernels["evaluate"]
    times: Counter[tuple[str, str, str]] = Counter()
    for (kind, region, place), count in cuda.events.items():
        times[kind, region, place] += count
    return [f"{region}: {kind}, {n} times at {place}" for (kind, region, place), n in times.items() if region and n > 1]


@pytest.mark.parametrize("case", QUICK)
def test_no_step_waits_for_the_device(case: str) -> None:
    assert waits_at_each_step(QUICK[case]) == []


@pytest.mark.parametrize("case", ["classification, bf16", "keypoints"])
def test_a_resumed_epoch_accumulates_its_metrics_on_the_device(case: str) -> None:
    assert waits_at_each_step(QUICK[case], resumed=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_no_step_waits_for_the_device_in_rare_setups(case: str) -> None:
    assert waits_at_each_step(MORE[case]) == []


@pytest.mark.parametrize(
    ("words", "most"), [(["model=lenet5", "augment=none"], 26), ([*FACES, "augment=flip", "ema_decay=0.9"], 95)]
)
def test_the_loop_launches_few_kernels_besides_those_of_the_bare_step(words: list[str], most: int) -> None:
    """On a GPU the cost of a small kernel is the time of its launch."""
    steps = 4
    more = ["device=cuda", "precision=fp32", "batch_size=8", "threads=1", f"limit_batches={steps}"]
    with simulated_cuda() as cuda:
        assembly = build_components(read_settings([*words, *more, "log.tensorboard=false"], None))
        data = assembly.load()
        plan, state = prepare_training(assembly, data)
        plan = replace(plan, log_every_steps=10**9, total_steps=10**9)
        training = assembly.loader(data.train, augmented=True)
        rig = StepTimer(assembly, plan, training)
        rig._bare_steps(1)
        finite = NonFiniteGuard(assembly.compute.device, False, AssertionError)
        meter = assembly.task.meter()
        trainer = Trainer(assembly.task, assembly.pipeline, assembly.compute, plan, training)
        for _ in range(2):  # constants and the optimizer's state are made in the first one
            cuda.kernels.clear()
            state.progress.batch = 0
            train_epoch(trainer, state, meter, Logger(), finite, StopFlag())
        rig._bare_steps(steps)
    extra = (cuda.kernels["train_epoch"] - cuda.kernels["_bare_steps"]) / steps
    assert 0 < extra <= most


def test_large_batches_are_copied_from_pinned_memory() -> None:
    """An index of every row of 512 images of 64 px would be 256 KiB, which CUDA copies while the host waits."""
    with simulated_cuda() as cuda:
        images = torch.zeros(512, 1, 64, 64, dtype=torch.uint8).to("cuda")
        batch = Batch(images, {}, torch.arange(512), torch.arange(512))
        cuda.events.clear()
        Pipeline(DataSpec(1, 64, 64), {"flip": HorizontalFlip(), "shift": Shift()})(batch, 0, 0)
    assert not [event for event in cuda.events if event.kind.startswith("copy of more")]


def test_constants_are_copied_once() -> None:
    with simulated_cuda() as cuda:
        for _ in range(3):
            assert cuda.is_on_device(constant((1.0, 2.0), torch.device("cuda")))
    assert sum(cuda.events.values()) == 1


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (lambda x: x.sum().item(), "host sync by _local_scalar_dense"),
        (lambda x: x[x > 0], "host sync by a boolean index"),
        (lambda x: x.cpu(), "copy to the host"),
        (lambda x: torch.zeros(3).to("cuda"), "blocking copy to the device"),
        (lambda x: x.new_tensor([1.0]), "blocking copy to the device"),
        (lambda x: torch.zeros(1 << 15).to("cuda", non_blocking=True), "copy of more than 64 KiB"),
        (lambda x: x.tolist(), "host sync by tolist"),
        (lambda x: x[torch.tensor([0])], "blocking copy of an index"),
    ],
)
def test_the_simulation_detects_host_syncs(work, kind: str) -> None:
    with simulated_cuda() as cuda:
        x = torch.ones(4, device="cuda")
        cuda.events.clear()
        work(x)
    assert any(event.kind.startswith(kind) for event in cuda.events)


def test_the_simulation_refuses_what_cuda_refuses() -> None:
    with simulated_cuda():
        x = torch.ones(4, device="cuda")
        assert (x + torch.tensor(1.0)).device.type == "cuda"  # a scalar may come from the host
        with pytest.raises(DeviceMixError):
            x + torch.ones(4)
        with pytest.raises(DeviceMixError):
            torch.ones(4)[x.long()]
        with pytest.raises(TypeError):
            x.numpy()
    assert torch.ones(1).device.type == "cpu"


def test_pinned_copies_do_not_wait() -> None:
    with simulated_cuda() as cuda:
        torch.zeros(1 << 20).pin_memory().to("cuda", non_blocking=True)
        torch.zeros(8).to("cuda", non_blocking=True)
    assert not cuda.events
