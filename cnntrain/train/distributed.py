"""The processes that train together, as one of them sees it; and where it reads that there are others.

Nothing here imports torch.distributed: a training in one process has `ALONE`, for which everything is the identity.
`cnntrain.train.group` holds the several.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from cnntrain.augment.pipeline import Pipeline
from cnntrain.data.share import BatchShard
from cnntrain.errors import UserError
from cnntrain.tasks.meter import Meter
from cnntrain.train.signals import StopFlag


@dataclass(frozen=True)
class RankInfo:
    """Which of how many processes this one is, in all and on its machine; where they meet."""

    rank: int
    count: int
    local_rank: int
    local_count: int
    address: str = "127.0.0.1"
    port: int = 0
    own_gpu: bool = False  # Slurm gave each task a GPU, the only one that it sees


def rank_from_env(environment: Mapping[str, str] = os.environ) -> RankInfo | None:
    """Where torchrun or Slurm's `srun` put this process; None when it is alone.

    Raises:
        UserError: the environment says half of it.
    """
    if _whole_number(environment, "WORLD_SIZE", 1) > 1:
        return _find_torchrun(environment)
    # In a batch script Slurm speaks of the tasks that there may be; only a step of srun's has them running.
    in_step = "SLURM_STEP_ID" in environment or "SLURM_SRUN_COMM_HOST" in environment
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment or not in_step else "SLURM_NTASKS"
    tasks = _whole_number(environment, name, 1)
    return _find_slurm(environment, tasks) if tasks > 1 else None


def _whole_number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Read an integer from an environment variable.

    Raises:
        UserError: the value is not an integer.
    """
    text = environment.get(name, "" if default is None else str(default))
    if not re.fullmatch(r"\s*[0-9]{1,18}\s*", text):
        raise UserError(
            f"launch: the environment variable {name} must be a whole number, got {text!r}; unset it, or launch "
            "with torchrun, srun or launch.devices=N"
        )
    return int(text)


def _find_torchrun(environment: Mapping[str, str]) -> RankInfo:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in environment]:
        raise UserError(
            f"launch: WORLD_SIZE={environment['WORLD_SIZE']}, but {', '.join(missing)} is not set; start with "
            "torchrun, srun or launch.devices=N, or unset WORLD_SIZE"
        )
    count = _whole_number(environment, "WORLD_SIZE")
    return RankInfo(
        _whole_number(environment, "RANK"), count, _whole_number(environment, "LOCAL_RANK"),
        _whole_number(environment, "LOCAL_WORLD_SIZE", count), environment["MASTER_ADDR"],
        _whole_number(environment, "MASTER_PORT"),
    )  # fmt: skip


def _find_slurm(environment: Mapping[str, str], count: int) -> RankInfo:
    if missing := [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if name not in environment]:
        raise UserError(f"launch: Slurm started {count} tasks, but {', '.join(missing)} is not set; use srun")
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ""))
    # As `4(x2),3`: of the first node. Nodes with other numbers of tasks only share their cores out less well.
    local_count = int(match[0]) if (match := re.match(r"\d+", per_node)) else count
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    job = _whole_number(environment, "SLURM_JOB_ID", 0)
    bound = "SLURM_GPUS_PER_TASK" in environment or environment.get("SLURM_GPU_BIND", "none") != "none"
    return RankInfo(
        _whole_number(environment, "SLURM_PROCID"), count, _whole_number(environment, "SLURM_LOCALID"),
        min(local_count, count),
        environment.get("MASTER_ADDR", "127.0.0.1" if local_count >= count else first_node(nodes)),
        _whole_number(environment, "MASTER_PORT", 15000 + job % 20000), own_gpu=bound,
    )  # fmt: skip


def first_node(nodes: str) -> str:
    """The first host of a list in Slurm's short form: `gpu[03-05,7],cpu1` gives `gpu03`."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    return "127.0.0.1" if match is None else match[1] + (match[2] or "")


@dataclass(eq=False)  # which other ones are is no question
class World:
    """The processes of this training: here one, which is the whole.

    Attributes:
        rank, count: which of how many; rank 0 leads: it alone writes, prints and saves.
        local_rank, local_count: the same on this machine.
        stop: the flag that stops all of them at the same step.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    stop: StopFlag = field(default_factory=StopFlag)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def seed(self) -> tuple[int, ...]:
        """What makes this process's own draws (dropout) differ from the first one's."""
        return (self.rank,) if self.rank else ()

    def share(self, pipeline: Pipeline | None = None) -> BatchShard:
        """This process's part of every batch, with what `pipeline` mixes into it; see `BatchShard`."""
        leader = self.count > 1 and pipeline is not None and pipeline.mixes_labels
        return BatchShard(self.rank, self.count, leader)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over the processes, in place; one message, and no host sync."""

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, by rank; plain types and CPU tensors."""
        return [value]

    def tell(self, value: Any) -> Any:
        """The leader's `value`."""
        return value

    def copy_weights(self, model: nn.Module) -> None:
        """Parameters and buffers become the leader's."""

    def wait(self) -> None:
        """Until all are here."""

    def accuse(self, found: bool) -> None:
        """Called with an error in hand that one of the processes caused: those that did not find its cause
        (`found`) leave the word to one that did."""


ALONE = World()


def states_of(meter: Meter, ranks: World) -> list[dict[str, Tensor]]:
    """What each process's meter holds, by rank."""
    state = meter.state()
    if ranks.count == 1:
        return [state]
    return ranks.gather({name: value.cpu() for name, value in state.items()})


def merge(meter: Meter, empty: Meter, ranks: World) -> Meter:
    """The meters of all processes as one, the same in each of them; `empty` takes what they hold."""
    if ranks.count == 1:
        return meter
    for state in states_of(meter, ranks):
        empty.merge(state)
    return empty


def pack_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The meters' states of all processes as one: that of a single process is as it is."""
    if len(states) == 1:
        return dict(states[0])
    return {f"{rank}/{name}": value for rank, state in enumerate(states) for name, value in state.items()}


def unpack_state(packed: Mapping[str, Tensor], ranks: World) -> dict[str, Tensor]:
    """This process's part of what `pack_states` made of as many."""
    if ranks.count == 1:
        return dict(packed)
    mine = f"{ranks.rank}/"
    return {name.removeprefix(mine): value for name, value in packed.items() if name.startswith(mine)}
