"""Hooks on a network that are taken off again, whatever happens; and the network as it was written."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def attached(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that have been registered, removed at the end of the block."""
    hooks = list(hooks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """The network's own calls, which heed hooks, instead of compiled ones."""
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled
