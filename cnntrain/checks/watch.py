"""Watching a forward pass: which rectifiers are dead."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

RECTIFIERS = (torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, nn.functional.relu, nn.functional.relu6)


class _RectifierWatch(TorchFunctionMode):
    """Notes for every rectifier call whether any of its outputs is above zero."""

    def __init__(self, current_layer: Callable[[], str]) -> None:
        super().__init__()
        self.current_layer = current_layer
        self.alive: dict[tuple[str, int], bool] = {}  # (layer, which call in it)
        self.calls: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in RECTIFIERS:
            name = self.current_layer()
            self.calls[name] = self.calls.get(name, 0) + 1
            self.alive[name, self.calls[name]] = bool((result > 0).any())
        return result


@torch.no_grad()
def dead_rectifiers(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the layers whose rectifier gives zero at every place of every image.

    Args:
        images: (N, C, H, W) normalised.
    """
    stack: list[str] = [""]
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    watch = _RectifierWatch(lambda: stack[-1])
    try:
        with watch:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        f"{name or 'the network itself'}{f' (rectifier {call})' if watch.calls[name] > 1 else ''}"
        for (name, call), alive in watch.alive.items()
        if not alive
    ]
