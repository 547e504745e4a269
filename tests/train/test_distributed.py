"""Several processes that train together: who takes what, what they sum, and how they agree to stop."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from cnntrain import compose
from cnntrain.data.examples import Examples
from cnntrain.data.loader import BatchShard, make_loader
from cnntrain.errors import StoppedError, UserError
from cnntrain.models.modify import freeze_layers, stays_in_eval, unfreeze
from cnntrain.tasks.meter import Meter
from cnntrain.train.device import prepare_torch, select_gpu
from cnntrain.train.distributed import (
    SINGLE,
    RankInfo,
    check_launch,
    check_replicas_equal,
    convert_sync_batchnorm,
    first_node,
    gather_states,
    merge_meters,
    rank_from_env,
    rank_state,
    running_statistics,
)
from cnntrain.train.schedule import Constant
from cnntrain.train.state import TrainState

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "20007",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-05,7],cpu1",
}


@pytest.mark.parametrize(("images", "count"), product((1, 3, 4, 64, 103), (1, 2, 3, 4)))
def test_shards_partition_a_batch_and_rank_0_gets_an_image(images: int, count: int) -> None:
    parts = [BatchShard(rank, count).slice_of(10, 10 + images) for rank in range(count)]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(10, 10 + images))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1 and sizes[0] == max(sizes) > 0


@pytest.mark.parametrize("cache", ["ram", "none"])
@pytest.mark.parametrize("with_predecessor", [False, True])
def test_the_shards_of_all_ranks_make_up_the_batches_of_one_process(cache, with_predecessor: bool) -> None:
    """10 images in batches of 4 on 3 ranks: the last batch has 2 images, none of them for the third rank."""
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 2, 2).contiguous()
    loader = make_loader(Examples(images, {"label": torch.arange(10)}, [str(i) for i in range(10)]), "cpu", cache=cache)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    shards = [BatchShard(rank, 3, with_predecessor) for rank in range(3)]
    whole = list(loader.batches(order, 4))
    parts = [[shard.drop_predecessor(batch) for batch in loader.batches(order, 4, shard=shard)] for shard in shards]
    for number, batch in enumerate(whole):
        mine = [part[number] for part in parts]
        assert torch.equal(torch.cat([each.index for each in mine]), batch.index)
        assert torch.equal(torch.cat([each.position for each in mine]), batch.position)
        labels = torch.cat([each.targets["label"] for each in mine if len(each)])
        assert torch.equal(labels, batch.targets["label"])
    assert [len(part[-1]) for part in parts] == [1, 1, 0]
    resumed = list(loader.batches(order, 4, start_batch=2, shard=shards[0]))
    assert torch.equal(shards[0].drop_predecessor(resumed[0]).index, parts[0][2].index)


def test_the_predecessor_is_the_previous_image_of_the_whole_batch() -> None:
    assert [BatchShard(rank, 3, with_predecessor=True).rows(4, 10).tolist() for rank in range(3)] == [
        [9, 4, 5],
        [5, 6, 7],
        [7, 8, 9],
    ]


def test_ranks_are_read_from_the_environment() -> None:
    assert rank_from_env({}) is None
    assert rank_from_env({**TORCHRUN, "WORLD_SIZE": "1"}) is None
    assert rank_from_env(TORCHRUN) == RankInfo(3, 4, 1, 2, "a", 29500)
    assert rank_from_env(SLURM) == RankInfo(5, 8, 1, 4, "gpu03", 15007)
    one_node = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8", "MASTER_PORT": "1234"}
    assert rank_from_env(one_node) == RankInfo(5, 8, 1, 8, "127.0.0.1", 1234)
    for bound in ({"SLURM_GPUS_PER_TASK": "1"}, {"SLURM_GPU_BIND": "single:1"}):
        assert rank_from_env({**SLURM, **bound}) == RankInfo(5, 8, 1, 4, "gpu03", 15007, has_own_gpu=True)
    batch_script = {name: value for name, value in SLURM.items() if not name.startswith("SLURM_STEP")}
    assert rank_from_env(batch_script) is None, "nobody else runs a batch script"
    with pytest.raises(UserError, match="MASTER_ADDR"):
        rank_from_env({name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"})


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-05,7],c", "gpu03"), ("a-b[7,9]", "a-b7")]
)
def test_the_first_node_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_each_rank_finds_the_state_of_its_meter_in_a_checkpoint() -> None:
    states = {"0/loss_sum": torch.ones(1), "1/loss_sum": torch.zeros(1), "1/rows/score": torch.ones(3)}
    assert rank_state(states, 0, 2) == {"loss_sum": torch.ones(1)}
    assert rank_state(states, 1, 2) == {"loss_sum": torch.zeros(1), "rows/score": states["1/rows/score"]}
    meter = Loss()
    meter.update(torch.ones(2), {}, torch.tensor(3.0), torch.tensor(2.0))
    saved = gather_states(meter, SINGLE)
    assert saved.keys() == meter.state().keys() and rank_state(saved, 0, 1) == saved


class Loss(Meter):
    def collect(self, outputs, targets) -> None:
        self.append("score", outputs)

    def compute_metrics(self, values):
        return {"scores": float(values["rows/score"].sum())}


class TwoHeads(nn.Module):
    """Uses one of two layers for each batch, depending on the images, and never uses the third."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.positive, self.negative, self.unused = nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self.positive if images.mean() > 0 else self.negative)(self.norm(images))


