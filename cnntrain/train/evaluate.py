"""Evaluate a model on a split: exact metrics without augmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cnntrain.data.loader import Loader
from cnntrain.tasks.task import Meter
from cnntrain.train.device import Compute
from cnntrain.train.distributed import merge_meters
from cnntrain.train.signals import StopFlag
from cnntrain.types import Batch

if TYPE_CHECKING:
    from cnntrain.train.loop import Trainer
    from cnntrain.train.setup import Components


def predict_batch(model: nn.Module, images: Tensor, compute: Compute) -> Tensor:
    """Return the model's outputs for preprocessed images (N, C, H, W): (N, ...) float32."""
    images = images.contiguous(memory_format=compute.memory_format)
    with compute.autocast():
        outputs = model(images)
    return outputs.float()


@torch.no_grad()
def evaluate(
    components: Components | Trainer,
    model: nn.Module,
    loader: Loader,
    batch_size: int,
    limit_batches: int | None = None,
    stop: StopFlag | None = None,
    on_batch: Callable[[Batch, Tensor], None] | None = None,
) -> Meter:
    """Return the metrics of `model` over all examples of `loader`, in order. Ranks share the work.

    Args:
        components: task, pipeline and compute.
        limit_batches: maximum number of batches, spread evenly because files are often sorted by class.
        on_batch: called with each of this rank's batches (normalized images) and its outputs, (N, ...) float32.
    """
    task, compute = components.task, components.compute
    was_training = model.training
    model.eval()
    meter = task.meter()
    num_examples = len(loader) if limit_batches is None else min(len(loader), limit_batches * batch_size)
    order = torch.linspace(0, len(loader) - 1, num_examples, dtype=torch.float64).round().long()
    for batch in loader.batches(order, batch_size, shard=compute.world.shard()):
        if stop is not None:
            stop.check()
        if not len(batch):
            continue
        batch = components.pipeline.eval_transform(batch)
        outputs = predict_batch(model, batch.images, compute)
        loss_sum, count = task.loss(outputs, batch.truth, training=False)
        meter.update(outputs, batch.truth, loss_sum, count)
        if on_batch is not None:
            on_batch(batch, outputs)
    model.train(was_training)
    return merge_meters(meter, task.meter(), compute.world)
