"""Several processes that train together: who takes what, what they sum, and how they agree to stop."""

import multiprocessing
import subprocess
import sys
import threading
import time
from itertools import product

import pytest
import torch
from torch import nn

from cnntrain import compose
from cnntrain.data.examples import Examples
from cnntrain.data.loader import make_loader
from cnntrain.data.share import BatchShard
from cnntrain.errors import MachineError, StoppedError, UserError
from cnntrain.models.modify import freeze_layers, stays_in_eval, unfreeze
from cnntrain.tasks.meter import Meter
from cnntrain.train import watch as watching
from cnntrain.train.combine import has_synchronized_norms, running_statistics, synchronize_norms
from cnntrain.train.device import own_gpu
from cnntrain.train.distributed import (
    ALONE,
    RankInfo,
    World,
    first_node,
    pack_states,
    rank_from_env,
    unpack_state,
)
from cnntrain.train.launch import _watched
from cnntrain.train.processes import check_processes
from cnntrain.train.watch import Watch, end_process

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
            "MASTER_PORT": "29500"}  # fmt: skip
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "20007",
         "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[03-05,7],cpu1"}  # fmt: skip


@pytest.mark.parametrize(("images", "count"), product((1, 3, 4, 64, 103), (1, 2, 3, 4)))
def test_shares_divide_a_batch_without_overlap_and_the_first_gets_something(images: int, count: int) -> None:
    parts = [BatchShard(rank, count).of(10, 10 + images) for rank in range(count)]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(10, 10 + images))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1 and sizes[0] == max(sizes) > 0


@pytest.mark.parametrize("cache", ["ram", "none"])
@pytest.mark.parametrize("leader", [False, True])
def test_processes_see_together_the_batches_that_one_sees(cache, leader: bool) -> None:
    """10 images in batches of 4 by 3 processes: the last batch has 2, and nothing for the third."""
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 2, 2).contiguous()
    loader = make_loader(
        Examples(images, {"label": torch.arange(10)}, [str(i) for i in range(10)]), "cpu", cache=cache
    )
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    shares = [BatchShard(rank, 3, leader) for rank in range(3)]
    whole = list(loader.batches(order, 4))
    parts = [[share.trim(batch) for batch in loader.batches(order, 4, share=share)] for share in shares]
    for number, batch in enumerate(whole):
        mine = [part[number] for part in parts]
        assert torch.equal(torch.cat([each.index for each in mine]), batch.index)
        assert torch.equal(torch.cat([each.position for each in mine]), batch.position)
        labels = torch.cat([each.targets["label"] for each in mine if len(each)])
        assert torch.equal(labels, batch.targets["label"])
    assert [len(part[-1]) for part in parts] == [1, 1, 0]
    resumed = list(loader.batches(order, 4, start_batch=2, share=shares[0]))
    assert torch.equal(shares[0].trim(resumed[0]).index, parts[0][2].index)


def test_a_leader_is_the_image_before_in_the_whole_batch() -> None:
    assert [BatchShard(rank, 3, leader=True).rows(4, 10).tolist() for rank in range(3)] == [
        [9, 4, 5], [5, 6, 7], [7, 8, 9],
    ]  # fmt: skip


