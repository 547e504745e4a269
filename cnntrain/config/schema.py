"""The fixed part of the config as typed dataclasses: names, types and ranges. Defaults stand in conf/config.yaml.

The pluggable leaves (`model`, `data`, `augment`, `task`, `optimizer`, `schedule`) are plain dictionaries here; they are
checked against the signature of what they name when it is built.
"""

import copy
import dataclasses
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from cnntrain.config.renamed_keys import renamed
from cnntrain.errors import UserError, suggest

T = TypeVar("T")
Node = dict[str, Any]  # a pluggable leaf: `_target_` and its arguments
GROUPS = ("task", "augment", "model", "data", "optimizer", "schedule")  # keys of the pluggable leaves


@dataclass(frozen=True)
class Within:
    """Marks numbers that must lie in [low, high]; None leaves that end open."""

    low: float | None = None
    high: float | None = None


ANYTHING = Within()
_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


@dataclass(frozen=True)
class CheckpointSettings:
    every_steps: Annotated[int | None, Within(1)]
    keep: Annotated[int, Within(0)]


@dataclass(frozen=True)
class LaunchSettings:
    devices: Annotated[int, Within(1, 1024)]


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
            raise UserError(
                f"lr_find.highest: must be above lr_find.lowest ({self.lowest}), got {self.highest}"
            )


@dataclass(frozen=True)
class InspectSettings:
    image_size: Any
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
    """Keys that every data set has; the rest of `data` belongs to the source."""

    workers: Annotated[int, Within(0, 256)]
    val_fraction: Annotated[float, Within(0, 0.9)]
    folds: Annotated[int | None, Within(2)]
    fold: Annotated[int, Within(0)]
    split_seed: int
    limit: Annotated[int | None, Within(2)]
    mean: list[float] | None
    std: list[float] | None
    cache: Literal["auto", "gpu", "ram", "disk", "none"]
    scan: Literal["full", "headers", "off"]
    timeout_s: Annotated[int, Within(1)]
    bits: Annotated[int | None, Within(9, 16)] = None

    def __post_init__(self) -> None:
        if self.fold and self.folds is None:
            raise UserError(
                f"data.fold: {self.fold} has no effect without data.folds; set data.folds, for example data.folds=5"
            )


@dataclass(frozen=True)
class ModelSettings:
    """Keys that every shipped network has; the rest of `model` belongs to the network."""

    pretrained: Any = None
    norm: str | None = None
    activation: str | None = None
    init: str = "default"
    freeze: Any = None
    unfreeze: Annotated[int | None, Within(2)] = None


@dataclass(frozen=True)
class OptimizerSettings:
    """Keys that every optimizer has; the rest of `optimizer` belongs to torch's class."""

    decay_norms_and_biases: bool = False
    layer_decay: Annotated[float | None, Within(1e-6, 1)] = None


@dataclass(frozen=True)
class Settings:
    """Everything that `cnntrain train` needs to know."""

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
    choices: dict[str, Any]  # group -> option, as they were chosen

    @property
    def known_batch_size(self) -> int | None:
        """Images a batch; None as long as that is `auto`."""
        return None if self.batch_size == "auto" else self.batch_size

    @property
    def label(self) -> str:
        """A short name for the run's folder: what is trained on what."""
        model = self.model.get("name") or self.choices.get("model", "model")
        data = self.choices.get("data", "data")
        return re.sub(r"[^A-Za-z0-9_.]+", "-", f"{model}-{data}").lower()


@dataclass(frozen=True)
class EvaluateData:
    root: str | None
    workers: Annotated[int | None, Within(0, 256)]


@dataclass(frozen=True)
class EvaluateSettings:
    """Everything that `cnntrain evaluate` needs to know; the rest comes from the checkpoint."""

    checkpoint: str
    split: Literal["train", "val", "test"]
    data: EvaluateData
    batch_size: Annotated[int | None, Within(1)]
    device: str
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None
    threads: Annotated[int | None, Within(1, 1024)]
    run_dir: str | None
    trusted_packages: list[str]


@dataclass(frozen=True)
class CompareSettings:
    """Everything that `cnntrain compare` needs to know beside the folders."""

    metric: str | None
    run_dir: str | None


@dataclass(frozen=True)
class PredictSettings:
    """Everything that `cnntrain predict` needs to know; the rest comes from the checkpoint."""

    checkpoint: str
    images: str
    boxes: str | None
    draw: Annotated[int | None, Within(0)]
    batch_size: Annotated[int | None, Within(1)]
    workers: Annotated[int, Within(0, 256)]
    device: str
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None
    threads: Annotated[int | None, Within(1, 1024)]
    run_dir: str | None
    trusted_packages: list[str]


def split_common(node: Node, cls: type) -> tuple[Node, Node]:
    """Split a group's config into the arguments of its class and the keys that every option has (fields of `cls`)."""
    names = {field.name for field in dataclasses.fields(cls)}
    own = {key: value for key, value in node.items() if key not in names}
    return own, {key: value for key, value in node.items() if key in names}


def conf_folder() -> Path:
    """Return the folder of the shipped config groups: inside the wheel, or at the top of the checkout."""
    package = Path(__file__).resolve().parents[1]
    inside, beside = package / "conf", package.parent / "conf"
    return inside if inside.is_dir() else beside


