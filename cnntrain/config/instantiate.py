"""From a config node to the object that it names: only what suits the slot, only with arguments that it takes."""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from cnntrain.config.renamed_keys import renamed
from cnntrain.config.schema import check_value
from cnntrain.errors import UserError, is_out_of_memory, suggest

# For each role: the allowed packages, and the required base class (by name, because torch is imported lazily). A class
# or function must be defined in the package; being importable from it is not enough (`torch.load` is in torch too).
ROLES: dict[str, tuple[tuple[str, ...], str]] = {
    "model": (
        ("cnntrain.models", "torch.nn.modules", "torchvision.models", "timm.models"),
        "torch.nn.Module",
    ),
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
    """The object that `node` describes; see `resolve`."""
    factory = resolve(node, role, key, trusted, **facts)
    try:
        return factory()
    except (
        TypeError, ValueError, LookupError, ArithmeticError, AssertionError, AttributeError, RuntimeError,
    ) as error:  # fmt: skip
        if is_out_of_memory(error):
            raise
        raise UserError(f"{key}: {node['_target_']} refused its arguments: {error}") from error


def resolve(
    node: Mapping[str, Any], role: str, key: str, trusted: Sequence[str] = (), **facts: Any
) -> Callable[..., Any]:
    """What `node` names, with its arguments bound and checked against the signature, ready to be called.

    Args:
        node: `_target_` and keyword arguments.
        role: the slot, a key of `ROLES`.
        key: where the node stands in the config, for messages.
        trusted: additional packages of the user; any class or function in them is allowed. Taken from the command
            line, never from a checkpoint.
        facts: arguments that are passed where the signature has them and the node leaves them out or null.

    Raises:
        UserError: names the key at fault and what would be right.
    """
    if not isinstance(node, Mapping):
        raise UserError(
            f"{key}: must be a mapping with _target_, the class that makes this {role}; got {node!r}"
        )
    if not isinstance(node.get("_target_"), str):
        raise UserError(f"{key}._target_: missing; name the class that makes this {role}")
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
    except ValueError:  # no signature to be had: leave it to the call
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
    """The class or function at a dotted path, if the slot accepts it.

    The check comes before the import, for importing runs code.
    """
    packages, kind = ROLES[role]
    allowed = (*packages, *trusted)
    shown = ", ".join(name.removesuffix(".modules") for name in allowed)
    refused = UserError(
        f"{key}: {path!r} is not allowed as {role}; it must be a subclass of {kind} that is defined in {shown}"
        + (
            ""
            if path.startswith(("torch.", "builtins.", "os."))
            else f"; for code of your own, add trusted_packages=[{path.split('.')[0]}] on the command line"
        )
    )
    public = tuple(name.removesuffix(".modules") for name in allowed)
    if not _within(path, public):
        raise refused
    module_name, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}: no module {error.name!r} (looked for {path!r})") from error
    except AttributeError as error:
        names = [n for n in dir(sys.modules[module_name]) if not n.startswith("_")]
        raise UserError(f"{key}: {module_name} has no {name!r}{suggest(name, names)}") from error
    home = getattr(found, "__module__", "") or ""
    if not callable(found) or not _within(home, allowed):
        raise refused
    base = getattr(importlib.import_module(kind.rpartition(".")[0]), kind.rpartition(".")[2])
    of_the_kind = inspect.isclass(found) and issubclass(found, base)
    if not (_within(home, trusted) or of_the_kind or f"{home}.{name}" in BUILDERS.get(role, ())):
        raise refused
    return found


def _within(module: str, packages: Sequence[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in packages)


def trust_folder(folder: Path) -> list[str]:
    """Put a user's own config folder on the import path; the names of the modules that it holds."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    modules = [p.stem for p in folder.glob("*.py")]
    packages = [p.parent.name for p in folder.glob("*/__init__.py")]
    return sorted(modules + packages)
