"""Data-parallel training in several processes ("ranks"): what one rank sees of the others.

`SINGLE` is a world of one process, in which every operation is the identity. `cnntrain.train.process_group` has the
world of several ranks, which uses torch.distributed and DistributedDataParallel (DDP).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cnntrain.augment.pipeline import Pipeline
from cnntrain.data.loader import BatchShard
from cnntrain.errors import UserError
from cnntrain.models.modify import keep_in_eval, stays_in_eval
from cnntrain.tasks.meter import Meter
from cnntrain.train.signals import StopFlag

if TYPE_CHECKING:
    from cnntrain.config.schema import Settings
    from cnntrain.train.state import TrainState

log = logging.getLogger("cnntrain")


@dataclass(frozen=True)
class RankInfo:
    """Rank of this process, global and local, and the rendezvous address."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str = "127.0.0.1"
    port: int = 0
    has_own_gpu: bool = False  # Slurm gave each task one GPU, and the task sees no other


def rank_from_env(environment: Mapping[str, str] = os.environ) -> RankInfo | None:
    """Read the rank that torchrun or Slurm's `srun` gave to this process; None for a single process."""

    def text(name: str) -> str:
        if name not in environment:
            raise UserError(
                f"launch: the environment gives the number of processes, but {name} is not set; start with torchrun, "
                "srun or launch.devices=N, or unset WORLD_SIZE"
            )
        return environment[name]

    def number(name: str, default: int | None = None) -> int:
        value = text(name) if default is None else environment.get(name, str(default))
        if not re.fullmatch(r"\s*[0-9]{1,18}\s*", value):
            raise UserError(
                f"launch: the environment variable {name} must be a whole number, got {value!r}; unset it, or launch "
                "with torchrun, srun or launch.devices=N"
            )
        return int(value)

    if (size := number("WORLD_SIZE", 1)) > 1:
        local_rank, local_size = number("LOCAL_RANK"), number("LOCAL_WORLD_SIZE", size)
        return RankInfo(number("RANK"), size, local_rank, local_size, text("MASTER_ADDR"), number("MASTER_PORT"))
    # In a batch script, SLURM_NTASKS is the number of tasks that srun may start; the script itself is not one of them.
    in_step = "SLURM_STEP_ID" in environment or "SLURM_SRUN_COMM_HOST" in environment
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment or not in_step else "SLURM_NTASKS"
    if (size := number(name, 1)) == 1:
        return None
    # As `4(x2),3`: of the first node. On nodes with other numbers of tasks, the CPU threads are divided less evenly.
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ""))
    local_size = min(size, int(match[0]) if (match := re.match(r"\d+", per_node)) else size)
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    address = environment.get("MASTER_ADDR", "127.0.0.1" if local_size == size else first_node(nodes))
    port = number("MASTER_PORT", 15000 + number("SLURM_JOB_ID", 0) % 20000)
    bound = "SLURM_GPUS_PER_TASK" in environment or environment.get("SLURM_GPU_BIND", "none") != "none"
    return RankInfo(number("SLURM_PROCID"), size, number("SLURM_LOCALID"), local_size, address, port, bound)


