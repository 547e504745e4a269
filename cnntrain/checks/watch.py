"""Observe a forward pass: dead ReLUs, signal strength, mode-dependent operations, and where the graph is cut."""

import math
from collections.abc import Callable, Iterator
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
    *(functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, torch.dropout),
    *(functional.alpha_dropout, functional.feature_alpha_dropout, torch.dropout_, dropout),
)
_NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias")
ARGUMENTS = {  # names of positional arguments; of all other functions: input, p, training
    functional.batch_norm: (*_NORM_ARGUMENTS, "training"),
    functional.instance_norm: (*_NORM_ARGUMENTS, "use_input_stats"),
}
Weighted = nn.Linear | nn.modules.conv._ConvNd


@contextmanager
def module_stack(model: nn.Module) -> Iterator[list[str]]:
    """Yield a stack whose last entry is the name of the running module."""
    stack, hooks = [""], []

    def drop_last(*_: Any) -> None:
        stack.pop()  # returns nothing, because a hook's return value would replace the output

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(drop_last))
    with attached(hooks):
        yield stack


class _CallObserver(TorchFunctionMode):
    """Passes the function, the arguments and the result of every call of a torch function to `observe`."""

    def __init__(self, observe: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]) -> None:
        super().__init__()
        self.observe = observe

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.observe(func, args, kwargs or {}, result)
        return result


@torch.no_grad()
def alive_units(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return, for each ReLU by layer name, which of its units (channels) are positive for any image.

    Args:
        images: (N, C, H, W), normalized.
    """
    alive: dict[str, list[Tensor]] = {}  # by layer, for each call of a ReLU: (units,) bool

    def observe(func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func in RELUS:
            units = 1 if result.ndim in (2, 4) else result.ndim - 1  # (N,C,H,W) and (N,F), else (..., F)
            alive.setdefault(stack[-1], []).append((result > 0).movedim(units, 0).flatten(1).any(1))

    with module_stack(model) as stack, _CallObserver(observe):
        model(images)
    return {
        f"{name or 'the network itself'}{f' (ReLU {number})' if len(calls) > 1 else ''}": units
        for name, calls in alive.items()
        for number, units in enumerate(calls, 1)
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
    named = model.named_modules()
    names: dict[nn.Module, str] = {m: name for name, m in named if isinstance(m, Weighted) and m.weight.any()}

    def measure(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim > 1:
            results[names[module]] = signal(output)

    with attached(module.register_forward_hook(measure) for module in names):
        model(images)
    return results


@dataclass
class ModeCalls:
    """Mode-dependent operations of a forward pass."""

    dropouts: list[tuple[str, float]] = field(default_factory=list)  # active ones: (layer, probability)
    batch_norms: list[str] = field(default_factory=list)  # layers that used batch statistics
    draws: bool = False  # whether random numbers were drawn


@torch.no_grad()
def watch_modes(model: nn.Module, images: Tensor) -> tuple[Tensor, ModeCalls]:
    """Return the outputs, and the mode-dependent operations: dropouts, batch statistics, random draws."""
    calls, before = ModeCalls(), _random_state(images)

    def observe(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        named = dict(zip(ARGUMENTS.get(func, ("input", "p", "training")), args, strict=False)) | kwargs
        if func in DROPOUTS and named.get("training", named.get("train", True)):
            calls.dropouts.append((stack[-1], float(named.get("p", 0.5))))
        tracks = func is functional.instance_norm and named.get("running_mean") is not None
        if (func is functional.batch_norm and named.get("training", False)) or (
            tracks and named.get("use_input_stats", True)
        ):
            calls.batch_norms.append(stack[-1])

    with module_stack(model) as stack, _CallObserver(observe):
        outputs = model(images)
    calls.draws = not torch.equal(before, _random_state(images))
    return outputs.float(), calls


def _random_state(images: Tensor) -> Tensor:
    states = [torch.get_rng_state()]
    if images.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(images.device))
    return torch.cat(states)


def gradient_cut(model: nn.Module, images: Tensor) -> str:
    """Describe where the graph from the image to the output is cut; '' if no module shows it."""
    names = {module: name for name, module in model.named_modules() if not any(module.children())}
    layers: list[tuple[str, bool, bool]] = []  # (name, input requires grad, output requires grad)

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        input_grads = [part.requires_grad for part in inputs if isinstance(part, Tensor) and part.is_floating_point()]
        layers.append((names[module], any(input_grads) or not input_grads, getattr(output, "requires_grad", True)))

    with attached(module.register_forward_hook(record) for module in names), torch.enable_grad():
        model(images.detach().requires_grad_())
    previous = "the image"
    for name, input_grad, output_grad in layers:
        if not input_grad:
            return f"the graph is cut between {previous} and {name}"
        if not output_grad:
            return f"the graph is cut inside {name}"
        previous = name
    return ""


def never_called(model: nn.Module, images: Tensor) -> list[str]:
    """Return the names of modules with their own parameters that a forward pass does not call."""
    own = {m: name for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}
    called: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in own]
    with attached(hooks), torch.no_grad():
        model(images)
    return [name for module, name in own.items() if module not in called]