def default_settings() -> dict[str, Any]:
    """Return the defaults in conf/config.yaml of all keys that do not belong to a config group."""
    return copy.deepcopy(_default_settings())


@cache
def _default_settings() -> dict[str, Any]:
    defaults = yaml.safe_load((conf_folder() / "config.yaml").read_text("utf-8"))
    names = {field.name for field in dataclasses.fields(Settings)} - {*GROUPS}
    return {name: value for name, value in defaults.items() if name in names}


def parse(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """An instance of the dataclass `cls` from plain values, each checked for type and range.

    Raises:
        UserError: names the key at fault, what was found and what would be right.
    """
    hints = get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in fields:
            hint = renamed(f"{path}{name}") or suggest(str(name), list(fields))
            raise UserError(f"{path}{name}: no such key{hint}")
    arguments = {}
    for name, f in fields.items():
        if name not in values:
            if f.default is dataclasses.MISSING:
                raise UserError(f"{path}{name}: missing")
            continue
        arguments[name] = _convert(values[name], hints[name], f"{path}{name}")
    return cls(**arguments)


def _convert(value: Any, hint: Any, key: str, limits: Within = ANYTHING, or_null: str = "") -> Any:
    origin = get_origin(hint)
    if origin is Annotated:
        hint, limits = get_args(hint)
        origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
        if value in words:
            return value
        typed = [o for o in options if o is not type(None)]
        inner = next((o for o in typed if get_origin(o) is not Literal), typed[0])
        return _convert(value, inner, key, limits, f" or {' or '.join(words) or 'null'}")
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{key}: needs keys below it, as {key}.NAME=...; got {value!r}")
        return parse(hint, value, f"{key}.")  # pyright: ignore[reportArgumentType]
    if origin is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        if value is False and "off" in choices:  # as YAML reads a bare off
            return "off"
        if value not in get_args(hint):
            hint = renamed(key, value) or suggest(str(value), choices)
            raise UserError(f"{key}: {value!r} is not one of {', '.join(choices)}{hint}")
        return value
    if origin in (dict, list):
        if not isinstance(value, origin):
            raise UserError(f"{key}: must be a {'list' if origin is list else 'mapping'}, got {value!r}")
        if origin is list:
            return [_convert(each, get_args(hint)[0], f"{key}[{i}]") for i, each in enumerate(value)]
        return value
    return _scalar(value, hint, key, limits, or_null)


def check_type(value: Any, hint: Any, key: str) -> None:
    """Check a value against the annotation of the parameter that it is passed to.

    Supports numbers, text, `Literal`, sequences, mappings, unions and `Annotated[..., Within(...)]`; accepts any value
    for other annotations. A whole number is accepted for `float`.

    Raises:
        UserError: the type or the range is wrong.
    """
    limits, bare = (
        (get_args(hint)[1], get_args(hint)[0]) if get_origin(hint) is Annotated else (ANYTHING, hint)
    )
    options = get_args(bare) if get_origin(bare) in (Union, types.UnionType) else (bare,)
    problem = None
    for option in options:
        try:
            _check_option(value, option, key, limits if isinstance(limits, Within) else ANYTHING)
        except UserError as error:
            problem = problem or error
        else:
            return
    if len(options) > 1:
        others = [_TYPE_NAMES.get(option) or f"{option}".removeprefix("typing.") for option in options]
        problem = UserError(f"{key}: must be {' or '.join(others)}, got {_shown(value)}")
    if problem:
        raise problem


def _check_option(value: Any, hint: Any, key: str, limits: Within) -> None:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        check_type(value, hint, key)
    elif hint is type(None):
        if value is not None:
            raise UserError(f"{key}: must be null, got {_shown(value)}")
    elif hint in _TYPE_NAMES:
        _scalar(value, hint, key, limits, "")
    elif origin is Literal:
        _convert(value, hint, key)
    elif origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            raise UserError(f"{key}: must be a list, got {_shown(value)}")
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        if fixed and len(value) != len(arguments):
            raise UserError(f"{key}: must be a list of {len(arguments)} values, got {_shown(value)}")
        for number, each in enumerate(value):
            check_type(each, arguments[number if fixed else 0], f"{key}[{number}]")
    elif origin in (dict, Mapping) and not isinstance(value, Mapping):
        raise UserError(f"{key}: must be a mapping, got {_shown(value)}")


def _scalar(value: Any, kind: type, key: str, limits: Within, or_null: str) -> Any:
    low, high = limits.low, limits.high
    limits_said = ([f">= {low:g}"] if low is not None else []) + (
        [f"<= {high:g}"] if high is not None else []
    )
    bounds = " " + " and ".join(limits_said) if limits_said else ""
    words = _TYPE_NAMES[kind]
    problem = UserError(f"{key}: must be {words}{bounds}{or_null}, got {_shown(value)}")
    if kind is str:
        if value is None or isinstance(value, bool | Mapping | list):
            raise problem
        return str(value)
    if kind is bool:
        if not isinstance(value, bool):
            raise problem
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise problem
    if isinstance(value, float) and (not math.isfinite(value) or (kind is int and value != int(value))):
        raise problem
    if (low is not None and value < low) or (high is not None and value > high):
        raise problem
    try:
        return kind(value)
    except OverflowError:  # an integer above the largest float
        raise problem from None


def _shown(value: Any, most: int = 60) -> str:
    """Format a value for a message; truncate long values."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number of several thousand digits"
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
