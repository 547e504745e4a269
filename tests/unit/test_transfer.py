"""Host data on the device."""

import torch

from cnntrain.transfer import arange, constant, to_device

CPU = torch.device("cpu")


def test_constants_are_kept():
    first = constant([0.5, 2.0], CPU)
    assert first is constant((0.5, 2.0), CPU)
    assert first.tolist() == [0.5, 2.0] and first.dtype == torch.float32
    assert constant((0.5, 2.0), CPU, torch.float64).dtype == torch.float64
    assert constant(3, CPU, torch.int64).item() == 3
    assert arange(4, CPU) is arange(4, CPU)
    assert arange(4, CPU).tolist() == [0, 1, 2, 3]


def test_constants_that_inference_met_first_can_be_trained_with():
    with torch.inference_mode():
        kept = constant((1.25, 3.75), CPU), arange(2, CPU, torch.float32)
    weight = torch.ones(2, requires_grad=True)
    (weight * kept[0] * kept[1]).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [0.0, 3.75]


def test_what_is_there_already_is_not_copied():
    tensor = torch.ones(3)
    assert to_device(tensor, CPU) is tensor
    assert to_device(tensor, CPU, torch.float64).dtype == torch.float64
