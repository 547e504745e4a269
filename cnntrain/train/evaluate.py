"""Running a model over a split: exact metrics, nothing random, nothing learned."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cnntrain.augment.pipeline import Pipeline
from cnntrain.data.loader import Loader
from cnntrain.tasks.task import Meter, Task
from cnntrain.train.device import Compute
from cnntrain.train.distributed import merge
from cnntrain.train.signals import StopFlag
from cnntrain.types import Batch


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
    """Metrics of `model` over all examples of `loader`, in their own order; of several processes each judges its share
    of every batch, and all get the metrics of the whole.

    Args:
        limit_batches: judge no more than these, spread evenly: files often lie sorted by class.
        look: shown every batch of this process's (normalized images) with its outputs, (N, ...) float32.
    """
    was_training = model.training
    model.eval()
    meter = task.meter()
    count = len(loader) if limit_batches is None else min(len(loader), limit_batches * batch_size)
    order = torch.linspace(0, len(loader) - 1, count, dtype=torch.float64).round().long()
    for batch in loader.batches(order, batch_size, share=compute.ranks.share()):
        if stop is not None:
            stop.check()
        if not len(batch):
            continue
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
    return merge(meter, task.meter(), compute.ranks)
