"""Instantiate the class that a config node names: only from allowed packages, and with validated arguments."""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from cnntrain.config.renamed_keys import renamed
from cnntrain.config.schema import check_value, shortened
from cnntrain.errors import UserError, is_out_of_memory, suggest

# For each role: the allowed packages, and the required base class (by name, because torch is imported lazily). A class
# or function must be defined in the package; being importable from it is not enough (`torch.load` is in torch too).
ROLES: dict[str, tuple[tuple[str, ...], str]] = {
    "model": (("cnntrain.models", "torch.nn.modules", "torchvision.models", "timm.models"), "torch.nn.Module"),
    "data": (("cnntrain.data",), "cnntrain.data.examples.Source"),
    "augment": (("cnntrain.augment",), "cnntrain.augment.base.Augmentation"),
    "task": (("cnntrain.tasks",), "cnntrain.tasks.task.Task"),
    "optimizer": (("torch.optim", "cnntrain.train.optim"), "torch.optim.Optimizer"),
    "schedule": (("cnntrain.train.schedule",), "cnntrain.train.schedule.Schedule"),
}
# Functions are rejected unless listed here: a config may come from an untrusted checkpoint, and a package function may
# read, download or unpickle a file (`timm.models.load_state_dict`).
BUILDERS = {
    "model": ("cnntrain.models.timm.classifier", "cnntrain.models.torchvision.classifier"),
    "optimizer": ("cnntrain.train.optim.by_name",),
}

# Arguments are checked against type annotations in these packages. Others may have annotations that are too narrow.
CHECKED_PACKAGES = ("cnntrain.", "torch.optim")


def build(node: Mapping[str, Any], role: str, key: str, trusted: Sequence[str] = (), **facts: Any) -> Any:
    """Instantiate the class that `node` names; see `resolve`."""
    factory = resolve(node, role, key, trusted, **facts)
    try:
        return factory()
    except (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{key}: {node['_target_']} refused its arguments: {error}") from error


def resolve(
    node: Mapping[str, Any], role: str, key: str, trusted: Sequence[str] = (), **facts: Any
) -> Callable[..., Any]:
    """Return the class or function that `node` names, with its arguments checked and bound (a `functools.partial`).

    Args:
        node: `_target_` and keyword arguments.
        role: a key of `ROLES`.
        key: the node's key in the config, for messages.
        trusted: additional packages of the user; any class or function in them is allowed. Taken from the command
            line, never from a checkpoint.
        facts: further arguments, passed if the signature has them and `node` does not set them or sets them to null.
    """
    if not isinstance(node, Mapping):
        raise UserError(f"{key}: must be a mapping with _target_, the class of this {role}; got {shortened(node)}")
    if not isinstance(node.get("_target_"), str):
        raise UserError(f"{key}._target_: missing; name the class of this {role}")
    target = _locate(node["_target_"], role, f"{key}._target_", trusted)
    arguments = {name: value for name, value in node.items() if name != "_target_"}
    for name, value in arguments.items():
        if not isinstance(name, str) or name.startswith("_"):
            raise UserError(
                f"{key}.{name}: not a valid argument name; the only key with a leading underscore is `_target_`"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}.{name}: must be a finite number, got {value}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"{key}.{name}: the number is too large ({len(str(abs(value)))} digits)")

    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # a class without a signature: its arguments are checked by the call
        return partial(target, **arguments)
    if target.__module__.startswith(CHECKED_PACKAGES):
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
        for name, value in arguments.items():
            if name in parameters and name in hints:
                check_value(value, hints[name], f"{key}.{name}")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in arguments:
        if name not in named and not takes_any:
            hint = renamed(f"{key}.{name}") or suggest(name, named)
            raise UserError(f"{key}.{name}: {node['_target_']} takes no such argument{hint}")
    for name, value in facts.items():
        if name in named and arguments.get(name) is None:
            arguments[name] = value
    return partial(target, **arguments)


def _locate(path: str, role: str, key: str, trusted: Sequence[str]) -> Callable[..., Any]:
    """Import the class or function at a dotted path if it is allowed for the role.

    The package is checked before the import, because importing runs code.
    """
    packages, base_name = ROLES[role]
    allowed = (*packages, *trusted)
    public = tuple(name.removesuffix(".modules") for name in allowed)
    message = f"{key}: {path!r} is not allowed as {role}; it must be a subclass of {base_name}, defined in "
    message += ", ".join(public)
    if not path.startswith(("torch.", "builtins.", "os.")):
        message += f"; for your own code, add trusted_packages=[{path.split('.')[0]}] on the command line"
    if not _within(path, public):
        raise UserError(message)
    module_name, _, name = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}: no module {error.name!r} (importing {path!r})") from error
    except AttributeError as error:
        names = [name for name in dir(sys.modules[module_name]) if not name.startswith("_")]
        raise UserError(f"{key}: {module_name} has no {name!r}{suggest(name, names)}") from error
    defined_in = getattr(target, "__module__", "") or ""
    if not callable(target) or not _within(defined_in, allowed):
        raise UserError(message)
    base_module, _, base_class = base_name.rpartition(".")
    base = getattr(importlib.import_module(base_module), base_class)
    is_subclass = inspect.isclass(target) and issubclass(target, base)
    is_builder = f"{defined_in}.{name}" in BUILDERS.get(role, ())
    if not (_within(defined_in, trusted) or is_subclass or is_builder):
        raise UserError(message)
    return target


def _within(module: str, packages: Sequence[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in packages)


def trust_folder(folder: Path) -> list[str]:
    """Add a folder of the user to the import path; return the names of the modules in it."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    modules = [p.stem for p in folder.glob("*.py")]
    packages = [p.parent.name for p in folder.glob("*/__init__.py")]
    return sorted(modules + packages)