def test_places_are_read_from_the_environment() -> None:
    assert rank_from_env({}) is None
    assert rank_from_env({**TORCHRUN, "WORLD_SIZE": "1"}) is None
    assert rank_from_env(TORCHRUN) == RankInfo(3, 4, 1, 2, "a", 29500)
    assert rank_from_env(SLURM) == RankInfo(5, 8, 1, 4, "gpu03", 15007)
    one_node = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8", "MASTER_PORT": "1234"}
    assert rank_from_env(one_node) == RankInfo(5, 8, 1, 8, "127.0.0.1", 1234)
    for bound in ({"SLURM_GPUS_PER_TASK": "1"}, {"SLURM_GPU_BIND": "single:1"}):
        assert rank_from_env({**SLURM, **bound}) == RankInfo(5, 8, 1, 4, "gpu03", 15007, own_gpu=True)
    batch_script = {name: value for name, value in SLURM.items() if not name.startswith("SLURM_STEP")}
    assert rank_from_env(batch_script) is None, "nobody else runs a batch script"
    with pytest.raises(UserError, match="MASTER_ADDR"):
        rank_from_env({name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"})


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-05,7],c", "gpu03"), ("a-b[7,9]", "a-b7")]
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_states_of_meters_are_packed_and_unpacked() -> None:
    states = [{"loss_sum": torch.ones(1)}, {"loss_sum": torch.zeros(1), "rows/score": torch.ones(3)}]
    packed = pack_states(states)
    assert [unpack_state(packed, World(rank, 2)) for rank in range(2)] == states
    assert unpack_state(pack_states(states[:1]), ALONE) == states[0]


class Numbers:
    """The store, within one process."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}
        self.lock = threading.Lock()

    def add(self, name: str, number: int) -> int:
        with self.lock:
            self.values[name] = self.values.get(name, 0) + number
            return self.values[name]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "PERIOD_S", 0.01)
    monkeypatch.setattr(watching, "SILENCE_S", 0.3)
    monkeypatch.setattr(watching, "LAST_WORDS_S", 0.3)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("asks", [(1,), (0, 1, 2)])
def test_all_stop_at_the_same_call_although_some_are_ahead(asks) -> None:
    store, stopped = Numbers(), {}
    watches = [Watch(store, rank, 3, end_process) for rank in range(3)]

    def train(rank: int) -> None:
        calls = 0
        try:
            while True:
                watches[rank].flag.check()
                calls += 1
                time.sleep(0.002 * (rank + 1))
        except StoppedError as error:
            stopped[rank] = calls, error.exit_code

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(3)]
    for each in (*watches, *threads):
        each.start()
    time.sleep(0.1)
    for rank in asks:
        watches[rank].flag.number = 15
    for thread in threads:
        thread.join(timeout=10)
    assert len(stopped) == 3 and len(set(stopped.values())) == 1 and stopped[0][1] == 143
    for each in watches:
        each.close()


@pytest.mark.usefixtures("quick")
def test_one_that_falls_silent_ends_the_others_and_one_speaks() -> None:
    store, ended = Numbers(), []
    watches = [
        Watch(store, r, 3, end=lambda code, message, r=r: ended.append((r, code, message))) for r in range(3)
    ]
    for each in watches:
        each.start()
    time.sleep(0.05)
    watches[1]._over.set()
    until = time.monotonic() + 10
    while {rank for rank, _, _ in ended} != {0, 2}:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert {code for _, code, _ in ended} == {4}
    said = {(rank, message) for rank, _, message in ended if message}
    assert len(said) == 1 and "process 2 of 3" in said.pop()[1]
    for each in watches:
        each.close()


@pytest.mark.usefixtures("quick")
def test_the_first_that_fails_gives_the_exit_code() -> None:
    store, ended = Numbers(), []
    watches = [
        Watch(store, rank, 2, end=lambda code, message: ended.append((code, message))) for rank in range(2)
    ]
    for each in watches:
        each.start()
    assert watches[1].fail(3)
    assert not watches[0].fail(2) and watches[0].failed == 3
    time.sleep(0.6)  # it is stuck: ended, without a word
    assert (3, None) in ended
    for each in watches:
        each.close()


class Loss(Meter):
    def _collect(self, outputs, targets) -> None:
        self._keep("score", outputs)

    def _metrics(self, values):
        return {"scores": float(values["rows/score"].sum())}


def in_group(rank: int, port: int, results) -> None:
    """What one of two processes finds; at the top of the module, for it is imported."""
    from cnntrain.errors import DivergedError
    from cnntrain.train.combine import combine
    from cnntrain.train.distributed import merge
    from cnntrain.train.group import joined
    from cnntrain.train.nonfinite import NonFiniteGuard
    from cnntrain.train.schedule import Constant
    from cnntrain.train.state import TrainState

    torch.set_num_threads(1)
    with joined(RankInfo(rank, 2, rank, 2, "127.0.0.1", port), cuda=False) as ranks:
        found = {"gathered": ranks.gather(rank), "told": ranks.tell(f"by {rank}")}
        meter = Loss()
        if rank == 0:  # the other one had no image
            meter.update(torch.tensor([1.0, 2.0]), {}, torch.tensor(3.0), torch.tensor(2.0))
        found["metrics"] = merge(meter, Loss(), ranks).compute()

        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
        model.unused = nn.Linear(2, 2)
        ranks.copy_weights(model)
        found["weights"] = model[0].weight.tolist()
        assert isinstance(model[1], nn.BatchNorm1d) and model[1].running_mean is not None
        model[1].running_mean.fill_(float(rank))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        state = TrainState(model, optimizer, Constant(total_steps=1, steps_per_epoch=1))
        finite = NonFiniteGuard(torch.device("cpu"), False, lambda batch: DivergedError(""))
        for number, had_images in enumerate((True, rank == 0)):
            optimizer.zero_grad()
            if had_images:
                for parameter in (*model[0].parameters(), *model[1].parameters()):
                    parameter.grad = torch.full_like(parameter, rank + 1.0)
            if number and rank == 0:
                finite.note(torch.tensor(float("nan")))
            sums = torch.tensor([10.0 * (rank + 1), rank + 1.0])
            combine(state, sums, had_images, finite, ranks)
            gradient = model[0].weight.grad
            assert gradient is not None
            found[f"step {number}"] = gradient.unique().tolist(), sums.tolist(), bool(finite.poison.isnan())
        found["unused"] = model.unused.weight.grad is None
        found["mean"] = model[1].running_mean.tolist()
    results.put((rank, found))


@pytest.mark.slow
def test_what_two_processes_sum_gather_and_copy() -> None:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    port = free_port()
    processes = [context.Process(target=in_group, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    found = dict(results.get() for _ in processes)
    for each in found.values():
        assert each["gathered"] == [0, 1] and each["told"] == "by 0"
        assert each["metrics"] == {"loss": 1.5, "scores": 3.0}
        assert each["weights"] == found[0]["weights"]
        assert each["step 0"] == ([3.0], [30.0, 3.0], False)
        assert each["mean"] == [0.5, 0.5]
    for each in found.values():  # what is not finite in one process is not in any
        assert each["step 1"] == ([1.0], [30.0, 3.0], True)
    assert found[0]["unused"] and found[1]["unused"]


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_one_process_starts_nothing_and_imports_nothing_for_several() -> None:
    code = """
import sys, threading
from cnntrain import compose, train
train(compose("model=mlp", "data=digits", "data.limit=60", "steps=1", "threads=1", "log.tensorboard=false",
              "log.figures=false"))
import torch.distributed as dist
print({"cnntrain.train.group", "cnntrain.train.launch", "torch.distributed.elastic"} & set(sys.modules))
print(dist.is_initialized(), [t.name for t in threading.enumerate() if t.name == "watch"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-2:] == ["set()", "False []"], done.stdout + done.stderr


def test_synchronized_norms_keep_the_names_of_a_checkpoint() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    names, parameters = list(model.state_dict()), list(model.parameters())
    assert len(running_statistics(model)) == 2 and not has_synchronized_norms(model)
    model = synchronize_norms(model)
    assert list(model.state_dict()) == names and has_synchronized_norms(model)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert running_statistics(model) == [] and not has_synchronized_norms(model.eval())


class NormThenReLU(nn.BatchNorm2d):
    """More than a norm, as timm's layers that bring an activation."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


def test_a_norm_that_computes_more_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), NormThenReLU(3), nn.Sequential(nn.BatchNorm2d(3))).eval()
    images = torch.randn(2, 1, 8, 8)
    before = model(images)
    with caplog.at_level("WARNING", "cnntrain"):
        model = synchronize_norms(model)
    torch.testing.assert_close(model(images), before)
    assert [type(model[1]), type(model[2][0])] == [NormThenReLU, nn.SyncBatchNorm]  # pyright: ignore
    assert "NormThenReLU" in caplog.text


def test_timms_norms_with_activations_are_synchronized_with_them() -> None:
    """A bare norm in their place is another network; parameters, names and what is frozen stay."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    model.head_names = ("classifier",)
    model.bn1.weight.data.uniform_(0.5, 2)
    freeze_layers(model, "backbone")
    images, names, parameters = torch.randn(2, 3, 64, 64), list(model.state_dict()), list(model.parameters())
    before = model(images)
    model = synchronize_norms(model).eval()
    torch.testing.assert_close(model(images), before)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) and stays_in_eval(norm) for norm in norms)
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))


