"""Hooks on a network that are taken off again, whatever happens."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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
