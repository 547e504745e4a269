"""Execution of the runs of a sweep. Pools of workers are tested in tests/cli/test_sweep.py."""

import pytest

from cnntrain.sweep.run_workers import visible_gpus, worker_share


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
