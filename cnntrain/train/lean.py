"""A start without torch's compiler, whose import takes longer than all the rest of a training's start."""

import functools
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch._decomp.decompositions
import torch._refs.nn.functional
from torch.optim import Optimizer

MARK = "__dynamo_disable"  # where torch keeps a function's version that is left out of what it compiles
PLACES = (Optimizer, torch._refs, torch._refs.nn.functional, torch._decomp.decompositions)


def skip_dynamo_import() -> None:
    """Let torch's optimizers, and what it computes on shapes alone, run without importing its compiler.

    Many of torch's Python functions import it in their first call, for no other purpose than to be left out of what it
    compiles. Most look for a mark that says this has been done, which is set here. An optimizer's step switches
    gradients off and tells the compiler so; here it only switches them off. What `compile=` compiles, the network, has
    neither in it. Where another version of torch goes about it in another way, nothing is lost but the time.
    """
    if "torch._dynamo" in sys.modules:
        return
    for function in (inner for place in PLACES for value in vars(place).values() for inner in _layers(value)):
        held = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if function.__globals__["__name__"] == "torch._compile" and "fn" in held:
            left_out = held["fn"].cell_contents
            left_out.__dict__.setdefault(MARK, left_out)
    for kind in vars(torch.optim).values():
        step = vars(kind).get("step") if isinstance(kind, type) and issubclass(kind, Optimizer) else None
        if isinstance(step, FunctionType) and step.__code__.co_name == "_use_grad":
            kind.step = _as_told(vars(step)["__wrapped__"])


def _layers(function: object) -> Iterator[FunctionType]:
    """A function, what it wraps, what that wraps, and so on."""
    while isinstance(function, FunctionType):
        yield function
        function = getattr(function, "__wrapped__", None)


def _as_told(step: Callable[..., Any]) -> Callable[..., Any]:
    """With gradients on or off as the optimizer's `differentiable` says."""

    @functools.wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return wrapper
