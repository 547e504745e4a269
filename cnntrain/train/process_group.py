"""The world of several ranks, implemented with torch.distributed: NCCL between GPUs, gloo between CPUs."""

import contextlib
import datetime
import gc
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket, PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from cnntrain.errors import CnntrainError, MachineError, PeerFailedError, StoppedError, explain_machine
from cnntrain.train.device import select_gpu
from cnntrain.train.distributed import RankInfo, World, describe_lost, running_statistics
from cnntrain.train.signals import StopFlag

JOIN_TIMEOUT_S = 300  # for all ranks to start
# The watchdog enforces launch.timeout_s. torch's timeouts would count the time in which all ranks were suspended.
TORCH_TIMEOUT = datetime.timedelta(days=30)
POLL_S = 0.02
HEARTBEAT_INTERVAL_S = 0.5  # between two heartbeats
HEARTBEAT_TIMEOUT_S = 15.0  # without a heartbeat, a rank counts as lost
EXIT_GRACE_S = 10.0  # for the main thread to end by itself after another rank has failed


class Watchdog:
    """A thread in each rank that ends the process if another rank failed, stalled or disappeared.

    The main thread can be stuck in a collective that never finishes, so it cannot notice this itself. torch's own
    timeouts count the time in which all ranks were suspended (Ctrl-Z, SIGSTOP, Slurm's suspend) and would end such a
    run when it is continued. This thread counts only the time in which it runs.

    Args:
        connect: opens a connection to the store, for heartbeats and for the first failure.
        timeout_s: longest time between `begin` and `done`.
        end: ends the process immediately, with an exit code and a message (None if another rank prints one).

    Attributes:
        failed: exit code of the rank that failed first; None while there is none.
    """

    def __init__(
        self, connect: Callable[[], Any], rank: int, size: int, timeout_s: float, end: Callable[[int, str | None], None]
    ) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self.failed: int | None = None
        self._connect, self._exit = connect, end
        self._store = connect()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._now_s, self._ticked_at = 0.0, time.monotonic()  # `_now_s`: time without suspensions
        self._waits_since_s: float | None = None
        self._predecessor = (rank - 1) % size
        self._beat, self._beat_at_s = -1, 0.0  # of the predecessor

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=5)

    def begin(self) -> None:
        """Start the time limit of a collective, unless it has started already."""
        if self._waits_since_s is None:
            self._waits_since_s = self._now_s

    def done(self) -> None:
        """End the time limit of the collective."""
        self._waits_since_s = None

    def claim_failure(self, code: int) -> bool:
        """Announce that this rank fails with exit code `code`; False if another rank was first."""
        try:
            first = self._store.compare_set("failure", "", f"{self.rank} {code}")
        except RuntimeError:  # the host of the store has ended, and nobody can know who was first
            return True
        rank, self.failed = map(int, first.split())
        return rank == self.rank

    def wait_for_failure(self, seconds: float) -> int | None:
        """Wait until the exit code of the rank that failed first is known; None if it is not within `seconds`."""
        deadline = time.monotonic() + seconds
        while self.failed is None and time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):
                self._read_failure()
            time.sleep(POLL_S)
        return self.failed

    def _read_failure(self) -> None:
        if self.failed is None and self._store.check(["failure"]):
            self.failed = int(self._store.get("failure").split()[1])

    def _run(self) -> None:
        while not self._closed.wait(HEARTBEAT_INTERVAL_S):
            self._tick()

    def _tick(self) -> None:
        now = time.monotonic()
        self._now_s += min(now - self._ticked_at, 2 * HEARTBEAT_INTERVAL_S)
        self._ticked_at = now
        try:
            self._store.add(f"beat/{self.rank}", 1)
            beat = self._store.add(f"beat/{self._predecessor}", 0)
            self._read_failure()
        except RuntimeError:
            # A suspension can outlast the request's timeout. Otherwise the host of the store closed the connection.
            if time.monotonic() - now > 2 * HEARTBEAT_INTERVAL_S:
                with contextlib.suppress(RuntimeError):
                    self._store = self._connect()
                    return
            message = "rank 0 or the launcher has ended" if self.rank == 1 else None
            self._exit_unless_closed(MachineError.exit_code, message)
            return
        if beat != self._beat:
            self._beat, self._beat_at_s = beat, self._now_s
        if self.failed is not None:
            self._exit_unless_closed(self.failed, None)
        elif self._waits_since_s is not None and self._now_s - self._waits_since_s > self.timeout_s:
            self._fail(
                f"a collective operation did not finish within launch.timeout_s={self.timeout_s:g}: another rank is "
                "stuck, or the ranks disagree about what to compute"
            )
        elif self._now_s - self._beat_at_s > HEARTBEAT_TIMEOUT_S:
            self._fail(describe_lost(self._predecessor, self.size))

    def _exit_unless_closed(self, code: int, message: str | None) -> None:
        """End the process, unless the main thread ends by itself within a few seconds."""
        if not self._closed.wait(EXIT_GRACE_S):
            self._exit(code, message)

    def _fail(self, message: str) -> None:
        first = self.claim_failure(MachineError.exit_code)
        code = MachineError.exit_code if first or self.failed is None else self.failed
        self._exit(code, message if first else None)