def test_synchronized_norms_of_a_frozen_backbone_stay_frozen() -> None:
    backbone = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
    model = nn.Sequential()
    model.add_module("backbone", backbone)
    model.add_module("norm", nn.BatchNorm1d(72))
    model.add_module("fc", nn.Linear(72, 3))
    model.__dict__["head_names"] = ("fc", "norm")
    freeze_layers(model, "backbone")
    model = synchronize_norms(model).train()
    before = {name: value.clone() for name, value in model.named_buffers() if name.startswith("backbone")}
    model.backbone(torch.randn(4, 1, 8, 8))  # pyright: ignore[reportCallIssue]
    assert len(before) == 3 and all(
        value.equal(dict(model.named_buffers())[k]) for k, value in before.items()
    )
    assert model.norm.training
    unfreeze(model)
    model.train()
    model.backbone(torch.randn(4, 1, 8, 8))  # pyright: ignore[reportCallIssue]
    assert not all(value.equal(dict(model.named_buffers())[k]) for k, value in before.items())


def test_whoever_waits_for_a_watcher_gets_an_answer() -> None:
    def watch(row: dict[str, float]) -> None:
        if row["epoch"] == 1:
            raise OSError("the disk is full")
        if row["epoch"] == 2:
            raise UserError("no such thing")

    with _watched(watch) as end:
        assert end is not None
        answers = []
        for epoch in range(4):
            end.send({"epoch": epoch})
            assert end.poll(10)
            answers.append(end.recv())
    assert answers[0] is None and answers[3] is None and isinstance(answers[2], UserError)
    assert isinstance(answers[1], MachineError) and "the disk is full" in str(answers[1])


@pytest.mark.parametrize("bound", [True, False])
def test_tasks_that_see_one_gpu_each_have_their_own(monkeypatch: pytest.MonkeyPatch, bound: bool) -> None:
    """`srun --ntasks=4 --gpus-per-task=1`: each task's GPU is its number 0."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings, place = compose("device=cuda", "batch_size=32"), RankInfo(3, 4, 3, 4, own_gpu=bound)
    assert own_gpu(3) == torch.device("cuda", 0)
    if bound:
        check_processes(settings, place)
    else:
        with pytest.raises(UserError, match="4 processes, and 1 GPUs"):
            check_processes(settings, place)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert own_gpu(3) == torch.device("cuda", 3)
