"""Several processes that train together, by torch.distributed: nccl between GPUs, gloo between CPUs."""

import contextlib
import datetime
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from cnntrain.errors import CnntrainError, ElsewhereError, MachineError, StoppedError, explain_machine
from cnntrain.train.device import own_gpu
from cnntrain.train.distributed import RankInfo, World
from cnntrain.train.watch import Watch, connect, end_process, lost

MEET_S = 300  # for all processes to come together
# A dead process is noticed by the watch, so no transfer is given up because one process is busy by itself.
PATIENCE = datetime.timedelta(days=7)


class Group(World):
    """This process among the others."""

    def __init__(self, place: RankInfo, watch: Watch, launched: bool) -> None:
        super().__init__(place.rank, place.count, place.local_rank, place.local_count, watch.flag)
        self.watch, self.launched = watch, launched

    def add(self, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        pieces = flat.split([tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view(tensor.shape))

    def gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def tell(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def copy_weights(self, model: nn.Module) -> None:
        with torch.no_grad():
            for value in model.state_dict().values():
                whole = value.contiguous()
                dist.broadcast(whole, src=0)
                value.copy_(whole)

    def wait(self) -> None:
        self.gather(None)

    def accuse(self, found: bool) -> None:
        if not found and self.watch.await_failure(60) is not None:
            raise ElsewhereError(self.watch.failed or 0)

    def explain(self, error: BaseException) -> BaseException:
        """What this process ends with, so that one message and one exit code come of an error of any of them."""
        if is_lost(error):
            if not self.launched:
                with contextlib.suppress(ValueError):  # not in the main thread
                    # torchrun would not let it say what happened.
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
            # Told by our own launcher to go: it knows who died, and says it.
            code = self.watch.await_failure(5, lambda: self.launched and self.stop.number is not None)
            if code is None and self.launched and self.stop.number is not None:
                code = MachineError.exit_code
            if code is not None:
                return ElsewhereError(code)
            error = MachineError(f"{lost(None, self.count)} ({str(error).splitlines()[0]})")
        elif isinstance(error, OSError | RuntimeError | MemoryError) and (cause := explain_machine(error)):
            error = MachineError(cause)
        code = error.exit_code if isinstance(error, CnntrainError) else 1
        if isinstance(error, ElsewhereError) or self.watch.fail(code):
            return error
        return (
            error
            if isinstance(error, StoppedError) and self.leads
            else ElsewhereError(self.watch.failed or code)
        )


def is_lost(error: BaseException) -> bool:
    """Whether torch says that another process no longer answers."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(word in text for word in ("gloo", "NCCL", "Connection closed by peer"))
    )


def _meet(store: Any, count: int) -> None:
    """Until all have come; torch itself would wait for as long as it waits in a transfer."""
    store.add("here", 1)
    ends = time.monotonic() + MEET_S
    while (here := store.add("here", 0)) < count:
        if time.monotonic() > ends:
            raise RuntimeError(f"after {MEET_S} s {here} of {count} had come")
        time.sleep(0.05)


@contextlib.contextmanager
def joined(
    place: RankInfo, cuda: bool, launched: bool = False, end: Callable[[int, str | None], None] = end_process
) -> Iterator[World]:
    """This process in its group while the block runs; none leaves before all are done.

    Args:
        cuda: tensors on GPUs are sent too, each process's from the GPU that its local rank names.
        launched: by this program, which tells its user itself when a process is killed.
        end: see `Watch`.

    Raises:
        MachineError: the others did not come, or one of them was lost.
        ElsewhereError: another process failed, and has said why.
    """
    if launched or place.address in ("127.0.0.1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing needs to reach us from outside
    prefix = f"cnntrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        keeper = place.rank == 0 and not launched and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = TCPStore(
            place.address, place.port, place.count, keeper, datetime.timedelta(seconds=MEET_S),
            wait_for_workers=False,
        )  # fmt: skip
        _meet(PrefixStore(f"{prefix}/group", store), place.count)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=PrefixStore(f"{prefix}/group", store),
            rank=place.rank, world_size=place.count, timeout=PATIENCE,
            device_id=own_gpu(place.local_rank) if cuda else None,
        )  # fmt: skip
        watch = Watch(connect(place.address, place.port, f"{prefix}/watch"), place.rank, place.count, end)
    except (RuntimeError, ValueError) as error:
        raise MachineError(
            f"launch: the {place.count} processes could not meet at {place.address}:{place.port} "
            f"({str(error).splitlines()[0]})"
        ) from error
    group = Group(place, watch, launched)
    watch.start()
    try:
        yield group
        group.wait()
    except BaseException as error:
        ends_with = group.explain(error)
        if ends_with is error:
            raise
        raise ends_with from (None if isinstance(ends_with, ElsewhereError) else error)
    finally:
        watch.close()
    dist.destroy_process_group()
