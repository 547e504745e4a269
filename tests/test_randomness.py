"""Random numbers are functions of seed, epoch, position and name."""

import contextlib

import pytest
import torch

from cnntrain.randomness import epoch_order, fork_generators, hash_seed, seed_generators, uniform


def test_uniform_numbers_are_functions_of_seed_epoch_position_and_name() -> None:
    positions = torch.arange(1000)
    numbers = uniform(3, 1, positions, "flip", 4)
    assert torch.equal(numbers[500:], uniform(3, 1, positions[500:], "flip", 4))
    assert torch.equal(numbers[:, :2], uniform(3, 1, positions, "flip", 2))
    assert not torch.equal(numbers, uniform(3, 2, positions, "flip", 4))
    assert not torch.equal(numbers, uniform(3, 1, positions, "crop", 4))
    assert abs(float(numbers.mean()) - 0.5) < 0.02 and float(numbers.min()) >= 0 and float(numbers.max()) < 1
    correlation = torch.corrcoef(numbers.T)
    assert (correlation - torch.eye(4)).abs().max() < 0.12
    assert sorted(epoch_order(0, 0, 50).tolist()) == list(range(50))
    assert len({hash_seed(a, b) for a in range(30) for b in range(30)}) == 900


def test_seeding_draws_what_torch_draws_and_stores_nothing() -> None:
    torch.manual_seed(77)
    expected = torch.rand(5)
    remembered = len(torch.cuda._queued_calls)
    for _ in range(100):
        seed_generators(77)
    assert torch.equal(torch.rand(5), expected)
    assert len(torch.cuda._queued_calls) == remembered


@pytest.mark.parametrize(("device", "forked"), [("cpu", []), ("cuda:1", [torch.device("cuda", 1)]), ("mps", [])])
def test_only_the_generator_of_the_device_is_saved(
    device: str, forked: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several GPUs, torch warns unless devices are given, and saves the generator of each."""
    calls: list[object] = []

    def fork_rng(devices: list[torch.device]) -> contextlib.AbstractContextManager[None]:
        calls.append(devices)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "before")
    monkeypatch.setattr(torch.mps, "set_rng_state", calls.append)
    with fork_generators(torch.device(device)):
        pass
    assert calls == [forked, *(["before"] if device == "mps" else [])]
