"""Typed settings: names, types and ranges of the config's keys. The defaults are in conf/config.yaml.

The groups `model`, `data`, `augment`, `task`, `optimizer` and `schedule` are plain dictionaries in `Settings`. The keys
that all options of a group share are checked by `check_groups`, and the others against the signature of the class that
`_target_` names (config/instantiate.py).
"""

import contextlib
import dataclasses
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from cnntrain.config.renamed_keys import renamed
from cnntrain.errors import UserError, suggest

T = TypeVar("T")
Node = dict[str, Any]  # `_target_` and its arguments
GROUPS = ("task", "augment", "model", "data", "optimizer", "schedule")  # config groups that are a `Node`


@dataclass(frozen=True)
class Within:
    """Annotation of a number that must lie in [low, high]; None: no limit."""

    low: float | None = None
    high: float | None = None


_TYPE_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_TYPE_NAMES |= {list: "a list", tuple: "a list", Sequence: "a list", dict: "a mapping", Mapping: "a mapping"}


@dataclass(frozen=True)
class CheckpointSettings:
    every_steps: Annotated[int | None, Within(1)]
    keep: Annotated[int, Within(0)]


@dataclass(frozen=True)
class LaunchSettings:
    devices: Annotated[int, Within(1, 1024)]
    timeout_s: Annotated[float, Within(1)]


@dataclass(frozen=True)
class LogSettings:
    every_steps: Annotated[int, Within(1)]
    tensorboard: bool
    figures: bool


@dataclass(frozen=True)
class OverfitSettings:
    examples: Annotated[int, Within(1, 1024)]
    steps: Annotated[int, Within(1)]
    strict: bool


@dataclass(frozen=True)
class CheckSettings:
    budget_s: Annotated[float, Within(1)]
    first: bool


@dataclass(frozen=True)
class BenchSettings:
    budget_s: Annotated[float, Within(1)]


@dataclass(frozen=True)
class LrFindSettings:
    lowest: Annotated[float, Within(1e-12)]
    highest: Annotated[float, Within(1e-12)]
    steps: Annotated[int, Within(20, 10_000)]

    def __post_init__(self) -> None:
        if self.highest <= self.lowest:
            raise UserError(f"lr_find.highest: must be above lr_find.lowest ({self.lowest}), got {self.highest}")


@dataclass(frozen=True)
class InspectSettings:
    image_size: Annotated[int | tuple[Annotated[int, Within(1)], Annotated[int, Within(1)]] | None, Within(1)]
    channels: Annotated[int | None, Within(1)]
    num_outputs: Annotated[int | None, Within(1)]
    depth: Annotated[int | None, Within(0)]
    convention: Literal["torch", "keras", "folded"]


@dataclass(frozen=True)
class PreviewSettings:
    images: Annotated[int, Within(1, 64)]
    epochs: Annotated[int, Within(1, 32)]


@dataclass(frozen=True)
class SweepSettings:
    over: dict[str, Any]
    sampler: Literal["grid", "random", "tpe"]
    trials: Annotated[int | None, Within(1)]
    timeout_s: Annotated[float | None, Within(0)]
    seed: Annotated[int, Within(0, 2**62)]
    seeds: Annotated[int, Within(1)]
    jobs: Annotated[int, Within(1, 256)]
    pruner: Literal["none", "median", "asha", "hyperband"]
    on_error: Literal["continue", "stop"]
    storage: str | None


@dataclass(frozen=True)
class DataSettings:
    """Keys of every dataset; the others in `data` are arguments of the data source."""

    workers: Annotated[int, Within(0, 256)] = 2
    val_fraction: Annotated[float, Within(0, 0.9)] = 0.1
    folds: Annotated[int | None, Within(2)] = None
    fold: Annotated[int, Within(0)] = 0
    split_seed: int = 0
    limit: Annotated[int | None, Within(2)] = None
    mean: list[float] | None = None
    std: list[float] | None = None
    cache: Literal["auto", "gpu", "ram", "disk", "none"] = "auto"
    scan: Literal["full", "headers", "off"] = "headers"
    timeout_s: Annotated[int, Within(1)] = 120
    bits: Annotated[int | None, Within(9, 16)] = None

    def __post_init__(self) -> None:
        if self.fold and self.folds is None:
            raise UserError(
                f"data.fold: {self.fold} has no effect without data.folds; set data.folds, for example data.folds=5"
            )


@dataclass(frozen=True)
class ModelSettings:
    """Keys of every network; the others in `model` are arguments of the network."""

    pretrained: Any = None
    norm: str | None = None
    activation: str | None = None
    init: str = "default"
    freeze: Any = None
    unfreeze: Annotated[int | None, Within(2)] = None


