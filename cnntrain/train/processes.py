"""Whether several processes can train as the settings ask, before any of them begins."""

import torch

from cnntrain.config.schema import Settings
from cnntrain.errors import UserError
from cnntrain.train.distributed import RankInfo


def uses_gpus(device: str) -> bool:
    """Whether `device`, as in the settings, comes to CUDA here."""
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def check_processes(settings: Settings, place: RankInfo | None) -> None:
    """Refuse what several processes can't do.

    Args:
        place: this process among those that torchrun or srun started; None where `launch.devices` are to be started.

    Raises:
        UserError: names the key, and what would be right.
    """
    count, here = (place.count, place.local_count) if place else (settings.launch.devices,) * 2
    if place and settings.launch.devices not in (1, count):
        raise UserError(
            f"launch.devices: {settings.launch.devices}, but torchrun or srun started {count} processes; leave it out"
        )
    if settings.batch_size == "auto":
        raise UserError(
            f"batch_size: auto tries one process; give the number of images of all {count} together"
        )
    if settings.batch_size < count:
        raise UserError(
            f"launch.devices: {count} processes can't share batches of {settings.batch_size}; raise batch_size"
        )
    if settings.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"device: {count} processes take a GPU each; device=cuda or device=cpu, not {settings.device}"
        )
    if settings.device == "auto" and torch.backends.mps.is_available():
        raise UserError("device: several processes can't share Apple's GPU; launch.devices=1 or device=cpu")
    there = torch.cuda.device_count()
    bound = place is not None and place.own_gpu and there == 1  # each task sees the one that is its own
    if uses_gpus(settings.device) and here > there and not bound:
        raise UserError(
            f"launch.devices: {here} processes, and {there} GPUs; take {there} or fewer, or device=cpu"
        )