def end_process(code: int, message: str | None) -> None:
    """Print `message` and end the process, from any thread."""
    if message is not None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)


class ProcessGroup(World):
    """One of several ranks."""

    def __init__(self, info: RankInfo, store: Any, watchdog: Watchdog, stop: StopFlag) -> None:
        super().__init__(info.rank, info.world_size, info.local_rank, info.local_world_size, stop)
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
    def sync_step(self, model: nn.Module, sums: Tensor, nonfinite: Tensor) -> None:
        requests = torch.tensor(self.stop.requests, dtype=torch.float32, device=sums.device)
        statistics = running_statistics(model)
        for value in statistics:
            value /= self.size
        self.all_reduce_([sums, nonfinite, requests, *statistics])
        if sums.device.type != "cuda":
            self.stop.agree(requests)
            return
        # Read the requests one step later, so that the host does not wait for the GPU's current step.
        previous, copied = self._requests, torch.cuda.Event()
        self._requests = requests.to("cpu", non_blocking=True), copied
        copied.record()
        if previous is not None:
            with self._time_limit():
                previous[1].synchronize()
            self.stop.agree(previous[0])

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
        self.poll(lambda: self.store.check([key]))
        return json.loads(self.store.get(key))

    def barrier(self) -> None:
        key = f"barrier/{next(self._numbers)}"
        self.store.add(key, 1)
        self.poll(lambda: self.store.add(key, 0) == self.size)

    def poll(self, is_done: Callable[[], bool]) -> None:
        """Wait without a time limit: rank 0 may be downloading data or drawing figures."""
        while not is_done():
            if self.watchdog.failed is not None:
                raise PeerFailedError(self.watchdog.failed)
            time.sleep(POLL_S)

    def defer_to_failed_rank(self, found: bool) -> None:
        if not found and (code := self.watchdog.wait_for_failure(60)) is not None:
            raise PeerFailedError(code)

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
                return PeerFailedError(code)
            error = MachineError(f"{describe_lost(None, self.size)} ({str(error).splitlines()[0]})")
        elif isinstance(error, OSError | RuntimeError | MemoryError) and (cause := explain_machine(error)):
            error = MachineError(cause)
        code = error.exit_code if isinstance(error, CnntrainError) else 1
        if isinstance(error, PeerFailedError) or self.watchdog.claim_failure(code):
            return error
        if isinstance(error, StoppedError) and self.is_main:
            return error
        return PeerFailedError(self.watchdog.failed or code)


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


def _wait_for_start(store: Any, size: int) -> None:
    """Wait until all ranks have started. `store.wait` would delay Ctrl-C until its timeout."""
    names, deadline = [f"started/{rank}" for rank in range(size)], time.monotonic() + JOIN_TIMEOUT_S
    while not store.check(names):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all of them started within {JOIN_TIMEOUT_S} s")
        time.sleep(POLL_S)


@contextlib.contextmanager
def join_process_group(
    info: RankInfo,
    cuda: bool,
    timeout_s: float = 1800,
    launched: bool = False,
    end: Callable[[int, str | None], None] = end_process,
) -> Iterator[World]:
    """Join the process group inside the context; wait for all ranks at the end.

    Args:
        cuda: send tensors on GPUs too.
        timeout_s: time limit of a collective operation.
        launched: `cnntrain.train.launch` started the ranks and holds the store.
        end: see `Watchdog`.

    Raises:
        MachineError: the other ranks did not start, or one of them was lost.
        PeerFailedError: another rank failed and reported the error.
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
        store.set(f"started/{info.rank}", "")
        # Here, because init_process_group would wait for as long as for a collective.
        _wait_for_start(store, info.world_size)
        store.set_timeout(TORCH_TIMEOUT)
        ranks = {"store": store, "rank": info.rank, "world_size": info.world_size, "timeout": TORCH_TIMEOUT}
        backend, gpu = ("cpu:gloo,cuda:nccl", select_gpu(info.local_rank)) if cuda else ("gloo", None)
        dist.init_process_group(backend, device_id=gpu, **ranks)
        connect_watchdog = partial(connect, "watchdog", datetime.timedelta(seconds=10))
        watchdog = Watchdog(connect_watchdog, info.rank, info.world_size, timeout_s, end)
    except (RuntimeError, ValueError) as error:
        raise MachineError(
            f"launch: the {info.world_size} processes could not connect at {info.address}:{info.port} "
            f"({str(error).splitlines()[0]})"
        ) from error
    group = ProcessGroup(info, store, watchdog, StopFlag(second_interrupt_kills=not launched, shared=True))
    watchdog.start()
    try:
        yield group
        group.barrier()
        if is_host:  # ends last, because the others still read from its store
            group.poll(lambda: store.add("left", 0) == info.world_size - 1)
        else:
            store.add("left", 1)
    except BaseException as error:
        final = group.explain(error)
        if final is error:
            raise
        raise final from (None if isinstance(final, PeerFailedError) else error)
    finally:
        watchdog.close()
    dist.destroy_process_group()