@dataclass(frozen=True)
class OptimizerSettings:
    """Keys of every optimizer; the others in `optimizer` are arguments of torch's class."""

    decay_norms_and_biases: bool
    layer_decay: Annotated[float | None, Within(1e-6, 1)]


@dataclass(frozen=True)
class Settings:
    """Settings of `cnntrain train` and of the commands that share its config."""

    task: Node
    augment: Node
    model: Node
    data: Node
    optimizer: Node
    schedule: Node
    seed: Annotated[int, Within(0, 2**62)]
    epochs: Annotated[int, Within(1)]
    steps: Annotated[int | None, Within(1)]
    batch_size: Annotated[int | Literal["auto"], Within(1)]
    limit_batches: Annotated[int | None, Within(1)]
    accumulate: Annotated[int, Within(1)]
    clip_grad_norm: Annotated[float | None, Within(1e-12)]
    device: str
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    channels_last: bool
    compile: Literal["off", "default", "max-autotune-no-cudagraphs"]
    threads: Annotated[int | None, Within(1, 1024)]
    deterministic: bool
    ema_decay: Annotated[float | None, Within(0, 0.999999)]
    early_stopping: Annotated[int | None, Within(1)]
    run_dir: str | None
    resume: str
    launch: LaunchSettings
    checkpoint: CheckpointSettings
    log: LogSettings
    overfit: OverfitSettings
    check: CheckSettings
    bench: BenchSettings
    lr_find: LrFindSettings
    inspect: InspectSettings
    preview: PreviewSettings
    sweep: SweepSettings
    expect: dict[str, Any] | None
    trusted_packages: list[str]
    choices: dict[str, Any]  # group -> chosen option

    @property
    def fixed_batch_size(self) -> int | None:
        """The batch size, or None for `auto`."""
        return None if self.batch_size == "auto" else self.batch_size

    @property
    def label(self) -> str:
        """Name of the network and of the dataset, for the run folder."""
        model = self.model.get("name") or self.choices.get("model", "model")
        data = self.choices.get("data", "data")
        return re.sub(r"[^A-Za-z0-9_.]+", "-", f"{model}-{data}").lower()


@dataclass(frozen=True)
class EvaluateData:
    root: str | None
    workers: Annotated[int | None, Within(0, 256)]


@dataclass(frozen=True)
class CheckpointCommandSettings:
    """Settings that `evaluate` and `predict` share; the others come from the checkpoint."""

    checkpoint: str
    batch_size: Annotated[int | None, Within(1)]
    device: str
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None
    threads: Annotated[int | None, Within(1, 1024)]
    run_dir: str | None
    trusted_packages: list[str]


@dataclass(frozen=True)
class EvaluateSettings(CheckpointCommandSettings):
    split: Literal["train", "val", "test"]
    data: EvaluateData


@dataclass(frozen=True)
class PredictSettings(CheckpointCommandSettings):
    images: str
    boxes: str | None
    draw: Annotated[int | None, Within(0)]
    workers: Annotated[int, Within(0, 256)]


@dataclass(frozen=True)
class CompareSettings:
    metric: str | None
    run_dir: str | None


def split_common(node: Node, cls: type) -> tuple[Node, Node]:
    """Split a group's config into the arguments of its class and the keys that every option has (fields of `cls`)."""
    names = {field.name for field in dataclasses.fields(cls)}
    own = {key: value for key, value in node.items() if key not in names}
    return own, {key: value for key, value in node.items() if key in names}


