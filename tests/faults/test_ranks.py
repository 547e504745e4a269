"""Several processes on one machine, through the command line: equal to one, and ended together however one ends."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cnntrain.train import checkpoint
from cnntrain.train.process_group import HEARTBEAT_TIMEOUT_S

pytestmark = pytest.mark.slow
LONG = pytest.mark.long  # each of these starts and stops several processes
QUIET = ("model=mlp", "threads=1", "log.figures=false", "log.tensorboard=false", "precision=fp32", "device=cpu")
TWO = (*QUIET, "data.limit=200", "batch_size=32", "launch.devices=2")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python")
ENDLESS = (*TWO, "epochs=1000000", "schedule=constant", "run_dir=run")


def rows(folder: str) -> list[dict[str, float]]:
    with (Path(folder) / "metrics.csv").open() as file:
        found = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [{name: value for name, value in row.items() if name != "images_per_s"} for row in found]


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of the ranks that the command started, ordered by rank."""
    return [pid for pid in children(process) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def ended(pid: int) -> bool:
    """Return True if the process has ended; it may be a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def listening(pid: int) -> list[str]:
    """Return the addresses at which a process listens, in hexadecimal."""
    held = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in held:
                found.append(fields[1].rpartition(":")[0])
    return found


def weights(folder: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(Path(folder) / "checkpoints" / "last.pt")["state"]["model"]


@pytest.fixture
def started(cnntrain, wait_for):
    """A run of two ranks that has finished its second epoch, and the process ids of its ranks."""
    process = cnntrain.start(*ENDLESS)
    wait_for(lambda: Path("run/metrics.csv").exists() and len(rows("run")) > 1, process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    return process, ranks


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=LONG)])
def test_the_same_losses_and_metrics_as_one_process(cnntrain, processes: int) -> None:
    """180 images in batches of 32, the last with 20; two batches per step; mixed labels; 20 validation images.

    With SGD and without clipping, because Adam and a clipped norm hide a wrong scale of the gradients.
    """
    settings = (
        *QUIET,
        *(
            "data.limit=200 batch_size=32 epochs=2 accumulate=2 augment=[crop,mixup] ema_decay=0.9 "
            "optimizer=sgd log.every_steps=1"
        ).split(),
    )
    cnntrain(*settings, "run_dir=one")
    cnntrain(*settings, "run_dir=several", f"launch.devices={processes}")
    for one, several in zip(rows("one"), rows("several"), strict=True):
        assert several == pytest.approx(one, rel=1e-5)
    torch.testing.assert_close(weights("several"), weights("one"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=LONG)])
def test_103_validation_images_are_counted_once_each(cnntrain, make_images, processes: int) -> None:
    """In batches of 5: the last one has 3 images, for 4 processes."""
    make_images(splits=("train",), count=10)
    make_images(splits=("val",), count=52)
    next(Path("images/val/light").iterdir()).unlink()
    data = ("data=image_folder", "data.root=images", "data.size=8", "data.scan=off", "epochs=2", "batch_size=5")
    cnntrain(*QUIET, *data, "run_dir=one")
    cnntrain(*QUIET, *data, "run_dir=several", f"launch.devices={processes}")
    one, several = rows("one"), rows("several")
    assert [row["val/top1"] for row in several] == [row["val/top1"] for row in one]
    assert several[0] == pytest.approx(one[0], rel=1e-5)
    assert abs(one[0]["val/top1"] * 103 % 1 - 0.5) == pytest.approx(0.5, abs=1e-4)  # it is a share of 103


def test_a_killed_process_ends_all_with_one_message(cnntrain, started) -> None:
    process, ranks = started
    before = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    said = cnntrain.end(process, 4, timeout_s=30).stderr
    assert time.monotonic() - before < 30
    assert said.count("error: ") == 1 and "process 2 of 2 was killed by SIGKILL" in said
    assert gone(ranks)
    assert weights("run")  # whole


@LONG
def test_a_killed_launcher_leaves_no_orphans(cnntrain, started) -> None:
    process, ranks = started
    process.kill()
    until = time.monotonic() + 30
    while not gone(ranks):
        assert time.monotonic() < until, "orphans"
        time.sleep(0.1)
    assert weights("run")


@LONG
def test_a_suspended_rank_ends_all(cnntrain, started) -> None:
    """Like a machine that lost its network: the other rank waits for it in a collective."""
    process, ranks = started
    os.kill(ranks[1], signal.SIGSTOP)
    until = time.monotonic() + 25
    while not ended(ranks[0]):
        assert time.monotonic() < until
        time.sleep(0.1)
    said = cnntrain.end(process, 4, timeout_s=60).stderr  # torch kills the other one after another 30 s
    assert said.count("error: ") == 1 and "process 2 of 2 was killed or cut off" in said
    assert gone(ranks)


@LONG
def test_under_torchrun_the_other_ranks_report_a_killed_one(cnntrain, wait_for) -> None:
    settings = (*TWO[:-1], "epochs=1000000", "schedule=constant", "run_dir=run")
    process = cnntrain.start(*settings, around=TORCHRUN)
    wait_for(lambda: Path("run/metrics.csv").exists(), process)
    ranks = children(process)
    os.kill(ranks[1], signal.SIGKILL)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 1  # torchrun's own
    assert said.count("error: ") == 1 and "one of the processes was killed or cut off" in said
    assert gone(ranks)


def test_ranks_listen_on_the_loopback_interface_only(cnntrain, started) -> None:
    process, ranks = started
    addresses = [address for pid in (process.pid, *ranks) for address in listening(pid)]
    assert addresses and set(addresses) <= {"0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000"}


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=LONG)], ids=lambda n: n.name)
@pytest.mark.parametrize(
    "who", [pytest.param("launcher", marks=LONG), pytest.param("first", marks=LONG), "second", "terminal"]
)
def test_a_signal_to_any_process_stops_all_at_the_same_step(cnntrain, started, number: int, who: str) -> None:
    process, ranks = started
    if who == "terminal":  # Ctrl-C reaches all of them
        os.killpg(process.pid, number)
    else:
        os.kill({"launcher": process.pid, "first": ranks[0], "second": ranks[1]}[who], number)
    said = cnntrain.end(process, 128 + number, timeout_s=30).stderr
    assert said.count(f"stopped by {signal.Signals(number).name} at step") == 1 and "error: " not in said
    assert gone(ranks)
    progress = checkpoint.load(Path("run/checkpoints/last.pt"))["state"]["progress"]
    assert f"at step {progress['step']};" in said


def test_ranks_that_were_suspended_together_continue(cnntrain, wait_for) -> None:
    """Ctrl-Z for longer than any time limit, then `fg`."""
    process = cnntrain.start(*ENDLESS, "launch.timeout_s=5")
    wait_for(lambda: Path("run/metrics.csv").exists() and len(rows("run")) > 1, process)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(HEARTBEAT_TIMEOUT_S + 5)
    before = len(rows("run"))
    os.killpg(process.pid, signal.SIGCONT)
    wait_for(lambda: len(rows("run")) > before + 3, process)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    cnntrain.end(process, 143, timeout_s=60)


@pytest.mark.parametrize("count", [1, 2, pytest.param(4, marks=LONG)])
@pytest.mark.parametrize("model", ["mlp", "batchnorm_cnn"])
def test_a_run_resumed_within_an_epoch_ends_with_the_same_bits(cnntrain, model: str, count: int) -> None:
    settings = (
        *TWO[1:-1],
        *(
            f"model={model} launch.devices={count} schedule=constant augment=[crop,mixup] ema_decay=0.9 accumulate=2"
        ).split(),
    )
    cnntrain(*settings, "epochs=3", "run_dir=unbroken")
    cnntrain(*settings, "steps=5", "run_dir=run")  # of 3 an epoch
    assert checkpoint.load(Path("run/checkpoints/last.pt"))["state"]["progress"]["batch"] == 4
    for other in (1, 4) if (model, count) == ("mlp", 2) else ():
        said = cnntrain(*settings, f"launch.devices={other}", "epochs=3", "run_dir=run", "resume=auto", code=2).stderr
        assert f"launch.devices={count}" in said
    cnntrain(*settings, "epochs=3", "run_dir=run", "resume=auto")
    assert rows("run")[0] == rows("unbroken")[0] and rows("run")[-1] == rows("unbroken")[-1]
    states = [checkpoint.load(Path(run) / "checkpoints/last.pt")["state"] for run in ("run", "unbroken")]
    for part in ("model", "ema"):
        assert all(torch.equal(states[0][part][name], value) for name, value in states[1][part].items())


def test_a_last_batch_with_fewer_images_than_ranks_is_left_out(cnntrain) -> None:
    """180 training images in batches of 179: one image is left."""
    said = cnntrain(*QUIET, "data.limit=200", "batch_size=179", "launch.devices=2", "epochs=2", "run_dir=run").stderr
    assert "the last batch of each epoch is dropped" in said
    assert [row["step"] for row in rows("run")] == [1, 2]


@LONG
def test_a_run_resumes_between_epochs_with_any_number_of_ranks(cnntrain) -> None:
    settings = (*TWO, "schedule=constant", "augment=crop")
    cnntrain(*settings, "epochs=1", "run_dir=run")
    cnntrain(*settings, "epochs=2", "run_dir=run", "resume=auto", "launch.devices=3")
    cnntrain(*settings, "epochs=3", "run_dir=run", "resume=auto", "launch.devices=1")
    cnntrain(*settings, "epochs=3", "run_dir=one", "launch.devices=1")
    assert rows("run")[-1] == pytest.approx(rows("one")[-1], rel=1e-5)


REFUSED = {
    "more processes than images in a batch": (("batch_size=2", "launch.devices=3"), "launch.devices: 3 processes"),
    "no batch size": (("batch_size=auto", "launch.devices=2"), "batch_size: auto"),
    "one GPU for two": (("device=cuda:0", "launch.devices=2"), "device: 2 processes"),
    "no process": (("launch.devices=0",), "launch.devices"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_launches_that_cannot_train_are_refused(cnntrain, what: str) -> None:
    arguments, said = REFUSED[what]
    assert said in cnntrain.refused(*QUIET[:-1], *arguments)


WRONG_ON_ONE = """
import torch
from torch import nn
class Wrong(nn.Sequential):
    def __init__(self, *, in_channels, num_outputs, image_size, kind):
        super().__init__(nn.Flatten(), nn.Linear(in_channels * image_size[0] * image_size[1], num_outputs))
        self.kind, self.calls = kind, 0
    def forward(self, images):
        import os
        self.calls += self.training and not images.is_meta
        if os.environ.get("RANK") == "1" and self.calls > 8:
            if self.kind == "raise":
                raise TypeError("an error in user code")
            if self.kind == "memory":
                raise MemoryError
            images = images * float("nan")
        return super().forward(images)
"""


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("raise", 1, "TypeError: an error in user code"),
        pytest.param("memory", 4, "error: out of memory", marks=LONG),
        pytest.param("nan", 3, "first not finite: the activation of 0 (Flatten)", marks=LONG),
    ],
)
def test_an_error_in_one_rank_is_reported_once(cnntrain, kind: str, code: int, said: str) -> None:
    Path("mine/model").mkdir(parents=True)
    Path("mine/wrong.py").write_text(WRONG_ON_ONE)
    Path("mine/model/wrong.yaml").write_text(f"_target_: wrong.Wrong\nkind: {kind}\n")
    process = cnntrain.start("--config-dir", "mine", *TWO[1:], "model=wrong", "epochs=1000", "run_dir=run")
    _, error = process.communicate(timeout=90)
    assert process.returncode == code, error
    assert error.count(said) == 1 and error.count("Traceback") == (code == 1)
    assert error.count("error: ") == (code != 1)


@LONG
def test_errors_in_the_data_are_reported_once(cnntrain, make_images) -> None:
    make_images(count=4)
    Path("images/train/dark/0.png").write_bytes(b"no image")
    said = cnntrain(*TWO[:-3], "launch.devices=2", "data=image_folder", "data.root=images", "data.size=8", code=2)
    assert said.stderr.count("error: ") == 1 and "0.png" in said.stderr


@LONG
def test_torchrun_and_srun_are_recognized(cnntrain, tmp_path) -> None:
    settings = (*TWO[:-1], "epochs=1")
    cnntrain(*settings, "run_dir=torchrun", around=TORCHRUN)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    slurm = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "here",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "MASTER_PORT": str(port),
    }
    tasks = [
        cnntrain.start(*settings, "run_dir=srun", **slurm, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in ("1", "0")
    ]
    for task in tasks:
        cnntrain.end(task, 0)
    assert rows("srun") == rows("torchrun")


@LONG
def test_stopping_a_sweep_stops_the_ranks_of_its_run(cnntrain, wait_for) -> None:
    process = cnntrain.start(
        *TWO, "-m", "optimizer.lr=0.001,0.01", "epochs=1000000", "schedule=constant", "run_dir=sweep"
    )
    wait_for(lambda: list(Path("sweep").glob("*/checkpoints/best.pt")), process)
    ranks = ranks_of(process)
    process.send_signal(signal.SIGTERM)
    cnntrain.end(process, 143, timeout_s=60)
    assert len(ranks) == 2 and gone(ranks)
    assert "at step" in next(Path("sweep").glob("*/log.txt")).read_text() or list(
        Path("sweep").glob("*/checkpoints/last.pt")
    )


@LONG
def test_a_sweep_of_runs_with_two_ranks_each(cnntrain) -> None:
    said = cnntrain(
        *TWO, "-m", "optimizer.lr=0.001,0.01", "epochs=3", "run_dir=sweep", "sweep.pruner=median", timeout_s=300
    )
    assert "epoch 1/3" not in said.stdout + said.stderr  # each run speaks in its own log
    assert "best: optimizer.lr=" in said.stdout
    assert len(list(Path("sweep").glob("*/results.json"))) == 2
