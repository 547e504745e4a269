"""What processes that train together exchange at an optimizer step: one sum."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from cnntrain.models.modify import keep_in_eval, stays_in_eval
from cnntrain.train.distributed import World
from cnntrain.train.nonfinite import NonFiniteGuard
from cnntrain.train.state import TrainState

log = logging.getLogger("cnntrain")


@torch.no_grad()
def combine(state: TrainState, sums: Tensor, had_images: bool, finite: NonFiniteGuard, ranks: World) -> None:
    """Gradients, and what belongs to them, become those of all processes together.

    One flat message of sums: every gradient, and whether it is there; the batches' losses, and what counted in them;
    whether something was not finite; BatchNorm's running statistics where each process has its own. Gradients are of
    sums of losses, and are divided afterwards by the global count, so a process with fewer keypoints or more ignored
    pixels weighs exactly what it should. torch's DistributedDataParallel averages gradients instead: a mean of means;
    it reduces at every backward unless told otherwise, knows nothing of counts, and renames the weights. Its one
    advantage, sending while backward still computes, is small for networks of the size that one GPU trains.

    fp16's gradients are summed while they are still scaled, by the same number in all processes: what overflows does so
    in all, and they skip the same steps.

    Args:
        sums: (2,) loss and count of this step's batches; becomes global.
        had_images: whether this process had a share of the step. Without one it takes part with zeros, and takes the
            others' gradients. (With one it knows which parameters have gradients; a network that uses some of them
            for some images only would have to tell.)
        finite: updated with the flags of all processes: a non-finite value in one process counts for all.
    """
    parameters = [p for group in state.optimizer.param_groups for p in group["params"] if p.requires_grad]
    mine = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    there = on_device(tuple(p.grad is not None for p in parameters), sums.device).clone()
    averaged = running_statistics(state.model)
    for value in averaged:
        value /= ranks.count
    ranks.add([*mine, there, sums, finite.poison, *averaged])
    if not had_images:  # once an epoch at most, so this process may wait for its device
        for parameter, gradient, count in zip(parameters, mine, there.tolist(), strict=True):
            # The optimizer leaves alone what has no gradient, in all processes alike.
            parameter.grad = gradient if count else None


@lru_cache(maxsize=8)
def on_device(flags: tuple[bool, ...], device: torch.device) -> Tensor:
    """Flags as float32; kept, for bringing them to a GPU waits for it."""
    return torch.tensor(flags, dtype=torch.float32, device=device)


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Running means and variances that a training step has changed, each process's from its own share.

    Their mean over the processes is what validation uses and a checkpoint holds. With SyncBatchNorm they are the same
    in all processes already.
    """
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training)
    found = (
        value
        for norm in norms
        if not isinstance(norm, nn.SyncBatchNorm)
        for value in (norm.running_mean, norm.running_var)
    )
    return [value for value in found if value is not None]


def align(model: nn.Module, ranks: World) -> None:
    """Warn where the processes' weights are no longer the same bits, and take the leader's.

    They stay the same as long as all compute alike: not on GPUs of different kinds, nor with a network that goes
    different ways for different images. Waits for the device.
    """
    if ranks.count == 1:
        return
    sums = ranks.gather(torch.stack([p.detach().double().sum() for p in model.parameters()]).tolist())
    if any(each != sums[0] for each in sums):
        log.warning("the processes' weights have drifted apart in this epoch; the first one's are taken")
        ranks.copy_weights(model)


def synchronize_norms(model: nn.Module) -> nn.Module:
    """Replace BatchNorm by SyncBatchNorm; parameters, buffers, their names and frozen layers are preserved.

    PyTorch's layers become PyTorch's SyncBatchNorm. timm's layers, which include an activation, become timm's
    SyncBatchNorm. Other subclasses of BatchNorm may compute more than a norm, so they are not replaced: each process
    normalizes with its own images, and a warning names these layers.
    """
    left: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or isinstance(module, nn.SyncBatchNorm):
            continue
        convert = _converter(module)
        if convert is None:
            left[name] = type(module).__name__
            continue
        new = convert(module)
        if stays_in_eval(module):
            keep_in_eval(new)
        if not name:
            return new
        model.set_submodule(name, new)
    if left:
        log.warning(
            "BatchNorm is not synchronized in %d layers of class %s (first: %s); each process uses its own images",
            len(left), ", ".join(sorted(set(left.values()))), next(iter(left)),
        )  # fmt: skip
    return model


def _converter(norm: nn.Module) -> Callable[[nn.Module], nn.Module] | None:
    """Return a function that converts `norm` to an equivalent SyncBatchNorm; None if there is none."""
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return nn.SyncBatchNorm.convert_sync_batchnorm
    layers = sys.modules.get("timm.layers")  # loaded if the network is from timm
    if layers is not None and type(norm) is layers.BatchNormAct2d:
        return layers.convert_sync_batchnorm
    return None


def has_synchronized_norms(model: nn.Module) -> bool:
    return any(isinstance(module, nn.SyncBatchNorm) and module.training for module in model.modules())


def accompany(model: nn.Module, images: Tensor) -> None:
    """Forward and backward without an image, for the sake of the others' SyncBatchNorm.

    Args:
        images: (0, C, H, W), float.
    """
    (model(images).float().sum() * 0).backward()
