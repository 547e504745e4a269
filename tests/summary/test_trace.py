"""Traces of forward passes on the meta device."""

import pytest
import torch
from torch import Tensor, nn

from cnntrain.summary.trace import TraceError, as_meta, meta_images, needs_data, trace_run


def test_a_copy_on_the_meta_device_has_no_data_and_keeps_shared_parameters() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LazyLinear(2))
    net[1].weight = net[0].weight
    net[0].bias.requires_grad_(False)
    copied = as_meta(net)
    assert {t.device.type for t in (*copied.parameters(), *copied.buffers())} == {"meta"}
    assert copied[1].weight is copied[0].weight
    assert not copied[0].bias.requires_grad
    assert net[0].weight.device.type == "cpu"


def test_a_builder_that_computes_with_tensors_is_called_on_the_cpu() -> None:
    devices = []

    def build() -> nn.Module:
        devices.append(torch.empty(1).device.type)
        return nn.Linear(2, int(torch.ones(3).sum().item()))

    assert as_meta(build).weight.shape == (3, 2)
    assert devices == ["meta", "cpu"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        return (y + self.conv(y[:, :3])).mean((2, 3))


def test_events_are_layers_and_operations_between_layers_in_order() -> None:
    trace, output = trace_run(as_meta(Net()), meta_images(3, (8, 8)))
    names = [getattr(event, "module", None).__class__.__name__ for event in trace.events]
    assert names == ["Conv2d", "ReLU", "Conv2d", "NoneType", "NoneType"]
    assert [operation.name for operation in trace.operations] == ["convolution", "relu", "convolution", "add", "mean"]
    assert [operation.inputs for operation in trace.operations] == [(-1,), (0,), (1,), (1, 2), (3,)]
    assert [call.call_number for call in trace.calls if call.name == "conv"] == [1, 2]
    assert [operation.multiply_adds for operation in trace.operations] == [64 * 27 * 4, 0, 64 * 27 * 4, 0, 0]
    assert trace.producer(output) is trace.operations[-1]
    assert tuple(output.shape) == (1, 4)


def test_errors_leave_the_running_modules_and_the_operation() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Conv2d(4, 2, 3)))
    with pytest.raises(TraceError) as raised:
        trace_run(as_meta(net), meta_images(1, (8, 8), batch_size=2))
    trace = raised.value.trace
    assert [call.name for call in trace.stack] == ["", "1", "1.0"]
    assert trace.failed_operation == ("convolution", ((2, 2, 6, 6), (2, 4, 3, 3), (2,)))
    assert len(trace.operations) == 1


def test_hooks_are_removed() -> None:
    net = as_meta(nn.Conv2d(1, 2, 3))
    trace_run(net, meta_images(1, (8, 8)))
    assert not net._forward_hooks and not net._forward_pre_hooks


def test_reading_values_is_recognized() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)) as raised:
        meta_images(1, (2, 2)).sum().item()
    assert needs_data(raised.value)
    assert not needs_data(RuntimeError("shapes do not agree"))