def conf_folder() -> Path:
    """Return the folder of the shipped config files: in the installed package, or at the top of the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def default_settings() -> dict[str, Any]:
    """Return the defaults in conf/config.yaml of all keys that do not belong to a config group."""
    defaults = yaml.safe_load((conf_folder() / "config.yaml").read_text("utf-8"))
    names = {field.name for field in dataclasses.fields(Settings)} - {*GROUPS}
    return {name: value for name, value in defaults.items() if name in names}


def check_groups(settings: Settings) -> None:
    """Check the keys that all options of a group share, before torch is imported and any data is read."""
    parse(DataSettings, split_common(settings.data, DataSettings)[1], "data.")
    parse(ModelSettings, split_common(settings.model, ModelSettings)[1], "model.")
    parse(OptimizerSettings, split_common(settings.optimizer, OptimizerSettings)[1], "optimizer.")
    for name, hint in (("lr", float | Literal["auto"]), ("weight_decay", float)):
        if name in settings.optimizer:
            check_value(settings.optimizer[name], hint, f"optimizer.{name}", Within(0))


def parse(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build the dataclass `cls` from plain values; check the type and range of each.

    Args:
        path: prefix of the keys in error messages, for example "optimizer.".
    """
    hints = get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in fields:
            hint = renamed(f"{path}{name}") or suggest(str(name), list(fields))
            raise UserError(f"{path}{name}: no such key{hint}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = check_value(values[name], hints[name], f"{path}{name}")
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{path}{name}: missing")
    return cls(**arguments)


def check_value(value: Any, hint: Any, key: str, limits: Within = Within(), alternatives: str = "") -> Any:
    """Check a value against a type annotation; return it with numbers converted to the annotated type.

    Supports numbers, text, `Literal`, lists, mappings, dataclasses, unions and `Annotated[..., Within(...)]`. Other
    annotations accept any value. A whole number is accepted for `float`.

    Args:
        key: the config key, for messages.
        limits: range of numbers.
        alternatives: other accepted values, for messages.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = arguments[1] if isinstance(arguments[1], Within) else limits
        return check_value(value, arguments[0], key, limits, alternatives)
    if origin in (Union, types.UnionType):
        return _check_union(value, arguments, key, limits)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{key}: needs keys below it, for example {key}.NAME=...; got {shortened(value)}")
        return parse(hint, value, f"{key}.")  # pyright: ignore[reportArgumentType]
    if origin is Literal:
        return _check_choice(value, arguments, key)
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            raise UserError(f"{key}: must be a list{alternatives}, got {shortened(value)}")
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        if fixed and len(value) != len(arguments):
            raise UserError(f"{key}: must be a list of {len(arguments)} values, got {shortened(value)}")
        checked = [check_value(each, arguments[i if fixed else 0], f"{key}[{i}]") for i, each in enumerate(value)]
        return tuple(checked) if origin is tuple else checked
    if origin in (dict, Mapping) and not isinstance(value, Mapping):
        raise UserError(f"{key}: must be a mapping{alternatives}, got {shortened(value)}")
    return _check_scalar(value, hint, key, limits, alternatives) if hint in (int, float, bool, str) else value


def _check_union(value: Any, options: tuple[Any, ...], key: str, limits: Within) -> Any:
    if value is None and type(None) in options:
        return None
    words = tuple(word for option in options if get_origin(option) is Literal for word in get_args(option))
    if value in words:
        return value
    kinds = [option for option in options if option is not type(None) and get_origin(option) is not Literal]
    if not kinds:
        return _check_choice(value, words, key)
    alternatives = "".join(f" or {word}" for word in words or ("null",) * (type(None) in options))
    if len(kinds) == 1:
        return check_value(value, kinds[0], key, limits, alternatives)
    for kind in kinds:
        with contextlib.suppress(UserError):
            return check_value(value, kind, key, limits)
    names = " or ".join(_TYPE_NAMES.get(kind) or _TYPE_NAMES.get(get_origin(kind), str(kind)) for kind in kinds)
    raise UserError(f"{key}: must be {names}{alternatives}, got {shortened(value)}")


def _check_choice(value: Any, choices: tuple[Any, ...], key: str) -> Any:
    if value is False and "off" in choices:  # YAML reads an unquoted off as false
        return "off"
    if value not in choices:
        names = [str(choice) for choice in choices]
        hint = renamed(key, value) or suggest(str(value), names)
        raise UserError(f"{key}: {shortened(value)} is not one of {', '.join(names)}{hint}")
    return value


def _check_scalar(value: Any, kind: type, key: str, limits: Within, alternatives: str) -> Any:
    """Check a string, bool, int or float; convert 3.0 to int and 3 to float if the annotation says so."""
    low, high = limits.low, limits.high
    if kind is str and value is not None and not isinstance(value, bool | Mapping | list):
        return str(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError, ValueError):  # an integer above the largest float; inf and nan as int
            converted = kind(value)
            exact = converted == value if kind is int else math.isfinite(converted)
            if exact and (low is None or value >= low) and (high is None or value <= high):
                return converted
    bounds = ([f">= {low:g}"] if low is not None else []) + ([f"<= {high:g}"] if high is not None else [])
    expected = " ".join([_TYPE_NAMES[kind], " and ".join(bounds)]).rstrip() + alternatives
    raise UserError(f"{key}: must be {expected}, got {shortened(value)}")


def shortened(value: Any, limit: int = 60) -> str:
    """Format a value for a message; truncate long values."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number of several thousand digits"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