def run_rank(rank: int, port: int, results) -> None:
    """Record the results of one of two ranks; at the top level of the module so that a new process can import it."""
    from cnntrain.train.process_group import join_process_group

    prepare_torch(1, deterministic=False)
    with join_process_group(RankInfo(rank, 2, rank, 2, "127.0.0.1", port), cuda=False) as world:
        found: dict[str, Any] = {"gathered": world.all_gather(rank), "broadcast": world.broadcast({"by": rank})}
        meter = Loss()
        if rank == 0:  # the other rank had no image
            meter.update(torch.tensor([1.0, 2.0]), {}, torch.tensor(3.0), torch.tensor(2.0))
        found["metrics"] = merge_meters(meter, Loss(), world).compute()

        torch.manual_seed(0)
        model = TwoHeads().train()
        replica = world.replicate(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        state = TrainState(model, optimizer, Constant(total_steps=1, steps_per_epoch=1))
        images = torch.linspace(-1, 1, 21).view(7, 3).roll(3, 0)[slice(0, 5) if rank == 0 else slice(5, 7)]
        for number in range(3):  # three batches make a step
            with world.gradient_sync(replica, enabled=number == 2):
                replica(images if number else -images).sum().backward()
        sums, nonfinite = torch.tensor([10.0 * (rank + 1), rank + 1.0]), torch.tensor(0.0)
        if rank == 1:
            world.stop.number = signal.SIGTERM
            nonfinite += float("nan")
        world.sync_step(model, sums, nonfinite)
        found["step"] = sums.tolist(), bool(nonfinite.isnan())
        found["gradients"] = {n: p.grad.tolist() for n, p in model.named_parameters() if p.grad is not None}
        assert model.norm.running_mean is not None
        found["mean"] = model.norm.running_mean.tolist()
        optimizer.step()
        try:
            world.stop.check()
        except StoppedError as error:
            found["stopped"] = error.exit_code
        found["equal"] = [check_replicas_equal(state, world)]
        if rank == 1:  # an optimizer's moment differs in one bit
            moment = optimizer.state[model.positive.bias]["exp_avg"]
            moment += torch.finfo(torch.float32).eps * moment
        found["equal"] += [check_replicas_equal(state, world), check_replicas_equal(state, world)]
        found["slow imports"] = [name for name in ("torch._dynamo", "sympy") if name in sys.modules]
    results.put((rank, found))


@pytest.mark.slow
def test_two_ranks_sum_gather_and_broadcast() -> None:
    found = run_two(run_rank)
    torch.manual_seed(0)
    alone = TwoHeads().train()
    images = torch.linspace(-1, 1, 21).view(7, 3).roll(3, 0)
    running_means = []
    for part in (images[:5], images[5:]):  # as BatchNorm sees it in two ranks
        alone.norm.reset_running_stats()
        for sign in (-1, 1, 1):
            alone(sign * part).sum().backward()
        running_means.append(alone.norm.running_mean.clone())
    for each in found.values():
        assert each["gathered"] == [0, 1] and each["broadcast"] == {"by": 0}
        assert each["metrics"] == {"loss": 1.5, "scores": 3.0}
        assert each["step"] == ([30.0, 3.0], True), "a non-finite value in one rank reaches all"
        assert each["stopped"] == 143
        assert each["gradients"] == found[0]["gradients"] and each["mean"] == found[0]["mean"]
        assert each["equal"] == [True, False, True]
        assert each["slow imports"] == [], "torch changed: see _without_dynamo"
    expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    assert found[0]["gradients"].keys() == expected.keys() and "unused.weight" not in expected
    for name, gradient in expected.items():
        torch.testing.assert_close(torch.tensor(found[0]["gradients"][name]), gradient)
    torch.testing.assert_close(torch.tensor(found[0]["mean"]), torch.stack(running_means).mean(dim=0))
    assert not torch.allclose(running_means[0], running_means[1])


def run_mismatched(rank: int, port: int, results) -> None:
    """Rank 1 does not take part in a collective operation of rank 0."""
    from cnntrain.train import process_group
    from cnntrain.train.process_group import join_process_group

    process_group.EXIT_GRACE_S = 0.5
    info, ends, started = RankInfo(rank, 2, rank, 2, "127.0.0.1", port), [], time.monotonic()
    with join_process_group(info, False, timeout_s=1, end=lambda *end: ends.append(end)) as world:
        if rank == 0:
            threading.Thread(target=world.all_reduce_, args=([torch.zeros(1)],), daemon=True).start()
        while not ends and time.monotonic() - started < 60:
            time.sleep(0.05)
        results.put((rank, ends[:1]))
        time.sleep(5 if rank == 0 else 0)  # rank 0 holds the store
        os._exit(0)


@pytest.mark.slow
def test_a_collective_with_a_missing_rank_ends_after_the_timeout() -> None:
    found = run_two(run_mismatched)
    assert [code for code, _ in found[0]] == [4] and "launch.timeout_s=1" in found[0][0][1]
    assert found[1] == [(4, None)], "one message"


def run_two(target) -> dict[int, Any]:
    context = multiprocessing.get_context("spawn")
    results, port = context.SimpleQueue(), free_port()
    processes = [context.Process(target=target, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    return dict(results.get() for _ in processes)


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_a_single_process_imports_nothing_for_several() -> None:
    code = """
import sys, threading
from cnntrain import compose, train
train(compose("model=mlp", "data=digits", "data.limit=60", "steps=1", "threads=1", "log.tensorboard=false",
              "log.figures=false"))
import torch.distributed as dist
print({"cnntrain.train.process_group", "cnntrain.train.launch", "torch.distributed.elastic"} & set(sys.modules))
print(dist.is_initialized(), [t.name for t in threading.enumerate() if t.name == "watchdog"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-2:] == ["set()", "False []"], done.stdout + done.stderr


def test_synchronized_norms_keep_the_names_of_a_checkpoint() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    names, parameters = list(model.state_dict()), list(model.parameters())
    assert len(running_statistics(model)) == 2
    model = convert_sync_batchnorm(model)
    assert list(model.state_dict()) == names and isinstance(model[1], nn.SyncBatchNorm)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert running_statistics(model) == []


class NormThenReLU(nn.BatchNorm2d):
    """A norm with an activation, like timm's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


def test_a_subclass_of_batch_norm_is_not_replaced(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), NormThenReLU(3), nn.Sequential(nn.BatchNorm2d(3))).eval()
    images = torch.randn(2, 1, 8, 8)
    before = model(images)
    with caplog.at_level("WARNING", "cnntrain"):
        model = convert_sync_batchnorm(model)
    torch.testing.assert_close(model(images), before)
    assert [type(model[1]), type(model[2][0])] == [NormThenReLU, nn.SyncBatchNorm]  # pyright: ignore
    assert "NormThenReLU" in caplog.text


def test_timms_norms_with_activations_are_synchronized() -> None:
    """Outputs, parameters, their names and frozen layers are preserved."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    model.head_names = ("classifier",)
    model.bn1.weight.data.uniform_(0.5, 2)
    freeze_layers(model, "backbone")
    images, names, parameters = torch.randn(2, 3, 64, 64), list(model.state_dict()), list(model.parameters())
    before = model(images)
    model = convert_sync_batchnorm(model).eval()
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
    model = convert_sync_batchnorm(model).train()
    before = {name: value.clone() for name, value in model.named_buffers() if name.startswith("backbone")}
    model.backbone(torch.randn(4, 1, 8, 8))  # pyright: ignore[reportCallIssue]
    assert len(before) == 3 and all(value.equal(dict(model.named_buffers())[k]) for k, value in before.items())
    assert model.norm.training
    unfreeze(model)
    model.train()
    model.backbone(torch.randn(4, 1, 8, 8))  # pyright: ignore[reportCallIssue]
    assert not all(value.equal(dict(model.named_buffers())[k]) for k, value in before.items())


@pytest.mark.parametrize("bound", [True, False])
def test_tasks_that_see_one_gpu_each_use_it(monkeypatch: pytest.MonkeyPatch, bound: bool) -> None:
    """`srun --ntasks=4 --gpus-per-task=1`: each task's GPU is its number 0."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings, place = compose("device=cuda", "batch_size=32"), RankInfo(3, 4, 3, 4, has_own_gpu=bound)
    assert select_gpu(3) == torch.device("cuda", 0)
    if bound:
        check_launch(settings, place)
    else:
        with pytest.raises(UserError, match=r"launch\.devices"):
            check_launch(settings, place)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert select_gpu(3) == torch.device("cuda", 3)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
@pytest.mark.parametrize("value", ["junk", "", "-2", "1e3", "9" * 40])
def test_launcher_variables_must_be_whole_numbers(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{name} must be a whole number"):
        rank_from_env({name: value})


def test_the_local_rank_must_be_a_whole_number() -> None:
    given = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "zero", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    with pytest.raises(UserError, match="LOCAL_RANK must be a whole number"):
        rank_from_env(given)