def first_node(nodes: str) -> str:
    """Return the first host of a list in Slurm's short form: `gpu[03-05,7],cpu1` gives `gpu03`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    return "127.0.0.1" if match is None else match[1] + (match[2] or "")


def describe_lost(rank: int | None, count: int, cause: str = "killed or cut off (out of memory?)") -> str:
    """Return the message for a rank that ended without a message of its own."""
    who = "one of the processes" if rank is None else f"process {rank + 1} of {count}"
    return (
        f"{who} was {cause}; the last checkpoint is complete: run the same command with run_dir=FOLDER resume=auto to "
        "continue"
    )


def uses_gpus(device: str) -> bool:
    """Return True if the setting `device` selects CUDA on this machine."""
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def check_launch(settings: Settings, info: RankInfo | None) -> None:
    """Refuse settings with which several processes cannot train.

    Args:
        info: this process if torchrun or srun started it; None if `launch.devices` processes will be started.
    """
    count, local_count = (info.world_size, info.local_world_size) if info else (settings.launch.devices,) * 2
    gpus = torch.cuda.device_count()
    if info and settings.launch.devices not in (1, count):
        raise UserError(
            f"launch.devices: {settings.launch.devices}, but torchrun or srun started {count} processes; leave it out"
        )
    if settings.batch_size == "auto":
        raise UserError(f"batch_size: auto needs a single process; give the total number of images for {count}")
    if settings.batch_size < count:
        raise UserError(
            f"launch.devices: {count} processes cannot share a batch of {settings.batch_size}; raise batch_size"
        )
    if settings.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: {count} processes use one GPU each; device=cuda or device=cpu, not {settings.device}")
    if settings.device == "auto" and torch.backends.mps.is_available():
        raise UserError("device: several processes cannot share Apple's GPU; launch.devices=1 or device=cpu")
    if uses_gpus(settings.device) and local_count > gpus and not (info and info.has_own_gpu and gpus == 1):
        raise UserError(f"launch.devices: {local_count} processes, but {gpus} GPUs; use {gpus} or fewer, or device=cpu")


@dataclass(eq=False)
class World:
    """The processes of a training run; this base class is a single process.

    Attributes:
        rank, size: number of this process, and number of processes; rank 0 alone logs and writes the run folder.
        local_rank, local_size: the same on this machine.
        stop: the flag that stops all ranks at the same step.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    stop: StopFlag = field(default_factory=StopFlag)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def seed(self) -> tuple[int, ...]:
        """Parts of the seed for random draws that must differ between ranks (dropout)."""
        return (self.rank,) if self.rank else ()

    def shard(self, pipeline: Pipeline | None = None) -> BatchShard:
        """Return this rank's part of every batch, with the predecessor if `pipeline` mixes neighboring images."""
        mixes = self.size > 1 and pipeline is not None and pipeline.mixes_labels
        return BatchShard(self.rank, self.size, with_predecessor=mixes)

    def replicate(self, model: nn.Module) -> nn.Module:
        """Return the module to call in training: DDP around `model` if there are several ranks."""
        return model

    def gradient_sync(self, model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[None]:
        """Sum gradients over ranks in the backward pass inside this context if `enabled`, else only accumulate them.

        Args:
            model: what `replicate` returned.
        """
        return contextlib.nullcontext()

    def sync_step(self, model: nn.Module, sums: Tensor, nonfinite: Tensor) -> None:
        """Sum `sums` and `nonfinite` over ranks, average BatchNorm's running statistics, and exchange stop requests."""

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over ranks, in one message; no host sync."""

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's `value`, ordered by rank; plain types and CPU tensors."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` (plain types), however long rank 0 takes to provide it."""
        return value

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by rank 0's, in place."""

    def barrier(self) -> None:
        """Wait until all ranks are here, however long that takes."""

    def defer_to_failed_rank(self, found: bool) -> None:
        """Call before raising an error caused by some rank. Ranks that did not find the cause defer to one that did."""


SINGLE = World()


def gather_states(meter: Meter, world: World) -> dict[str, Tensor]:
    """Return the state of every rank's meter, named `RANK/NAME`; a single process keeps its names."""
    if world.size == 1:
        return meter.state()
    own = {f"{world.rank}/{name}": value.cpu() for name, value in meter.state().items()}
    return {name: value for states in world.all_gather(own) for name, value in states.items()}


def rank_state(states: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """Return the state of one rank's meter from the result of `gather_states`."""
    prefix = f"{rank}/" if size > 1 else ""
    return {name.removeprefix(prefix): value for name, value in states.items() if name.startswith(prefix)}


def merge_meters(meter: Meter, empty: Meter, world: World) -> Meter:
    """Return one meter with the sums of all ranks, equal in each of them; `empty` receives the sums."""
    if world.size == 1:
        return meter
    states = gather_states(meter, world)
    for rank in range(world.size):
        empty.merge(rank_state(states, rank, world.size))
    return empty


def check_replicas_equal(state: TrainState, world: World) -> bool:
    """Compare weights, moving average and optimizer state between ranks; if they differ, warn and use rank 0's.

    DDP gives all ranks equal gradients, so a difference means that devices of different types rounded an update
    differently, or that memory is faulty. A checkpoint has rank 0's values, so a resumed run would use them too.
    """
    if world.size == 1:
        return True
    tensors = replica_tensors(state)
    values = [torch.view_as_real(t) if t.is_complex() else t.detach() for t in tensors.values()]
    # The sum of the values' bits as integers is exact, whatever the order of the addition.
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [int(value.view(integers[value.element_size()]).sum(dtype=torch.int64)) for value in values]
    checksums = world.all_gather(sums)
    different = [name for name, *each in zip(tensors, *checksums, strict=True) if len(set(each)) > 1]
    if different:
        log.warning(
            "the ranks differ in %d of %d tensors after this epoch (first: %s); continuing with the values of rank 0",
            len(different),
            len(tensors),
            different[0],
        )
        world.broadcast_(list(tensors.values()))
    return not different


def replica_tensors(state: TrainState) -> dict[str, Tensor]:
    """Return all tensors of a training state that must be equal in all ranks: weights, moving average, moments."""
    found: dict[str, Any] = dict(state.model.state_dict())
    if state.ema:
        found |= {f"ema: {name}": value for name, value in state.ema.model.state_dict().items()}
    for number, values in enumerate(state.optimizer.state.values()):
        found |= {f"optimizer: {name} of parameter {number}": value for name, value in values.items()}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return running means and variances that a training step changes differently in each rank.

    Their mean over ranks is used in validation and saved in checkpoints. It is taken at every step, so that a resumed
    run has the bits of an unbroken one. SyncBatchNorm's are equal in all ranks already.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    own = [norm for norm in norms if not isinstance(norm, nn.SyncBatchNorm)]
    return [value for norm in own for value in (norm.running_mean, norm.running_var) if value is not None]


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Replace BatchNorm by SyncBatchNorm; parameters, buffers, their names and frozen layers are preserved.

    PyTorch's layers become PyTorch's SyncBatchNorm. timm's layers, which include an activation, become timm's
    SyncBatchNorm. Other subclasses of BatchNorm may compute more than a norm, so they are not replaced: each rank
    normalizes with its own images, and a warning names these layers.
    """
    kept: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or isinstance(module, nn.SyncBatchNorm):
            continue
        convert = _converter(module)
        if convert is None:
            kept[name] = type(module).__name__
            continue
        new = convert(module)
        if stays_in_eval(module):
            keep_in_eval(new)
        if not name:
            return new
        model.set_submodule(name, new)
    if kept:
        log.warning(
            "BatchNorm is not synchronized in %d layers of class %s (first: %s); each process uses its own images",
            len(kept),
            ", ".join(sorted(set(kept.values()))),
            next(iter(kept)),
        )
    return model


def _converter(norm: nn.Module) -> Callable[[nn.Module], nn.Module] | None:
    """Return a function that converts `norm` to an equivalent SyncBatchNorm; None if there is none."""
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return nn.SyncBatchNorm.convert_sync_batchnorm
    layers = sys.modules.get("timm.layers")  # loaded if the network is from timm
    return layers.convert_sync_batchnorm if layers and type(norm) is layers.BatchNormAct2d else None
