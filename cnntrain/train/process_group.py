"""The world of several ranks, by torch.distributed: NCCL between GPUs, gloo between CPUs."""

import contextlib
import datetime
import gc
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket, PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from cnntrain.errors import CnntrainError, ElsewhereError, MachineError, StoppedError, explain_machine
from cnntrain.train.device import own_gpu
from cnntrain.train.distributed import RankInfo, World, running_statistics
from cnntrain.train.signals import AgreedStop, StopFlag
from cnntrain.train.watchdog import Watchdog, describe_lost, end_process

JOIN_TIMEOUT_S = 300  # for all ranks to start
# The watchdog enforces launch.timeout_s. torch's timeouts would count the time in which all ranks were suspended.
TORCH_TIMEOUT = datetime.timedelta(days=30)
POLL_S = 0.02


class ProcessGroup(World):
    """One of several ranks."""

    def __init__(self, info: RankInfo, store: Any, watchdog: Watchdog, stop: AgreedStop) -> None:
        super().__init__(info.rank, info.world_size, info.local_rank, info.local_world_size)
        self.stop = self.agreed_stop = stop
        self.store, self.watchdog = store, watchdog
        self._numbers = itertools.count()  # of broadcasts and barriers
        self._replica: DistributedDataParallel | None = None
        self._trainable: list[nn.Parameter] = []
        self._requests: tuple[Tensor, torch.cuda.Event] | None = None  # of the previous step, on its way from the GPU

    def replicate(self, model: nn.Module) -> nn.Module:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self._replica is None or [*map(id, trainable)] != [*map(id, self._trainable)]:
            self._replica = None
            gc.collect()  # the old replica's hooks on the parameters
            self._trainable = trainable
            self.barrier()  # ranks may need different times to prepare
            with self._time_limit(), _without_dynamo():
                # find_unused_parameters: some ranks may not use a parameter, and buckets keep their order, so that a
                # resumed run adds gradients in the order of an unbroken one. Buffers of each rank are its own.
                self._replica = DistributedDataParallel(model, find_unused_parameters=True, **_own_buffers())
                self._replica.register_comm_hook(None, _sum_gradients)
        return self._replica

    @contextlib.contextmanager
    def gradient_sync(self, model: nn.Module, enabled: bool) -> Iterator[None]:
        assert isinstance(model, DistributedDataParallel)
        if not enabled:
            with model.no_sync():
                yield
            return
        self.watchdog.begin()  # until `sync_step`
        yield

    @torch.no_grad()
    def sync_step(self, model: nn.Module, sums: Tensor, poison: Tensor) -> None:
        requests = torch.tensor(self.agreed_stop.requests, dtype=torch.float32, device=sums.device)
        statistics = running_statistics(model)
        for value in statistics:
            value /= self.size
        self.all_reduce_([sums, poison, requests, *statistics])
        if sums.device.type != "cuda":
            self.agreed_stop.agree(requests)
            return
        # Read the requests one step later, so that the host does not wait for the GPU's current step.
        previous, copied = self._requests, torch.cuda.Event()
        self._requests = requests.to("cpu", non_blocking=True), copied
        copied.record()
        if previous is not None:
            with self._time_limit():
                previous[1].synchronize()
            self.agreed_stop.agree(previous[0])

    def check_stop(self, stop: StopFlag) -> None:
        requests = torch.tensor(self.agreed_stop.requests, dtype=torch.float32)
        self.all_reduce_([requests])
        self.agreed_stop.agree(requests)
        stop.check()

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._time_limit():
            dist.all_reduce(flat)
        pieces = flat.split([tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view(tensor.shape))

    def all_gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with self._time_limit():
            dist.all_gather_object(values, value)
        return values

    @torch.no_grad()
    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        self.barrier()
        with self._time_limit():
            for tensor in tensors:
                whole = tensor.contiguous()
                dist.broadcast(whole, src=0)
                tensor.copy_(whole)

    def broadcast(self, value: Any) -> Any:
        key = f"broadcast/{next(self._numbers)}"
        if self.is_main:
            self.store.set(key, json.dumps(value))
            return value
        self._poll(lambda: self.store.check([key]))
        return json.loads(self.store.get(key))

    def barrier(self) -> None:
        key = f"barrier/{next(self._numbers)}"
        self.store.add(key, 1)
        self._poll(lambda: self.store.add(key, 0) == self.size)

    def _poll(self, is_done: Callable[[], bool]) -> None:
        """Wait without a time limit: rank 0 may be downloading data or drawing figures."""
        while not is_done():
            if self.watchdog.failed is not None:
                raise ElsewhereError(self.watchdog.failed)
            time.sleep(POLL_S)

    def defer_to_failed_rank(self, found: bool) -> None:
        if not found and self.watchdog.wait_for_failure(60) is not None:
            raise ElsewhereError(self.watchdog.failed or 0)

    @contextlib.contextmanager
    def _time_limit(self) -> Iterator[None]:
        self.watchdog.begin()
        yield
        self.watchdog.done()

    def explain(self, error: BaseException) -> BaseException:
        """Return the exception with which this rank ends: of all ranks, the first that fails keeps its message."""
        if is_peer_loss(error):
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun would end this process before it can explain
            # A rank that fails by itself announces it before it closes its connections.
            if (code := self.watchdog.wait_for_failure(2)) is not None:
                return ElsewhereError(code)
            error = MachineError(f"{describe_lost(None, self.size)} ({str(error).splitlines()[0]})")
        elif isinstance(error, OSError | RuntimeError | MemoryError) and (cause := explain_machine(error)):
            error = MachineError(cause)
        code = error.exit_code if isinstance(error, CnntrainError) else 1
        if isinstance(error, ElsewhereError) or self.watchdog.claim_failure(code):
            return error
        if isinstance(error, StoppedError) and self.is_main:
            return error
        return ElsewhereError(self.watchdog.failed or code)


def _sum_gradients(state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: sum where DDP would average, because ranks have different numbers of images."""
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _own_buffers() -> dict[str, Any]:
    """Return DDP's argument that keeps each rank's buffers; its name depends on torch's version."""
    names = DistributedDataParallel.__init__.__code__.co_varnames
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


@contextlib.contextmanager
def _without_dynamo() -> Iterator[None]:
    """Keep DDP's constructor from importing torch's compiler, which takes seconds, to read a setting that is unset."""
    if "torch._dynamo" in sys.modules:
        yield
        return
    utils = SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer")
    with mock.patch.dict(vars(torch), {"_dynamo": SimpleNamespace(utils=utils)}):
        yield


def is_peer_loss(error: BaseException) -> bool:
    """Return True if torch reports that another rank does not answer."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer"))
    )


@contextlib.contextmanager
def join_process_group(
    info: RankInfo,
    cuda: bool,
    timeout_s: float = 1800,
    launched: bool = False,
    end: Callable[[int, str | None], None] = end_process,
) -> Iterator[World]:
    """Be one of several ranks inside the context; no rank leaves before all are done.

    Args:
        cuda: send tensors on GPUs too.
        timeout_s: time limit of a collective operation.
        launched: `cnntrain.train.launch` started the ranks and holds the store.
        end: see `Watchdog`.

    Raises:
        MachineError: the other ranks did not start, or one of them was lost.
        ElsewhereError: another rank failed and reported the error.
    """
    if launched or info.address in ("127.0.0.1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks of one machine need not be reachable from outside
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")  # it would end ranks that were suspended together
    prefix = f"cnntrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    is_host = info.rank == 0 and not launched and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def connect(name: str, timeout: datetime.timedelta, is_host: bool = False) -> PrefixStore:
        store = TCPStore(info.address, info.port, None, is_host, timeout, wait_for_workers=False)
        return PrefixStore(f"{prefix}/{name}", store)

    try:
        store = connect("group", datetime.timedelta(seconds=JOIN_TIMEOUT_S), is_host)
        _await_ranks(store, info.world_size)
        store.set_timeout(TORCH_TIMEOUT)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=info.rank, world_size=info.world_size,
            timeout=TORCH_TIMEOUT, device_id=own_gpu(info.local_rank) if cuda else None,
        )  # fmt: skip
        watchdog = Watchdog(
            lambda: connect("watchdog", datetime.timedelta(seconds=10)),
            info.rank,
            info.world_size,
            timeout_s,
            end,
        )
    except (RuntimeError, ValueError) as error:
        raise MachineError(
            f"launch: the {info.world_size} processes could not connect at {info.address}:{info.port} "
            f"({str(error).splitlines()[0]})"
        ) from error
    group = ProcessGroup(info, store, watchdog, AgreedStop(second_interrupt_kills=not launched))
    watchdog.start()
    try:
        yield group
        group.barrier()
    except BaseException as error:
        final = group.explain(error)
        if final is error:
            raise
        raise final from (None if isinstance(final, ElsewhereError) else error)
    finally:
        watchdog.close()
    dist.destroy_process_group()


def _await_ranks(store: PrefixStore, size: int) -> None:
    """Wait until all ranks have started: torch would wait as long as for a collective."""
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    store.add("started", 1)
    while (started := store.add("started", 0)) < size:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{started} of {size} started within {JOIN_TIMEOUT_S} s")
        time.sleep(POLL_S)
