"""Execution of the runs of a sweep. Pools of workers are tested in tests/cli/test_sweep.py."""

import multiprocessing
import os
from typing import Any, cast

import pytest

from cnntrain.commands.train import train_run
from cnntrain.sweep.run_workers import ProcessPoolRunner, _Worker, visible_gpus, worker_share


@pytest.mark.parametrize(
    ("jobs", "cores", "shares"),
    [
        (2, [0, 1], [[0], [1]]),
        (2, [4, 5, 6, 7, 8], [[4, 5, 6], [7, 8]]),
        (3, [0, 1], [[0], [1], [0]]),
        (1, [0, 1], [[0, 1]]),
        (2, [], [[], []]),
    ],
)
def test_worker_share(jobs: int, cores: list[int], shares: list[list[int]]) -> None:
    assert [worker_share(worker, jobs, cores) for worker in range(jobs)] == shares


def test_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_stopping_does_not_signal_a_worker_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ProcessPoolRunner(train_run, None, lambda *_: False, jobs=1)
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    here, there = multiprocessing.Pipe()
    runner._workers.append(_Worker(process, here, run=cast(Any, object())))
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a signal for another process"))
    runner.stop()
    there.close()
    here.close()
