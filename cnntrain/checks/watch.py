"""Observe a forward pass: dead ReLUs, signal strength, mode-dependent operations, and where the graph is cut."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cnntrain.models.norm_act import dropout
from cnntrain.train.nonfinite import attached

RELUS = (torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, functional.relu, functional.relu6)
DROPOUTS = (
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    torch.dropout,
    torch.dropout_,
    dropout,
)
Weighted = nn.Linear | nn.modules.conv._ConvNd


@contextmanager
def module_stack(model: nn.Module) -> Iterator[list[str]]:
    """Yield a stack whose last entry is the name of the running module."""
    stack, hooks = [""], []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: _drop_last(stack)))
    with attached(hooks):
        yield stack


def _drop_last(stack: list[str]) -> None:
    stack.pop()  # returns nothing, because a hook's return value would replace the output


class _ReluObserver(TorchFunctionMode):
    """Records for every ReLU call which of its units are positive anywhere."""

    def __init__(self, current_layer: Callable[[], str]) -> None:
        super().__init__()
        self.current_layer = current_layer
        self.alive: dict[tuple[str, int], Tensor] = {}  # (layer, number of the call): (units,) bool
        self.calls: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in RELUS:
            name = self.current_layer()
            self.calls[name] = self.calls.get(name, 0) + 1
            units = 1 if result.ndim in (2, 4) else result.ndim - 1  # (N,C,H,W) and (N,F), else (..., F)
            self.alive[name, self.calls[name]] = (result > 0).movedim(units, 0).flatten(1).any(1)
        return result


@torch.no_grad()
def alive_units(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return, for each ReLU by layer name, which of its units (channels) are positive for any image.

    Args:
        images: (N, C, H, W), normalized.
    """
    with module_stack(model) as stack, _ReluObserver(lambda: stack[-1]) as observer:
        model(images)
    return {
        f"{name or 'the network itself'}{f' (ReLU {call})' if observer.calls[name] > 1 else ''}": alive
        for (name, call), alive in observer.alive.items()
    }


def dead_rectifiers(model: nn.Module, images: Tensor) -> list[str]:
    """Return the names of layers whose ReLU is zero everywhere for all images."""
    return [name for name, alive in alive_units(model, images).items() if not alive.any()]


def signal(values: Tensor) -> float:
    """Return the standard deviation over the examples of (N, ...), as root mean square over all other dimensions."""
    values = values.float()
    largest = float(values.abs().max())
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float((values / largest).std(dim=0, correction=0).square().mean().sqrt())


@torch.no_grad()
def signals(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the `signal` of the output of each convolution and dense layer, in execution order.

    Layers with zero weights (a residual branch or a head that starts at zero) are left out.
    """
    results: dict[str, float] = {}

    def measure(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim > 1:
            results[name] = signal(output)

    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: measure(name, output))
        for name, module in model.named_modules()
        if isinstance(module, Weighted) and module.weight.any()
    ]
    with attached(hooks):
        model(images)
    return results


@dataclass
class ModeCalls:
    """Mode-dependent operations of a forward pass.

    Attributes:
        dropouts: active dropouts as (layer, probability).
        batch_norms: layers that used batch statistics.
        drew: whether random numbers were drawn.
    """

    dropouts: list[tuple[str, float]] = field(default_factory=list)
    batch_norms: list[str] = field(default_factory=list)
    drew: bool = False


class _ModeObserver(TorchFunctionMode):
    def __init__(self, calls: ModeCalls, current_layer: Callable[[], str]) -> None:
        super().__init__()
        self.calls, self.current_layer = calls, current_layer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(zip(_arguments(func), args, strict=False)) | (kwargs or {})
        if func in DROPOUTS and named.get("training", named.get("train", True)):
            self.calls.dropouts.append((self.current_layer(), float(named.get("p", 0.5))))
        tracks = func is functional.instance_norm and named.get("running_mean") is not None
        if (func is functional.batch_norm and named.get("training", False)) or (
            tracks and named.get("use_input_stats", True)
        ):
            self.calls.batch_norms.append(self.current_layer())
        return func(*args, **(kwargs or {}))


def _arguments(func: Any) -> Sequence[str]:
    if func is functional.batch_norm:
        return ("input", "running_mean", "running_var", "weight", "bias", "training")
    if func is functional.instance_norm:
        return ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats")
    return ("input", "p", "training")


@torch.no_grad()
def watch_modes(model: nn.Module, images: Tensor) -> tuple[Tensor, ModeCalls]:
    """Return the outputs, and the mode-dependent operations: dropouts, batch statistics, random draws."""
    calls, before = ModeCalls(), _random_state(images)
    with module_stack(model) as stack, _ModeObserver(calls, lambda: stack[-1]):
        outputs = model(images)
    calls.drew = not torch.equal(before, _random_state(images))
    return outputs.float(), calls


def _random_state(images: Tensor) -> Tensor:
    states = [torch.get_rng_state()]
    if images.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(images.device))
    return torch.cat(states)


def gradient_cut(model: nn.Module, images: Tensor) -> str:
    """Describe where the graph from the image to the output is cut; '' if no module shows it."""
    layers: list[tuple[str, bool, bool]] = []  # (name, input requires grad, output requires grad)

    def record(name: str, inputs: Any, output: Any) -> None:
        input_grads = [part.requires_grad for part in inputs if isinstance(part, Tensor) and part.is_floating_point()]
        layers.append((name, any(input_grads) or not input_grads, getattr(output, "requires_grad", True)))

    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    hooks = [m.register_forward_hook(lambda _m, i, o, name=n: record(name, i, o)) for n, m in leaves]
    with attached(hooks), torch.enable_grad():
        model(images.detach().requires_grad_())
    previous = ""
    for name, input_grad, output_grad in layers:
        if not input_grad:
            return f"the graph is cut between {previous or 'the image'} and {name}"
        if not output_grad:
            return f"the graph is cut inside {name}"
        previous = name
    return ""


def never_called(model: nn.Module, images: Tensor) -> list[str]:
    """Return the names of modules with their own parameters that a forward pass does not call."""
    called: set[str] = set()
    own = [(n, m) for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    hooks = [m.register_forward_pre_hook(lambda *_, name=n: called.add(name)) for n, m in own]
    with attached(hooks), torch.no_grad():
        model(images)
    return [name for name, _ in own if name not in called]
