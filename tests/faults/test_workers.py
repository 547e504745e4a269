"""A worker that dies, is stuck or has no shared memory ends the run with exit code 4 and leaves no orphans."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

LAST = Path("run/checkpoints/last.pt")


def streaming(root: Path) -> list[str]:
    return (
        f"model=mlp threads=1 data=image_folder data.root={root} data.size=8 data.cache=none "
        "data.workers=2 data.timeout_s=3 batch_size=4 epochs=100000 log.figures=false "
        "log.tensorboard=false run_dir=run"
    ).split()


def children(pid: int) -> list[int]:
    """Direct children of `pid`, from /proc."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()]


def test_a_worker_does_not_report_a_closed_connection(capfd) -> None:
    """If the main process closes the connection, a thread of the worker calls sys.excepthook."""
    from cnntrain.data.workers import _start_worker

    def reset(hook_of: str) -> None:
        _start_worker(0)
        sys.excepthook(*_raised(ConnectionResetError("by peer") if hook_of == "peer" else ValueError("a fault")))

    context = multiprocessing.get_context("fork")
    for cause, said in (("peer", ""), ("worker", "ValueError: a fault")):
        process = context.Process(target=reset, args=(cause,))
        process.start()
        process.join()
        heard = capfd.readouterr().err
        assert process.exitcode == 0 and (said in heard if said else not heard)


def _raised(error: Exception) -> Any:
    try:
        raise error
    except type(error):
        return sys.exc_info()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stuck"])
def test_a_killed_worker_ends_the_run_with_a_message(cnntrain, wait_for, make_images, number: signal.Signals) -> None:
    run = cnntrain.start(*streaming(make_images(count=40)))
    wait_for(LAST.exists, run)
    wait_for(lambda: len(children(run.pid)) >= 2, run)
    workers = children(run.pid)
    lost = time.monotonic()
    for worker in workers if number == signal.SIGSTOP else workers[:1]:
        os.kill(worker, number)
    said = cnntrain.end(run, 4, timeout_s=60).stderr
    assert time.monotonic() - lost < 3 + 57  # 3 s to notice; the rest is for a busy machine
    assert "error: data: " in said and ("worker" in said)
    assert ("data.timeout_s" in said) == (number == signal.SIGSTOP)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()], "orphans"
    assert torch.load(LAST, weights_only=True)["state"]["progress"]["epoch"] >= 1


@pytest.mark.slow
def test_a_suspended_run_continues(cnntrain, wait_for, make_images) -> None:
    """Ctrl-Z for longer than data.timeout_s, then fg: the run continues and ends normally."""
    run = cnntrain.start(*(a.replace("timeout_s=3", "timeout_s=2") for a in streaming(make_images(count=40))))
    wait_for(LAST.exists, run)
    for _ in range(2):
        os.killpg(run.pid, signal.SIGSTOP)
        time.sleep(8)
        os.killpg(run.pid, signal.SIGCONT)
        before = LAST.stat().st_mtime_ns
        wait_for(lambda before=before: LAST.stat().st_mtime_ns > before, run)
    run.terminate()
    cnntrain.end(run, 128 + signal.SIGTERM, timeout_s=60)


@pytest.mark.slow
def test_small_shared_memory_is_reported_with_the_remedy(cnntrain, make_images, inside_namespace) -> None:
    small = inside_namespace("mount -t tmpfs -o size=64k none /dev/shm", "--mount")
    root = make_images(count=100)
    arguments = [
        a.replace("data.size=8", "data.size=128").replace("batch_size=4", "batch_size=64") for a in streaming(root)
    ]
    said = cnntrain(*arguments, code=4, around=small).stderr
    assert "/dev/shm" in said and "--shm-size" in said and "data.workers=0" in said
