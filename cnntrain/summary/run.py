"""Running a network on shapes alone, watched."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from cnntrain.summary.op_rules import all_tensors, tensors_of
from cnntrain.summary.trace import Trace


def trace_run(model: nn.Module, batch: Tensor) -> tuple[Trace, Any]:
    """Run a meta network on a meta batch (N, C, *size), and return the record and what the network answered.

    Raises:
        TraceError: the network raised; it carries the record up to there, and the cause.
    """
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        with torch.no_grad(), suppress(Exception):
            model(batch)  # lazy layers take their widths from a first run; an error is met again below
    trace = Trace(model, batch)
    try:
        with torch.no_grad(), _watched(model, trace), trace:
            return trace, model(batch)
    except Exception as error:
        raise TraceError(trace) from error


class TraceError(Exception):
    """A network raised while it was traced; `__cause__` is what it raised."""

    def __init__(self, trace: Trace) -> None:
        super().__init__("the network raised an error")
        self.trace = trace


@contextmanager
def _watched(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Tell `trace` which module runs, for as long as the context lasts."""
    handles = []
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: trace.enter(name, m, tensors_of(args, kwargs)),
                with_kwargs=True,
            )
        )
        handles.append(
            module.register_forward_hook(
                lambda m, args, kwargs, out: trace.leave(m, tensors_of(args, kwargs), all_tensors(out)),
                with_kwargs=True,
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
