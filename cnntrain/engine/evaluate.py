"""Running a model over a split: exact metrics, nothing random, nothing learned."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cnntrain.augment.pipeline import Pipeline
from cnntrain.data.store import Loader
from cnntrain.engine.device import Compute
from cnntrain.engine.signals import StopFlag
from cnntrain.spec import Batch
from cnntrain.tasks.task import Meter, Task


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    pipeline: Pipeline,
    task: Task,
    compute: Compute,
    batch_size: int,
    limit_batches: int | None = None,
    stop: StopFlag | None = None,
    look: Callable[[Batch, Tensor], None] | None = None,
) -> Meter:
    """Metrics of `model` over all examples of `loader`, in their own order.

    Args:
        look: shown every batch (normalised images) with its outputs, (N, ...) float32.
    """
    was_training = model.training
    model.eval()
    meter = task.meter()
    order = torch.arange(len(loader))
    for number, batch in enumerate(loader.batches(order, batch_size)):
        if limit_batches is not None and number >= limit_batches:
            break
        if stop is not None:
            stop.check()
        batch = pipeline.plain(batch)
        images = batch.images.contiguous(memory_format=compute.memory_format)
        with compute.autocast():
            outputs = model(images)
        outputs = outputs.float()
        loss_sum, count = task.loss(outputs, batch.truth, plain=True)
        meter.update(outputs, batch.truth, loss_sum, count)
        if look is not None:
            look(batch, outputs)
    model.train(was_training)
    return meter
