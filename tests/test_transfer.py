"""Copies of host data to the device."""

import pytest
import torch
from torch import Tensor

from cnntrain.transfer import STAGED_BYTES, arange, constant, free_bytes, to_device

CPU = torch.device("cpu")


def test_constants_are_cached() -> None:
    first = constant([0.5, 2.0], CPU)
    assert first is constant((0.5, 2.0), CPU)
    assert first.tolist() == [0.5, 2.0] and first.dtype == torch.float32
    assert constant((0.5, 2.0), CPU, torch.float64).dtype == torch.float64
    assert constant(3, CPU, torch.int64).item() == 3
    assert arange(4, CPU) is arange(4, CPU)
    assert arange(4, CPU).tolist() == [0, 1, 2, 3]


def test_constants_created_in_inference_mode_support_autograd() -> None:
    with torch.inference_mode():
        factors = constant((1.25, 3.75), CPU), arange(2, CPU, torch.float32)
    weight = torch.ones(2, requires_grad=True)
    (weight * factors[0] * factors[1]).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [0.0, 3.75]


def test_a_tensor_on_the_device_is_not_copied() -> None:
    tensor = torch.ones(3)
    assert to_device(tensor, CPU) is tensor
    assert to_device(tensor, CPU, torch.float64).dtype == torch.float64


def test_only_large_copies_to_cuda_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self.nbytes) or self)
    monkeypatch.setattr(Tensor, "to", lambda self, *where, **how: self)
    for size in (1, STAGED_BYTES, STAGED_BYTES + 1):
        to_device(torch.zeros(size, dtype=torch.uint8), torch.device("cuda"))
        to_device(torch.zeros(size, dtype=torch.uint8), CPU)
    assert pinned == [STAGED_BYTES + 1]


def test_free_memory_includes_memory_reserved_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    assert free_bytes(torch.device("cuda")) == 120
